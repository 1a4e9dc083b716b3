"""Every configuration and every command in README and docs is run."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import DIGITS, ROOT, Result, make_cifar10, run_here, run_process
from PIL import Image

from batchwise.batching.plan import BatchPlan

README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
GPU = ("gpu.yaml", "fp16.yaml")
PROCESSES = ("ddp.yaml", "fsdp.yaml")
FEW = {
    "cifar10.yaml": ("--data.val_examples", 10),
    "text.yaml": ("--trainer.limit_train_batches", 4, "--trainer.limit_val_batches", 2, "--model.sample_length", 20),
}
"""What makes a run as short as a test has to be."""
COMMANDS = {
    section.partition("\n")[0]: [
        line
        for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
        if line.startswith(("python -m project", "python scripts/"))
    ]
    for section in re.split(r"^#+ ", PAGES, flags=re.MULTILINE)
}
COMMANDS = {section: commands for section, commands in COMMANDS.items() if commands}
SCRIPTS = {"folder.yaml": "make_folder.py", "table.yaml": "make_table.py"}
"""What makes the data of a configuration."""


def run_script(name: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration(path: Path) -> None:
    make_cifar10(Path("data/cifar10"))  # tiny, and random
    if path.name == "transfer.yaml":  # which begins with the weights of a run
        assert run_here("fit", *DIGITS, "--name", "pretrain", "--trainer.max_epochs", 1).code == 0
    if path.name in SCRIPTS:
        run_script(SCRIPTS[path.name])
    result = run_here("fit", "--config", path, "--trainer.max_epochs", 1, *FEW.get(path.name, ()))
    assert result.code == 0, result.err
    assert "epoch 1  average loss " in result.out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_print_config_is_complete(path: Path) -> None:
    printed = run_here("fit", "--config", path, "--print_config")
    assert printed.code == 0, printed.err
    Path("complete.yaml").write_text(printed.out)
    again = run_here("fit", "--config", "complete.yaml", "--print_config")
    assert yaml.safe_load(again.out) == yaml.safe_load(printed.out)


@pytest.mark.parametrize(
    "path", [path for path in OVERLAYS if path.name not in str(COMMANDS)], ids=lambda path: path.name
)
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


def test_there_are_commands() -> None:
    assert sum(map(len, COMMANDS.values())) >= 20


@pytest.mark.parametrize("section", COMMANDS)
def test_readme_commands(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the section, in one folder, after README's first command: later ones use the runs of earlier."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(str(tmp_path))
    own_data()
    first = run_here("fit", *DIGITS)
    assert first.code == 0
    for command in COMMANDS[section]:
        if command.startswith("python scripts/"):
            run_script(Path(command).name)
            continue
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


def own_data() -> None:
    """What the commands of "Your own data" speak of."""
    generator = np.random.default_rng(0)
    for label, level in (("cat", 50), ("dog", 200)):
        folder = Path("photos", label)
        folder.mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(level, level + 50, (40, 30 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    rows = [f"{number},{number % 7},{'abc'[number % 3]},{('no', 'yes')[number % 2]}" for number in range(40)]
    Path("houses.csv").write_text("\n".join(["area,rooms,town,sold", *rows]))
    Path("flowers").mkdir()
    for split, examples in (("train", 90), ("val", 30), ("test", 30)):
        sizes = generator.normal(50, 10, size=(examples, 4))
        np.save(f"flowers/{split}.npy", np.column_stack([sizes, (sizes[:, 0] > 50) + (sizes[:, 1] > 50)]))
    data, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(data.splitlines()) <= 25
    Path("flowers.py").write_text(data)


def test_readme_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes that README shows train as they stand there."""
    _, task = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    own_data()
    Path("readme_regression.py").write_text(
        "import torch.nn.functional as F\nfrom batchwise.tasks.task import Task\n" + task
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("flowers", None)
    mlp = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: 4, num_classes: %d}}"
    for kind, outputs in (("batchwise.tasks.classification.Classification", 3), ("readme_regression.Regression", 1)):
        result = run_here(
            "fit", "--data", "flowers.Flowers", "--data.batch_size", 16, "--model", kind,
            "--model.network", mlp % outputs, "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.01,
            "--trainer.max_epochs", 20, "--trainer.accelerator", "cpu",
        )  # fmt: skip
        assert result.code == 0, result.err
        losses = [float(loss) for loss in re.findall(r"val/loss ([\d.]+)", result.out)]
        assert losses[-1] < 0.8 * losses[0]


def test_table_of_numbers() -> None:
    """What the comments of table.yaml say for a number in place of a class."""
    run_script("make_table.py")
    text = (ROOT / "configs" / "table.yaml").read_text()
    text, count = re.subn(r"^(\s+\w+: )\S+(\s+#.*number: (\S+))$", r"\1\3\2", text, flags=re.MULTILINE)
    assert count == 6
    Path("number.yaml").write_text(text)
    result = run_here("fit", "--config", "number.yaml", "--trainer.max_epochs", 15)
    assert result.code == 0, result.err
    assert max(float(value) for value in re.findall(r"val/r2 (-?[\d.]+)", result.out)) > 0.35


def test_help_does_not_wait_for_lightning() -> None:
    import subprocess
    import sys

    code = "import sys; from batchwise.run.main import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in re.findall(r"--([\w.]+)", done.stdout):
        if flag not in ("KEY", "help", "config", "model.optimizer.lr", "data.batch_size", "data.micro_batch_size"):
            assert f"--{flag}" in run_here("fit", "--help").out
