"""The command that README gives for `sweep`, and the sweep that W&B spreads over machines."""

import re
import shlex
import time
from pathlib import Path

import pytest
import yaml
from helpers import CSV, ROOT, run_here, wandb_records

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


def test_the_command_of_readme_with_the_log_of_wandb() -> None:
    """In a small form: the whole grid takes a minute."""
    (line,) = re.findall(r"^python -m project (sweep .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    result = run_here(*shlex.split(line), "--batch_sizes", 256, "--seeds", 1, "--rates", 1)
    assert result.code == 0, result.err
    assert "upload it:  wandb sync" in result.out
    (only,) = trials.read(Path("runs/digits/sweep.csv"))
    (log,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    logged: dict[str, str] = {}
    for _ in range(100):  # wandb's own process writes it
        items = [(item.nested_key or [item.key], item.value_json) for record in wandb_records(log)
                 for item in record.history.item]  # fmt: skip
        logged = {key[0]: value for key, value in items}
        if "sweep/picture" in logged:
            break
        time.sleep(0.1)
    assert float(logged["sweep/examples"]) == only.examples
    assert "sweep/picture" in logged
