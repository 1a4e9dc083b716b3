"""The sweep that W&B spreads over machines: `configs/sweeps/wandb.yaml`."""

import shlex
from pathlib import Path

import pytest
import yaml
from helpers import CSV, ROOT, run_here

from batchwise.choosing import trials


def test_the_sweep_for_wandb_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent runs the command once for each point of the grid; here one of them is run, without an account."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    definition = yaml.safe_load((ROOT / "configs/sweeps/wandb.yaml").read_text())
    assert definition["method"] == "grid"
    point = [f"--{key}={values['values'][-1]}" for key, values in definition["parameters"].items()]
    command = [part for word in definition["command"] for part in (point if word == "${args}" else [word])]
    assert shlex.join(command[:4]) == "'${env}' python -m project"
    arguments = [argument.replace("=configs", f"={ROOT}/configs") for argument in command[4:]]
    result = run_here(*arguments, "--trainer.max_epochs=1", *CSV[:2])
    assert result.code == 0, shlex.join(arguments) + result.err
    (only,) = trials.read(Path("runs/digits/sweep.csv"))
    grid = {key: values["values"] for key, values in definition["parameters"].items()}
    assert (only.batch_size, only.factor) == (grid["batch_sizes"][-1], grid["rates"][-1])
    assert only.seed == grid["seed_everything"][-1]
    assert definition["metric"]["name"].removeprefix("sweep/") in trials.Run.__dataclass_fields__
