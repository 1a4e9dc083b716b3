"""A new version of the engine in a project that has a name, classes and runs of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

import batchwise

NAME, OLD, NEXT = "my_very_own_project", batchwise.__version__, "9.1.0"
ENGINE = ("src/batchwise/", "tests/batchwise/", "scripts/lab/", "docs/", "CHANGELOG.md")
DATA = """
import torch
from batchwise import DataModule, MicroBatch, Task


class Points(DataModule):
    def load(self, split):
        inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(len(split)))
        return inputs, (inputs[:, 0] > 0).long()


class Side(Task):
    def losses(self, batch: MicroBatch):
        return torch.nn.functional.cross_entropy(self(batch.inputs), batch.targets, reduction="none")
"""
CONFIG = f"""
name: points
trainer: {{max_epochs: 1, accelerator: cpu, logger: false}}
data: {{class_path: {NAME}.points.Points, init_args: {{batch_size: 8}}}}
model:
  class_path: {NAME}.points.Side
  init_args:
    network: {{class_path: torch.nn.Linear, init_args: {{in_features: 4, out_features: 2}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
"""
TEST = f"""
from {NAME}.points import Points


def test_points():
    assert len(Points(batch_size=8).load("train")[0]) == 40
"""
FIT = ("-m", NAME, "fit", "--config", "configs/points.yaml")


def write(copy: Any, **files: str) -> None:
    for path, text in files.items():
        (copy.root / path).parent.mkdir(parents=True, exist_ok=True)
        (copy.root / path).write_text(text)


def said(done: Any) -> str:
    """Return the one line of an error."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def line_of_an_epoch(copy: Any) -> Path:
    """Return the engine's file that writes "average loss"."""
    (path,) = (path for path in (copy.root / "src/batchwise").rglob("*.py") if "average loss" in path.read_text())
    return path


@pytest.fixture
def template(copy: Any) -> Any:
    """A repository of the template with two versions: this one, and one that changes, adds and removes."""
    for patch in copy.root.glob("*.patch"):  # which an earlier upgrade of this project has left
        patch.unlink()
    write(copy, **{"src/batchwise/models/old.py": "VALUE = 1\n", "docs/page.md": f"`python -m {copy.package} fit`\n"})
    copy.commit("this version")
    copy.git("tag", f"v{OLD}")
    init, changes = copy.root / "src/batchwise/__init__.py", copy.root / "CHANGELOG.md"
    init.write_text(init.read_text().replace(f'__version__ = "{OLD}"', f'__version__ = "{NEXT}"'))
    news = f"## [{NEXT}] - 2030-01-01\n\n- The mean.\n\n## [9.0.0] - 2029-01-01\n\n- Before the mean.\n\n## ["
    changes.write_text(changes.read_text().replace("## [", news, 1))
    path = line_of_an_epoch(copy)
    path.write_text(path.read_text().replace("average loss", "mean loss"))
    (copy.root / "src/batchwise/models/old.py").unlink()
    pyproject = (copy.root / "pyproject.toml").read_text()
    pyproject = re.sub(r'^(dependencies = \[\n)    "lightning.*\n', r'\1    "lightning>=9",\n', pyproject, flags=re.M)
    write(copy, **{
        "src/batchwise/models/new.py": "VALUE = 2\n",
        "tests/batchwise/models/test_new.py":
            "from batchwise.models.new import VALUE\n\n\ndef test_new() -> None:\n    assert VALUE == 2\n",
        "docs/page.md": f"`python -m {copy.package} test`\n",
        "pyproject.toml": pyproject,
    })  # fmt: skip
    copy.commit("the next version")
    copy.git("tag", f"v{NEXT}")
    return copy


@pytest.fixture
def mine(template: Any) -> Any:
    """A project that was made from this version, and has its own name and files."""
    template.git("checkout", "--quiet", f"v{OLD}")
    project = type(template)(Path("mine"), template.root)
    template.git("checkout", "--quiet", f"v{NEXT}")
    done = project.script("rename", NAME)
    assert done.returncode == 0, done.stderr
    write(project, **{
        f"src/{NAME}/points.py": DATA,
        f"tests/{NAME}/test_points.py": TEST,
        "configs/points.yaml": CONFIG,
        "docs/mine.md": "my own page",
        "src/batchwise/models/mine.py": "MINE = True\n",
    })  # fmt: skip
    project.commit("mine")
    return project


@pytest.mark.weekly
def test_a_project_goes_on_with_the_next_version(template: Any, mine: Any) -> None:
    assert "epoch 1  average loss " in mine.python(*FIT)
    before = mine.contents()
    done = mine.script("upgrade", template.root.as_uri(), "--ref", f"v{NEXT}")
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == f"batchwise {OLD} -> {NEXT}: 4 files changed, 2 added, 1 removed"
    assert second == "  removed: src/batchwise/models/old.py"
    assert "- The mean.\n\n## [9.0.0]" in done.stdout
    assert f"## [{OLD}]" not in done.stdout
    assert "You had changed" not in done.stdout
    old = re.findall(r'^    ("lightning.*)$', (mine.root / "pyproject.toml").read_text(), re.MULTILINE)
    assert f'  + "lightning>=9",\n  - {old[0]}\n' in done.stdout
    assert done.stdout.endswith("test it:  python -m pytest tests/batchwise\nundo it:  git stash --include-untracked\n")

    mine.git("add", "--all")
    after, new = mine.contents(), template.contents()
    own = {"docs/mine.md", "src/batchwise/models/mine.py"}
    for path, content in before.items():
        if path in own or not path.startswith(ENGINE):
            assert after[path] == content, path
    assert {path: after[path] for path in after if path.startswith(ENGINE[:3]) and path not in own} == {
        path: content for path, content in new.items() if path.startswith(ENGINE[:3])
    }
    assert after["docs/page.md"] == f"`python -m {NAME} test`\n".encode()
    assert not any(path.endswith(".patch") for path in after)

    resumed = mine.python(*FIT, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert "epoch 2  mean loss " in resumed
    assert "epoch 1 " not in resumed
    quick = ("tests/batchwise/models/test_new.py", "tests/batchwise/optim/test_groups.py")
    assert " passed" in mine.pytest(f"tests/{NAME}/test_points.py", *quick)

    mine.git("stash", "--include-untracked")
    assert mine.contents() == before


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.slow
def test_changes_of_the_engine_are_kept_as_a_patch(template: Any, mine: Any, tagged: bool) -> None:
    if not tagged:
        template.git("tag", "--delete", f"v{OLD}")  # the project's own history knows the old version
    line = line_of_an_epoch(mine)
    name = line.relative_to(mine.root).as_posix()
    edited = line.read_text() + "\n# a line of mine\n"
    write(mine, **{name: edited, "src/batchwise/models/old.py": "VALUE = 7\n", "docs/page.md": "my words\n"})
    (mine.root / "tests/batchwise/test_house.py").unlink()
    write(mine, **{"src/batchwise/models/new.py": "VALUE = 'in the way'\n"})
    mine.commit("changed")
    changed = {name, "docs/page.md", "src/batchwise/models/new.py", "src/batchwise/models/old.py"}
    done = mine.script("upgrade", template.root)
    assert done.returncode == 0, done.stderr
    (listed,) = re.findall(r"files of the engine:\n((?:  .*\n)+)", done.stdout)
    assert set(listed.split()) == {*changed, "tests/batchwise/test_house.py"}
    patch = mine.root / f"batchwise-{OLD}.patch"
    assert f"git apply --3way {patch.name}" in done.stdout
    assert (mine.root / "tests/batchwise/test_house.py").exists()
    assert "mean loss" in line.read_text()
    assert "mine" not in line.read_text()
    mine.commit("upgraded")

    # In the new version: where both have changed a file, git brings both changes together.
    mine.git("apply", "--3way", f"--include={name}", patch)
    assert line.read_text() == edited.replace("average loss", "mean loss")
    # In the old version: nothing was lost.
    mine.git("reset", "--quiet", "--hard", "HEAD~2")
    mine.git("apply", patch_of(mine, patch.name))
    assert line.read_text() == edited
    assert (mine.root / "docs/page.md").read_text() == "my words\n"
    assert (mine.root / "src/batchwise/models/old.py").read_text() == "VALUE = 7\n"
    assert (mine.root / "src/batchwise/models/new.py").read_text() == "VALUE = 'in the way'\n"
    assert not (mine.root / "tests/batchwise/test_house.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_between_two_versions_the_nearest_commit_is_what_has_not_been_changed(copy: Any, ends: str) -> None:
    for patch in copy.root.glob("*.patch"):
        patch.unlink()
    errors, page = copy.root / "src/batchwise/errors.py", copy.root / "docs/faq.md"
    for number in range(3):
        errors.write_text(f"{errors.read_text()}\n# line {number}\n")
        page.write_text(f"`python -m {copy.package} fit`, for the time {number}\n")
        copy.commit(f"change {number}")
        if number == 1:
            project = type(copy)(Path("mine"), copy.root)
    project.script("rename", NAME)
    paths = [project.root / path for path in ("src/batchwise/errors.py", "docs/faq.md", "src/batchwise/host.py")]
    paths[2].write_text(paths[2].read_text() + "# a line of mine\n")
    for path in paths:
        path.write_text(path.read_text(), newline=ends)
    (project.root / "docs/mine.md").write_bytes(b"caf\xe9")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--amend", "--message", "all at once, so that only the source knows what was")
    done = project.script("upgrade", copy.root.as_uri())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"batchwise {OLD} -> {OLD}: 3 files changed, 0 added, 0 removed")
    assert re.findall(r"files of the engine:\n((?:  .*\n)+)", done.stdout) == ["  src/batchwise/host.py\n"]
    assert (project.root / "docs/faq.md").read_text() == f"`python -m {NAME} fit`, for the time 2\n"
    assert (project.root / "docs/mine.md").read_bytes() == b"caf\xe9"
    project.commit("upgraded")
    project.git("apply", "--3way", f"batchwise-{OLD}.patch")
    assert paths[2].read_text().endswith("# a line of mine\n")


def patch_of(mine: Any, name: str) -> Path:
    """Return the patch, from the commit of the upgrade."""
    path = mine.root.parent / name
    path.write_text(mine.git("show", f"HEAD@{{1}}:{name}"))
    return path


@pytest.mark.slow
def test_what_was_left_out_stays_out(template: Any, mine: Any) -> None:
    mine.git("rm", "-r", "--quiet", "tests/batchwise", "scripts/lab", "docs")
    mine.commit("less")
    done = mine.script("upgrade", template.root, "--ref", f"v{NEXT}")
    assert done.returncode == 0, done.stderr
    assert not any((mine.root / place).exists() for place in ("tests/batchwise", "scripts/lab", "docs"))
    assert "You had changed" not in done.stdout
    assert "\ntest it:  python -m pytest\n" in done.stdout
    mine.commit("upgraded")
    again = mine.script("upgrade", template.root)
    assert (again.returncode, again.stdout) == (0, f"batchwise is {NEXT} already, and no file differs\n")
    assert said(mine.script("upgrade", template.root, "--ref", f"v{OLD}")) == (
        f"{OLD} is older than {NEXT}, which you have: write --downgrade to take it"
    )
    back = mine.script("upgrade", template.root, "--ref", f"v{OLD}", "--downgrade")
    assert back.stdout.startswith(f"batchwise {NEXT} -> {OLD}: ")
    mine.commit("downgraded")
    assert mine.git("diff", "HEAD~2") == ""


@pytest.mark.slow
def test_refusals(template: Any, mine: Any) -> None:
    empty = Path("empty").absolute()
    (empty / "src").mkdir(parents=True)
    for source, words in {
        (empty,): f"{empty} is no version of the template: it has no src/batchwise/__init__.py with a __version__",
        (empty, "--ref", "main"): f"{empty} has no tag, branch or commit main: write another --ref",
        (template.root, "--ref", "v8.8.8"): f"{template.root} has no tag, branch or commit v8.8.8: write another --ref",
        ("file:///nowhere",): "file:///nowhere is neither a folder with src/ nor a git repository that can be cloned: "
        "write another",
    }.items():
        assert said(mine.script("upgrade", *source)) == words
    assert mine.git("status", "--porcelain") == ""
    (mine.root / "README.md").write_text("mine")
    assert (
        said(mine.script("upgrade", template.root)) == "the tree has changes (M README.md): commit or undo them first"
    )
    assert mine.git("status", "--porcelain") == " M README.md\n"


@pytest.mark.slow
def test_a_shallow_clone_and_a_source_without_git_are_refused(template: Any, mine: Any) -> None:
    """What is the user's could be neither kept as a patch nor told from what the new version no longer has."""
    root, mine.root = mine.root, Path("shallow").absolute()
    template.call("git", "clone", "--quiet", "--depth", 1, root.as_uri(), mine.root)
    template.call("rm", "-rf", ".git")
    assert said(mine.script("upgrade", template.root)).endswith(": git fetch --unshallow first")
    assert mine.git("status", "--porcelain") == ""
    mine.git("fetch", "--quiet", "--unshallow")
    assert mine.script("upgrade", template.root).returncode == 0
    assert (mine.root / "docs" / "mine.md").exists()


def test_the_changelog_has_this_version() -> None:
    assert (ROOT / "CHANGELOG.md").read_text().count(f"\n## [{OLD}] - ") == 1
