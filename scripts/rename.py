"""Give your package another name: its folder, and the lines that name it in your files and in the documents.

    python scripts/rename.py petals

It needs a git tree without changes, so that `git diff HEAD` shows the result and `git reset --hard` undoes it. A rename
back to the old name restores every file. It needs Python and git alone, so it works before anything is installed. The
engine, `batchwise`, keeps its name and does not know yours.
"""

import contextlib
import importlib.util
import keyword
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("src/{}", "tests/{}", "configs", "docs", "*.py", "*.ipynb", "*.sh", "*.md", "*.yaml", "*.toml")
"""Where the package is named."""
ENGINE = ("src/batchwise", "tests/batchwise", "scripts/lab", "scripts/rename.py", "scripts/upgrade.py", "CHANGELOG.md")
"""Where it is not. Neither is it in .github, because a workflow's token must not change workflows."""


def named(name: str) -> re.Pattern[str]:
    """Return a pattern that finds the package's name, and not the same word in a sentence."""
    published = name.replace("_", "[_-]")  # the name that pip knows may be my-net, where the folder is my_net
    return re.compile(
        rf"""(?<=-m\ ){name}\b                          # python -m name
        | (?<=from\ ){name}(?=[. ]) | (?<=import\ ){name}\b
        | (?<!^\[)(?<![\w./-]){name}(?=\.[A-Za-z_])     # name.data.Digits, but not the table [project.scripts]
        | (?<=\bsrc/){name}\b | (?<=\btests/){name}\b
        | (?<![\w./-]){name}(?=/)                       # name/data.py, and a tree of folders
        | (?<=`){name}(?=`)
        | (?<=["']){published}(?=\[)                    # "name[extra]"
        | (?<=^name\ =\ "){published}(?="\r?$)          # in pyproject.toml
        | (?<=-\ "){name}(?="\r?$)                      # an argument in a sweep's YAML
        """,
        re.VERBOSE | re.MULTILINE,
    )


def rename(text: str, old: str, new: str) -> str:
    """Return the text with the package's name replaced."""
    return named(old).sub(new, text)


def package(root: Path) -> str:
    """Return the name of a project's package, which is that of its folder in src."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["name"].replace("-", "_")


def problem(name: str) -> str | None:
    """Return why a package cannot have this name, or None."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return "is not a name for a package: write small letters, digits and _, a letter first"
    if name == "batchwise":
        return "is the engine: write another name"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return "is a word of Python: write another name"
    if name in sys.stdlib_module_names:
        return "is a module of Python's standard library: write another name"
    if importlib.util.find_spec(name):
        return "is an installed package: write another name"
    return None


def git(*arguments: str) -> str:
    """Run git in the repository; return its output."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def texts(name: str) -> dict[Path, str]:
    """Return the text files that may name the package."""
    found, left = {}, (f":!{place}" for place in (*ENGINE, ".github"))
    for path in git("ls-files", "-z", "--", *(place.format(name) for place in PLACES), *left).split("\0")[:-1]:
        if (ROOT / path).is_file() and not (ROOT / path).is_symlink():
            with contextlib.suppress(UnicodeDecodeError):  # a picture
                found[ROOT / path] = (ROOT / path).read_bytes().decode()
    return found


def obstacle(old: str, new: str) -> str | None:
    """Return why the package cannot be renamed now, or None."""
    if wrong := problem(new):
        return f"{new} {wrong}"
    try:
        changed = git("status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "this project is in no git repository: write `git init`, and commit all files first"
    if changed:
        return f"the tree has changes ({changed[0].strip()}): commit or undo them first"
    places = (f"src/{new}", f"tests/{new}", f"tests/batchwise/{new}.py")  # the engine's tests import the last
    used = (path.relative_to(ROOT) for path, text in texts(old).items() if named(new).search(text))
    if taken := next((place for place in places if (ROOT / place).exists()), next(used, None)):
        return f"{new} is already used in {taken}: write another name"
    if not (ROOT / "src" / old).is_dir():
        return f"pyproject.toml has the name {old}, but there is no src/{old}: give both the same name first"
    return None


def main() -> int:
    """Check the name, rename, and say what is next."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    old, new = package(ROOT), sys.argv[1]
    if wrong := obstacle(old, new):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    before = texts(old)
    after = {path: rename(text, old, new) for path, text in before.items()}
    for path, text in after.items():
        path.write_bytes(text.encode())
    for folder in ("src", "tests"):
        if (ROOT / folder / old).is_dir():
            git("mv", f"{folder}/{old}", f"{folder}/{new}")
    print(f"src/{old} is src/{new}, and {sum(after[path] != before[path] for path in after)} files say so. Now:")
    print("  pip install -e '.[dev]' && ruff check --fix && ruff format && python -m pytest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
