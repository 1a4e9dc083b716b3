"""Every configuration and every command in README and docs is run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import DIGITS, ROOT, Result, run_here, run_process

from project.batching.plan import BatchPlan

README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
GPU = ("gpu.yaml", "fp16.yaml")
PROCESSES = ("ddp.yaml",)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m project")
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration(path: Path) -> None:
    result = run_here("fit", "--config", path, "--trainer.max_epochs", 1)
    assert result.code == 0, result.err
    assert "epoch 1  average loss " in result.out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_print_config_is_complete(path: Path) -> None:
    printed = run_here("fit", "--config", path, "--print_config")
    assert printed.code == 0, printed.err
    Path("complete.yaml").write_text(printed.out)
    again = run_here("fit", "--config", "complete.yaml", "--print_config")
    assert yaml.safe_load(again.out) == yaml.safe_load(printed.out)


@pytest.mark.parametrize("path", [path for path in OVERLAYS if path.name not in README], ids=lambda path: path.name)
def test_overlay(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no W&B login of whoever runs the tests
    run = run_process if path.name in PROCESSES else run_here
    result = run("fit", *DIGITS, "--config", path, "--trainer.max_epochs", 1)
    if path.name in GPU and not torch.cuda.is_available():
        assert result.code == 2
        assert "gpu" in result.err
        return
    assert result.code == 0, result.err
    assert "epoch 1  average loss " in result.out


def test_classic_prints_its_line() -> None:
    result = run_here("fit", "--config", "configs/classic.yaml", "--trainer.max_epochs", 3)
    lines = [line for line in result.out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert re.fullmatch(r"epoch 3  average loss \d\.\d{4}", lines[2])
    assert float(lines[2].split()[-1]) < float(lines[0].split()[-1])


def test_readme_commands(tmp_path: Path) -> None:
    """In the order of the page, in one folder: later commands use the runs of earlier ones."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    first = run_here("fit", *DIGITS)
    assert first.code == 0
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        arguments = shlex.split(command)[3:]
        result: Result = run_process(*arguments, fresh=True) if "two_cpus" in command else run_here(*arguments)
        assert result.code == 0, f"{command}\n{result.err}"


def test_readme_plan() -> None:
    plan = BatchPlan.derive(
        examples=1259, batch_size=64, micro_batch_size=8, accumulate_grad_batches=None, devices=2
    ).table(400)
    (printed,) = re.findall(r"```\n( +examples.*?)```", README, re.DOTALL)
    rows = dict(line.split() for line in printed.splitlines())
    assert rows == {name: f"{value:,}" for name, value in plan.items()} | {"feeding": "resident"}


def test_readme_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes that README shows train as they stand there."""
    data, task = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "readme_flowers.py").write_text("import numpy as np\n" + data)
    (tmp_path / "readme_regression.py").write_text(
        "import torch.nn.functional as F\nfrom project.tasks.task import Task\n" + task
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flowers").mkdir()
    generator = np.random.default_rng(0)
    for split, examples in (("train", 90), ("val", 30)):
        petals = generator.normal(size=(examples, 4))
        np.save(f"flowers/{split}.npy", np.column_stack([petals, petals[:, 0] > 0]))
    mlp = "{class_path: project.models.mlp.MLP, init_args: {in_features: 4, num_classes: %d}}"
    for kind, outputs in (("project.tasks.classification.Classification", 2), ("readme_regression.Regression", 1)):
        result = run_here(
            "fit", "--data", "readme_flowers.Flowers", "--data.batch_size", 16, "--model", kind,
            "--model.network", mlp % outputs, "--trainer.max_epochs", 20, "--trainer.accelerator", "cpu",
        )  # fmt: skip
        assert result.code == 0, result.err
        losses = [float(loss) for loss in re.findall(r"val/loss ([\d.]+)", result.out)]
        assert losses[-1] < 0.8 * losses[0]


def test_help_does_not_wait_for_lightning() -> None:
    import subprocess
    import sys

    code = "import sys; from project.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in re.findall(r"--([\w.]+)", done.stdout):
        if flag not in ("KEY", "help", "config", "model.optimizer.lr", "data.batch_size", "data.micro_batch_size"):
            assert f"--{flag}" in run_here("fit", "--help").out
