"""Give the package your name: in imports, configurations, tests, documents and pyproject.toml.

    python scripts/rename.py petals

Works on a clean git tree only, so that `git diff` shows what it did and `git checkout .` undoes it. A rename to
the old name is the way back. Needs nothing but Python and git, so it can be run before anything is installed.
"""

import importlib.util
import keyword
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def places(name: str) -> re.Pattern[str]:
    """Return what finds a package's name where it means the package, and not the word."""
    return re.compile(
        rf"""(?<=\bfrom\ ){name}(?=[. ])      # from name.module import
        | (?<=\bimport\ ){name}\b             # import name
        | (?<![\w./-]){name}(?=\.[A-Za-z_])   # name.module, in configurations, strings and text
        | (?<=-m\ ){name}\b                   # python -m name
        | (?<=\bsrc/){name}\b
        | (?<=["']){name}(?=\[|::|\ \{{__)    # 'name[extra]', "name::operator", f"name {{__version__}}"
        | (?<!\[)(?<="){name}(?=")(?!"\])     # "name", but not the table ["project"] of pyproject.toml
        | \b{name.upper()}_(?=[A-Z])          # environment variables
        """,
        re.VERBOSE,
    )


def rename(text: str, old: str, new: str) -> str:
    """Return the text with the package's name replaced."""
    return places(old).sub(lambda found: found[0].replace(old, new).replace(old.upper(), new.upper()), text)


def problem(name: str) -> str | None:
    """Return why a package should not have this name, or None."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return "is not a name for a package: write small letters, digits and _, a letter first"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return "is a word of Python: write another name"
    if name in sys.stdlib_module_names:
        return "is a module of Python's standard library: write another name"
    if importlib.util.find_spec(name):
        return "is an installed package: write another name"
    return None


def git(*arguments: str) -> str:
    """Run git in the repository; return what it says."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def texts() -> dict[Path, str]:
    """Return the text files that git keeps."""
    found = {}
    for name in git("ls-files", "-z").split("\0")[:-1]:
        try:
            found[ROOT / name] = (ROOT / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a picture
    return found


def main() -> int:
    """Check, rename, say what is next."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    new = sys.argv[1]
    old = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    wrong = problem(new)
    if wrong:
        print(f"error: {new} {wrong}", file=sys.stderr)
        return 2
    changed = git("status", "--porcelain").splitlines()
    if changed:
        print(f"error: the tree has changes ({changed[0].strip()}): commit or undo them first", file=sys.stderr)
        return 2
    before = texts()
    used = next((path for path, text in before.items() if places(new).search(text)), None)
    if used:
        print(f"error: {new} is already used in {used.relative_to(ROOT)}: write another name", file=sys.stderr)
        return 2
    after = {path: rename(text, old, new) for path, text in before.items()}
    for path, text in after.items():
        if text != before[path]:
            path.write_bytes(text.encode())
    git("mv", f"src/{old}", f"src/{new}")
    print(f"src/{old} is src/{new}, and {sum(after[path] != before[path] for path in after)} files say so. Now:")
    print("  pip install -e '.[dev]' && ruff check --fix && ruff format && python -m pytest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
