"""Files that would run code, or write where they should not, are refused with one line, and nothing has happened."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import DIGITS, Result, run_here

FIT = ("fit", *DIGITS, "--trainer.max_steps", 2)
OWNED = "owned"
"""The file that an attack makes where it succeeds."""


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {OWNED}",)


def good() -> dict:
    return torch.load("good.ckpt", weights_only=True)


def bomb() -> None:
    torch.save(good() | {"more": Bomb()}, "evil.ckpt")


def bare_pickle() -> None:
    Path("evil.ckpt").write_bytes(pickle.dumps(Bomb()))


def pickle_in_the_old_format() -> None:
    torch.save(good() | {"more": Bomb()}, "evil.ckpt", _use_new_zipfile_serialization=False)


def instantiator() -> None:
    """As Lightning's command line writes it, with another function."""
    torch.save(good() | {"hyper_parameters": {"_instantiator": "os.system", "command": f"touch {OWNED}"}}, "evil.ckpt")


def script() -> None:
    """An archive of TorchScript, which is a program."""
    with zipfile.ZipFile("evil.ckpt", "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(Bomb()))
        archive.writestr("evil/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("evil/version", "3")


def traversing_archive() -> None:
    with zipfile.ZipFile("good.ckpt") as old, zipfile.ZipFile("evil.ckpt", "w") as new:
        for name in old.namelist():
            new.writestr(f"../../{name}", old.read(name))
        new.writestr(f"../{OWNED}", "x")


def traversing_tar() -> None:
    """PyTorch's oldest format, which is unpacked into a folder."""
    with tarfile.open("evil.ckpt", "w") as archive:
        for name in (f"../{OWNED}", "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


ATTACKS = {
    bomb: "cannot be read: it holds code, or objects other than tensors and plain types",
    bare_pickle: "cannot be read: it is a pickle, and not an archive, as torch.save writes it",
    pickle_in_the_old_format: "cannot be read: it is a pickle, and not an archive, as torch.save writes it",
    instantiator: "cannot be read: it names code to run: os.system",
    script: "cannot be read: it holds code",
    traversing_archive: "cannot be read: ",
    traversing_tar: "cannot be read: it is no file that torch.save has written",
}


def refused(result: Result, *words: str) -> None:
    assert result.code == 2, result.out
    (line,) = [line for line in result.err.splitlines() if not line.startswith(("warning:", "note:"))]
    print(line)
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert list(Path.cwd().parent.rglob(f"{OWNED}*")) == []


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.slow
def test_checkpoint(trained: Result, attack: Callable[[], None], verb: str) -> None:
    Path("good.ckpt").write_bytes((trained.folder / "checkpoints" / "last.ckpt").read_bytes())
    attack()
    for weights_only in ("true", "false"):  # that it may be said does not make it so
        settings = ("--ckpt_path", "evil.ckpt", "--weights_only", weights_only)
        refused(run_here(verb, *DIGITS, *settings), "ckpt_path evil.ckpt ", ATTACKS[attack])


@pytest.mark.parametrize(
    "text",
    [
        f"name: !!python/object/apply:os.system ['touch {OWNED}']",
        f"!!python/object/apply:os.system ['touch {OWNED}']",
        f"trainer: !!python/object/new:os.system ['touch {OWNED}']",
    ],
)
def test_configuration_that_would_run_code(text: str) -> None:
    Path("evil.yaml").write_text(text)
    refused(run_here(*FIT, "--config", "evil.yaml"), "--config evil.yaml is not YAML", "python/object")


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("os.system", f"command: touch {OWNED}"),
        pytest.param("posix.system", f"command: touch {OWNED}", marks=pytest.mark.weekly),
        ("subprocess.Popen", f"args: [touch, {OWNED}], shell: true"),
        pytest.param("shutil.rmtree", "path: runs", marks=pytest.mark.weekly),
        pytest.param("pickle.load", "file: evil", marks=pytest.mark.weekly),
        ("torch.load", "f: evil"),
        pytest.param("torch.serialization.load", "f: evil", marks=pytest.mark.weekly),
        pytest.param("torch.hub.load", "repo_or_dir: evil, model: evil", marks=pytest.mark.weekly),
        pytest.param("numpy.load", "file: evil", marks=pytest.mark.weekly),
    ],
)
@pytest.mark.slow
def test_a_configuration_does_not_name_what_runs_code(
    path: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument without a type takes whatever class a configuration names."""
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = ["from torch import nn", "class Net(nn.Linear):", "    def __init__(self, part=None):", "        ..."]
    (tmp_path / "untyped.py").write_text("\n".join(lines))
    part = {"class_path": path, "init_args": yaml.safe_load(f"{{{arguments}}}")}
    for network in ({"class_path": "untyped.Net", "init_args": {"part": part}}, part):
        Path("evil.yaml").write_text(json.dumps({"model": {"init_args": {"network": network}}}))
        line = f"model.network names {path}, which may run any code: a configuration must not"
        refused(run_here(*FIT, "--config", "evil.yaml"), line)


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../b", "/tmp/elsewhere", ""])
@pytest.mark.slow
def test_a_run_stays_in_its_folder(name: str) -> None:
    Path("evil.yaml").write_text(f"name: '{name}'")
    refused(run_here(*FIT, "--config", "evil.yaml"), f"name is '{name}': write the name of a folder")
    assert not Path("../elsewhere").exists()
    assert not Path("/tmp/elsewhere").exists()
