"""Files that cannot be written: one line that names the file, old files kept, and no part of a file."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import DIGITS, Result, run_here

from batchwise.host import check_writable
from batchwise.run import lock
from batchwise.run.folders import choose_folder
from batchwise.run.publishing import check, publish

DATA = (*DIGITS, "--trainer.logger", "false")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file be larger, which a write finds out as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def best(trained: Result) -> tuple[object, ...]:
    return (*DATA, "--ckpt_path", trained.folder / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(
    ("verb", "flag", "name"),
    [
        ("predict", "--predictions", "all/rows.csv"),
        ("predict", "--predictions", "all/rows.parquet"),
        ("export", "--path", "all/model.pt2"),
        pytest.param("export", "--path", "all/model.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_does_not_fit(trained: Result, verb: str, flag: str, name: str) -> None:
    form = ("--format", "onnx") if name.endswith("onnx") else ()
    with disk_of(4000):
        result = run_here(verb, *best(trained), flag, name, *form)
    assert (result.code, result.err) == (1, f"error: cannot write {name} (File too large)\n")
    assert os.listdir("all") == []


def test_an_old_file_is_kept(trained: Result) -> None:
    assert run_here("predict", *best(trained), "--predictions", "./rows.csv").code == 0
    before = Path("rows.csv").read_bytes()
    with disk_of(4000):
        assert run_here("predict", *best(trained), "--predictions", "./rows.csv").code == 1
    assert Path("rows.csv").read_bytes() == before


def test_a_picture_that_does_not_fit() -> None:
    with disk_of(4000):
        result = run_here("inspect", *DATA)
    assert result.code == 1
    line = r"error: cannot write runs/digits/[^/]+/inspect\.png \(File too large\)\n"
    assert re.fullmatch(line, result.err)
    assert os.listdir("runs") == []


def test_what_is_published_is_whole() -> None:
    Path("a.pt2").write_bytes(bytes(5000))
    check("./out/model")
    with disk_of(4000), pytest.raises(OSError, match=r"File too large: 'out/model/a\.pt2'"):
        publish(Path("a.pt2"), Path("none"), {"callbacks": {}}, [], [], "./out/model")
    assert os.listdir("out") == []


def test_a_log_that_cannot_be_written_is_no_traceback(trained: Result) -> None:
    with disk_of(100):
        result = run_here("test", *best(trained), "--trainer.logger", "batchwise.run.wandb.WandbLogger")
    assert result.code == 1
    assert re.fullmatch(r"error: cannot write .*/test\.yaml \(File too large\)\n", result.err)


def test_a_place_where_nothing_can_be_written_is_refused_first(trained: Result) -> None:
    for verb, flag, name in (
        ("predict", "--predictions", "/proc/here/rows.csv"),
        ("export", "--path", "/proc/here/model.pt2"),
        ("export", "--push", "/proc/here/model"),
    ):
        result = run_here(verb, *best(trained), flag, name)
        key = flag.removeprefix("--")
        line = f"error: {key} {name} cannot be written (No such file or directory): write another\n"
        assert (result.code, result.err) == (2, line)
    check_writable("path", Path("new/model.pt2"))
    assert os.listdir("new") == []


def test_a_checkpoint_in_a_folder_where_nothing_can_be_written() -> None:
    with pytest.raises(ValueError, match=r"/proc cannot be written \(.*\): copy the checkpoint to another folder"):
        choose_folder(Path("runs"), "run", Path("/proc/checkpoints/best.ckpt"), restart=False)


def test_a_lock_on_a_full_disk_holds() -> None:
    Path("run/checkpoints").mkdir(parents=True)
    with disk_of(0), lock.alone(Path("run")):
        assert os.listdir("run/checkpoints") == [".lock"]
    assert os.listdir("run/checkpoints") == []
