"""Run folders that were renamed, copied or moved between two commands."""

import shutil
from pathlib import Path

import torch
from helpers import DIGITS, run_here

from batchwise.run.resume import choose_checkpoint

FIRST, SECOND = "2026-11-26_07-37-40", "2026-11-26_08-00-00"


def run(name: str) -> Path:
    """A run's folder with both checkpoints."""
    for which in ("last", "best"):
        path = Path("runs/digits", name, "checkpoints", f"{which}.ckpt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}}, path)
    return path


def newest(which: str = "last") -> str:
    path = choose_checkpoint(which, Path("runs"), "digits", "test")
    assert path is not None
    return path.parents[1].name


def test_a_folder_that_was_renamed_or_copied_is_not_the_newest_run() -> None:
    """`baseline` comes after all numbers in the alphabet, and a copy after what it is a copy of."""
    for name in (FIRST, SECOND, "baseline", f"{SECOND}_backup", f"{SECOND} (copy)"):
        run(name)
    assert newest("last") == newest("best") == SECOND
    shutil.rmtree(f"runs/digits/{SECOND}")
    assert newest() == FIRST
    shutil.rmtree(f"runs/digits/{FIRST}")
    assert newest() == "baseline"  # of those that were put aside, the last by name


def test_the_tenth_run_of_a_second_is_newer_than_its_second_one() -> None:
    for name in (FIRST, f"{FIRST}_2", f"{FIRST}_10"):
        run(name)
    assert newest() == f"{FIRST}_10"


def test_any_name_of_a_folder_has_a_log_in_wandb() -> None:
    """W&B refuses an id with commas and the like, and the log was lost."""
    result = run_here("fit", *DIGITS, "--trainer.max_steps", 1, "--name", "it's #1: lr=0.1, wd?")
    assert result.code == 0, result.err
    assert "W&B" not in result.out
    (log,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    assert log.name == f"run-it-s-1-lr=0.1-wd--{result.folder.name}.wandb"
