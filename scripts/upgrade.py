"""Replace the engine by another version of it. Everything that is yours stays as it is.

    python scripts/upgrade.py https://github.com/OWNER/batchwise --ref v0.3.0
    python scripts/upgrade.py ../batchwise

The new version is a folder (a checkout of the template), or comes from a git repository at a tag, branch or commit. It
replaces the places below. Those that you have deleted stay deleted, and files of your own in them stay. If you have
changed files of the engine, your changes are kept in a patch file. To find them, the script compares your files with
the old version as it was published: the commit of the source that is most like them, or else, if it has another version
or the source is a folder without git, the commit of yours that brought the version.

It needs Python, git, and a git tree without changes, so that `git stash --include-untracked` undoes all of it.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from hashlib import sha1
from pathlib import Path
from typing import NoReturn

from rename import package, rename

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("src/batchwise", "tests/batchwise", "scripts/lab", "docs")
PLACES = (*PLACES, "CHANGELOG.md", "scripts/rename.py", "scripts/upgrade.py")
INIT = "src/batchwise/__init__.py"


def stop(text: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def git(*arguments: str | Path, folder: Path = ROOT, succeeds: int = 0) -> bytes | None:
    """Run git; return its output, or None if it fails."""
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True)
    return done.stdout if done.returncode == succeeds else None


def export(repository: Path, ref: str, folder: Path) -> Path | None:
    """Write the files of a tag, branch or commit to a folder and return it, or None if there is no such ref."""
    for name in (ref, f"origin/{ref}"):
        archive = git("archive", "--format=tar", f"{name}^{{commit}}", folder=repository)
        if archive is not None:
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            return folder
    return None


def take(source: str, ref: str | None, work: Path) -> tuple[Path, Path | None]:
    """Return a folder with the new version, and the git repository it is from, if there is one."""
    repository = Path(source)
    if not (repository / "src").is_dir():
        repository, ref = work / "clone", ref or "HEAD"
        if git("clone", "--quiet", "--no-checkout", "--", source, repository, folder=Path()) is None:
            stop(f"{source} is neither a folder with src/ nor a git repository that can be cloned: write another")
    known = repository if (repository / ".git").exists() else None
    new = repository if ref is None else export(known, ref, work / "new") if known else None
    if new is None:
        stop(f"{source} has no tag, branch or commit {ref}: write another --ref")
    if version(new) is None:
        stop(f"{source} is no version of the template: it has no {INIT} with a __version__")
    return new, known


def version(root: Path) -> str | None:
    """Return the engine's version, which is read and not imported, or None."""
    text = (root / INIT).read_text("utf-8") if (root / INIT).is_file() else ""
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else None


def number(name: str) -> list[int]:
    """Return a version as numbers, which can be compared."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def nearest(repository: Path, mine: dict[str, bytes]) -> str:
    """Return the commit of the source whose engine differs in fewest files from the user's, or an empty text.

    Of several, it is the newest.
    """
    blobs = {path: b"blob %d\0%s" % (len(content), content) for path, content in mine.items()}
    here = blobs.keys() | {f"{sha1(blob).hexdigest()}\t{path}" for path, blob in blobs.items()}
    places = [place for place in PLACES if (ROOT / place).exists()]

    def difference(commit: str) -> int:
        listed = (git("ls-tree", "-r", "-z", commit, *places, folder=repository) or b"").decode()
        entries = {entry.split(" ", 2)[2] for entry in listed.split("\0")[:-1]}  # the hash of a file, and its path
        return len(here ^ (entries | {entry.split("\t")[1] for entry in entries}))

    return min((git("rev-list", "--all", folder=repository) or b"").decode().split(), key=difference, default="")


def pristine(old: str, repository: Path | None, mine: dict[str, bytes], folder: Path) -> Path:
    """Write the old version, as it was before any change of the user's, to a folder; return the folder."""
    if repository and export(repository, nearest(repository, mine), folder) and version(folder) == old:
        return folder
    if git("rev-parse", "--is-shallow-repository") == b"true\n":
        stop("this clone has only a part of its history, which your changes are found in: git fetch --unshallow first")
    commit = git("log", "-1", "--format=%H", f'-S__version__ = "{old}"', "--", INIT) or b""
    folder = folder.with_name("own")
    return export(ROOT, commit.decode().strip(), folder) or stop(f"no commit has brought {INIT}: commit it first")


