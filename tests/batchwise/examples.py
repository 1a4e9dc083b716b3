"""The complete files in docs: each is trained for 12 steps in float64, in each way in which a batch can be executed.

As a program it measures how far the ways differ, and prints the table of docs/tasks.md:

    python tests/batchwise/examples.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch.optim import AdamW

from batchwise import DataModule, Task
from batchwise.models.dropout import Dropout
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.tasks.coupled import InfoNCE
from batchwise.trainer import Trainer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("tasks.md", "contrastive.md", "adversarial.md")
STEPS = 12
CLOCKS = ("data_wait", "per_second", "peak_memory")
"""Parts of the names of values that are measured by the clock."""


def files() -> dict[str, str]:
    """Return the complete files that the pages show, by the names that they give them."""
    text = "\n".join((DOCS / page).read_text() for page in PAGES)
    return dict(re.findall(r"`src/\w+/(\w+)\.py`[^`]*?```python\n(.*?)```", text, re.DOTALL))


def load(name: str) -> Any:
    """Return one of them as a module."""
    module = ModuleType(name)
    exec(compile(files()[name], f"{name}.py", "exec"), vars(module))
    return module


adamw = partial(AdamW, lr=0.001)
MAKE: dict[str, Callable[[Any], tuple[Callable[..., Task], type[DataModule]]]] = {
    "vae": lambda file: (partial(file.VAE, file.Autoencoder()), file.Drawings),
    "ink": lambda file: (partial(file.Ink, file.Pixels()), file.Noisy),
    "find": lambda file: (partial(file.Find, file.Grid()), file.Scenes),
    "both": lambda file: (partial(file.Both, file.Heads(), coefficients={"ink": 0.5}), file.Inked),
    "distil": lambda file: (
        partial(file.Distil, teacher=torch.nn.Sequential(MLP(64, 10), Dropout(0.5)), network=MLP(64, 10, (8,))),
        Digits,
    ),
    "forecast": lambda file: (partial(file.Forecast, file.Recurrent()), file.Waves),
    "mixed": lambda file: (partial(Classification, MLP(64, 10, (16,))), file.Mixed),
    "bert": lambda file: (partial(Classification, file.bert(), exact_dropout=True), file.Lines),
    "lora": lambda file: (partial(Classification, file.adapted(), exact_dropout=True), load("bert").Lines),
    "lines": lambda file: (partial(Classification, file.Trigrams()), file.Lines),
    "interval": lambda file: (partial(file.Interval, MLP(10, 3, (16,))), file.Diabetes),
    "gan": lambda file: (partial(file.GAN, file.Networks()), Digits),
    "halves": lambda file: (partial(file.Halves, file.Towers(), loss=InfoNCE(), group_size=50), Digits),
}
"""The class of the task with its network, and the class of the data, by the name of the file."""


class Log(Logger):
    """Keeps all values that are logged, by step and name."""

    name, version = "log", 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if not any(clock in name for clock in CLOCKS)}
        self.values |= {f"{step} {name}": float(value) for name, value in kept.items()}

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None: ...


class StopAfter(Checkpoint):
    """Stops after so many steps, and leaves a checkpoint. Lightning calls it after all other callbacks."""

    def __init__(self, steps: int, path: str) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.step + 1 == self.steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def run_out_of_memory(task: Any, most: int) -> None:
    """Fail in the backward pass of more than `most` examples, as a device does that is out of memory."""
    name = "embed" if hasattr(task, "embed") else "losses"
    compute = getattr(task, name)

    def fail(gradient: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def fails(batch: Any, *player: str) -> Any:
        given = compute(batch, *player)
        first = next(iter(given.values())) if isinstance(given, dict) else given
        first = first[0] if isinstance(first, tuple) else first
        if first.requires_grad and len(batch) > most:
            first.register_hook(fail)
        return given

    object.__setattr__(task, name, fails)  # a task would refuse it


def make(name: str, micro: int | None) -> tuple[Task, DataModule]:
    """Return the task and the data of an example, with the same weights each time."""
    torch.manual_seed(1)
    make_task, make_data = MAKE[name](load(name))
    optimizer: Any = dict.fromkeys(("discriminator", "generator"), adamw) if name == "gan" else adamw
    return make_task(optimizer=optimizer), make_data(batch_size=13, micro_batch_size=micro, seed=0)


def train(name: str, micro: int | None = None, most: int | None = None, **settings: Any) -> dict[str, Any]:
    """Train an example; return its weights, and what it logged.

    Args:
        name: of the file.
        micro: most examples on one device at once.
        most: run out of memory with more examples than this.
        **settings: `stop`, a file for a checkpoint after half of the steps; `resume`, such a file; arguments of the
            trainer.
    """
    (task, data), log = make(name, micro), Log()
    if most is not None:
        run_out_of_memory(task, most)
    stop, resume = settings.pop("stop", None), settings.pop("resume", None)
    trainer = Trainer(
        logger=log,
        log_every_n_steps=1,
        enable_checkpointing=stop is not None,
        enable_progress_bar=False,
        max_epochs=2,
        callbacks=[StopAfter(4, stop)] if stop else [],
        **{"accelerator": "cpu", "precision": "64-true", "limit_train_batches": STEPS // 2} | settings,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return {"weights": task.state_dict(), "log": log.values, "limit": task.data.micro_batch_limit}


def furthest(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the largest difference of a weight, and that of a value that both have logged."""
    weights = max(float((one["weights"][name] - value).abs().max()) for name, value in other["weights"].items())
    logged = max(abs(one["log"][name] - value) for name, value in other["log"].items())
    return weights, logged


def measure(folder: Path, popen: Callable[..., Any] = subprocess.Popen) -> dict[str, dict[str, tuple[float, float]]]:
    """Train each example in each way. Return how far each is from whole batches in one process, by name and way."""
    found, jobs, whole = {}, {}, {}
    for name in MAKE:
        whole[name] = train(name)
        ways = {"micro-batches": train(name, micro=4), "out of memory": train(name, most=6)}
        assert ways["out of memory"]["limit"] == 6
        found[name] = {way: furthest(whole[name], other) for way, other in ways.items()}
        half = str(folder / f"{name}.ckpt")
        train(name, micro=3, stop=half)
        jobs[f"{name}/2 processes"] = {"name": name}
        jobs[f"{name}/2 processes, micro-batches"] = {"name": name, "micro": 4}
        jobs[f"{name}/resumed on 2 processes"] = {"name": name, "resume": half}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        command = [sys.executable, "-m", "examples", str(folder)]
        process = popen(command, stdout=said.fileno(), stderr=said.fileno(), env=environment)
        assert process.wait(300) == 0, (folder / "said").read_text()
    for key, other in torch.load(folder / "results.pt", weights_only=True).items():
        name, way = key.split("/")
        found[name][way] = furthest(whole[name], other)
    return found


def lines_of(name: str) -> int:
    """Return the length of a file."""
    return len(files()[name].splitlines())


def train_on_two(folder: Path) -> None:
    """Train what FOLDER/jobs.json lists on two processes. The first one leaves the results."""
    results = {}
    for key, settings in json.loads((folder / "jobs.json").read_text()).items():
        results[key] = train(**settings, devices=2, strategy="ddp")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(results, folder / "results.pt")


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        train_on_two(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, ways in measure(Path(folder)).items():
            furthest_weight, furthest_value = (max(pair) for pair in zip(*ways.values(), strict=True))
            print(f"{name:10} {lines_of(name):3} lines  {furthest_weight:.0e}  {furthest_value:.0e}")


if __name__ == "__main__":
    main()