def engine(root: Path, name: str) -> dict[str, bytes]:
    """Return the engine's files by their paths, with the user's package `name` in the documents."""
    found, template = {}, package(root)
    for place in PLACES:
        for path in [root / place] if (root / place).is_file() else sorted((root / place).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and (ROOT / place).exists():
                content = path.read_bytes()  # git may write the line ends of Windows, also into one of two copies
                plain = content if b"\0" in content else content.replace(b"\r\n", b"\n")
                found[path.relative_to(root).as_posix()] = plain
    for path in found:
        if path.startswith("docs/") and path.endswith((".md", ".ipynb")):
            text = found[path].decode("utf-8", "surrogateescape")  # a page of the user's may be in Latin-1
            found[path] = rename(text, template, name).encode("utf-8", "surrogateescape")
    return found


def keep_changes(old: dict[str, bytes], mine: dict[str, bytes], names: list[str], patch: Path, work: Path) -> None:
    """Write the user's changes to some of the files as a patch."""
    for letter, files in {"a": old, "b": mine}.items():
        (work / letter).mkdir()
        for name in files.keys() & names:
            (work / letter / name).parent.mkdir(parents=True, exist_ok=True)
            (work / letter / name).write_bytes(files[name])
            if letter == "a":
                git("hash-object", "-w", "--no-filters", work / letter / name)  # `git apply --3way` looks it up
    options = ("--no-index", "--no-prefix", "--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-color")
    patch.write_bytes(git("diff", *options, "a", "b", folder=work, succeeds=1) or stop("git diff failed"))


def replace(mine: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """Bring the files of the new version, and remove those that it no longer has; return how many, and which."""
    gone = [name for name in mine if name in old and name not in new]
    brought = {name for name in new if mine.get(name) != new[name]}
    for name in brought:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(new[name])
    for name in gone:
        (ROOT / name).unlink()
        for folder in (ROOT / name).parents:
            if any(folder.iterdir()):
                break
            folder.rmdir()
    counts = f"{len(brought & mine.keys())} files changed, {len(brought - mine.keys())} added, {len(gone)} removed"
    return "\n".join([counts, *(f"  removed: {name}" for name in gone)])


def news(changelog: Path, old: str, new: str) -> str:
    """Return the sections of a changelog from after the old version to the new one."""
    text = changelog.read_text("utf-8") if changelog.is_file() else ""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return "".join(f"## {each}" for each in sections if number(old) < number(each.split()[0]) <= number(new)).strip()


def settings(old: Path, new: Path, name: str) -> list[str]:
    """Return the lines of pyproject.toml that the new version adds (+) and drops (-), and the user has not."""
    texts = [rename((root / "pyproject.toml").read_text("utf-8"), package(root), name) for root in (old, new, ROOT)]
    was, now, mine = (text.splitlines() for text in texts)
    added = [f"  + {line.strip()}" for line in now if line not in was and line not in mine]
    return added + [f"  - {line.strip()}" for line in was if line not in now and line in mine]


def upgrade(given: argparse.Namespace, work: Path) -> None:
    """Find the three versions (the old, the new, the user's), keep the user's changes, replace, and report."""
    name, before = package(ROOT), version(ROOT) or stop(f"{INIT} has no __version__")
    source, repository = take(given.source, given.ref, work)
    after = version(source) or ""
    if number(after) < number(before) and not given.downgrade:
        stop(f"{after} is older than {before}, which you have: write --downgrade to take it")
    origin = pristine(before, repository, engine(ROOT, package(source)), work / "old")
    old, new, mine = (engine(root, name) for root in (origin, source, ROOT))
    if new == {path: content for path, content in mine.items() if path in old or path in new}:
        print(f"batchwise is {after} already, and no file differs")
        return
    changed = [path for path in sorted({*old, *new}) if mine.get(path) not in (old.get(path), new.get(path))]
    patch = ROOT / f"batchwise-{before}.patch"
    if changed and patch.exists():
        stop(f"{patch.name} is there already: move it elsewhere, and commit that")
    if changed:
        keep_changes(old, mine, changed, patch, work)
    print(f"batchwise {before} -> {after}: {replace(mine, old, new)}")
    if text := news(source / "CHANGELOG.md", before, after):
        print(f"\n{text}")
    if changed:
        print("\nYou had changed files of the engine:", *changed, sep="\n  ")
        print(f"They are replaced. Your changes are in {patch.name}. To have them in the new version, commit it, then:")
        prefix = (git("rev-parse", "--show-prefix") or b"").decode().strip()  # of a project that is a folder of others
        print(f"  git apply --3way {f'--directory={prefix} ' if prefix else ''}{patch.name}")
    if lines := settings(origin, source, name):
        print("\npyproject.toml is yours and stays. The new version has other lines in it, which you may need:")
        print(*lines, "then: pip install -e '.[dev]'", sep="\n")
    tests = " tests/batchwise" if (ROOT / "tests" / "batchwise").exists() else ""
    print(f"\ntest it:  python -m pytest{tests}\nundo it:  git stash --include-untracked")


def main() -> None:
    """Read the command line, check that git can undo all of it, upgrade."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, or address of a git repository")
    parser.add_argument("--ref", help="tag, branch or commit of the source")
    parser.add_argument("--downgrade", action="store_true", help="take an older version, too")
    given = parser.parse_args()
    status = git("status", "--porcelain") if shutil.which("git") else stop("git is not installed: install it")
    if status is None:
        stop("this project is in no git repository: write `git init`, and commit all files first")
    if status:
        stop(f"the tree has changes ({status.decode().splitlines()[0].strip()}): commit or undo them first")
    with tempfile.TemporaryDirectory() as folder:
        upgrade(given, Path(folder))


if __name__ == "__main__":
    main()
