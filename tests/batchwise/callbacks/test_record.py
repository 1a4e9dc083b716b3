"""Speed, waiting and phases: what is in the log and in the closing summary."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from helpers import CSV, DIGITS, Result, run_here
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import Dataset

from batchwise.batching.loader import MicroBatch
from batchwise.callbacks import record
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.phases import Phases
from batchwise.callbacks.summary import Summary
from batchwise.checkpoints import DurableIO
from batchwise.data.module import DataModule
from batchwise.errors import TrainingStopped
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer

FLOPS = 3 * 2 * (64 * 512 + 512 * 10)
"""Per example of the digits, by hand: a multiplication and an addition per weight, and backward twice as many."""


class Slow(Dataset):
    """Examples that take a while to read."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        return torch.full((5,), float(index)), index % 3


class Points(DataModule):
    """Four batches of ten examples an epoch; reading one, or evaluating on ten, may take a while."""

    def __init__(self, reading: float = 0, evaluation: float = 0) -> None:
        super().__init__(batch_size=10, eval_batch_size=10, seed=0)
        self.reading, self.evaluation = reading, evaluation

    def load(self, split: str) -> Dataset:
        return Slow(self.reading if split == "train" else 0)

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        if not training:
            time.sleep(self.evaluation)
        return batch


class Plain(Task):
    def losses(self, batch: MicroBatch) -> Tensor:
        return F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")


class SlowIO(DurableIO):
    def save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        time.sleep(0.1)
        super().save_checkpoint(*arguments, **keywords)


def fit(data: DataModule, *callbacks: Callback, epochs: int = 2, **settings: Any) -> tuple[Phases, Result]:
    """Train; return the clock, and what is in the log: a row at each step."""
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(".", "log"), log_every_n_steps=1, callbacks=[*callbacks],
        enable_progress_bar=False, enable_checkpointing=bool(callbacks), default_root_dir=Path.cwd(), **settings,
    )  # fmt: skip
    try:
        trainer.fit(Plain(nn.Linear(5, 3)), datamodule=data)
    finally:
        result = Result(0, f"run folder: {Path.cwd()}", "")
    return trainer.phases, result


def summary(out: str) -> dict[str, str]:
    """The closing table."""
    lines = out.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("     examples_per_second  "))
    return dict(line.split() for line in lines[begin:] if line.startswith("  "))  # type: ignore[misc]


def test_waiting_for_slow_data_shows() -> None:
    slow, log = fit(Points(reading=0.01))
    waited, rate = log.rows("data_wait"), log.rows("examples_per_second")
    assert len(waited) == 8
    assert all(waited[step] * 10 / rate[step] >= 10 * 0.01 for step in waited)  # in seconds
    assert all(0.5 < share <= 1 for share in waited.values())
    assert slow.seconds["training"] >= 8 * 10 * 0.01


def test_validation_and_checkpoints_are_not_training() -> None:
    begin = time.perf_counter()
    found, log = fit(Points(evaluation=0.05), Last(every_n_steps=2), plugins=SlowIO())
    seconds = found.seconds
    assert seconds["validation"] >= 2 * 4 * 0.05
    assert seconds["checkpoints"] >= 4 * 0.1
    assert seconds["training"] < seconds["validation"] + seconds["checkpoints"]  # eight tiny steps
    assert sum(10 / rate for rate in log.rows("examples_per_second").values()) <= seconds["training"]
    passed = time.perf_counter() - begin
    assert passed - 1 < sum(seconds.values()) - seconds["start"] <= passed
    assert log.rows("examples")[8] == 80


def test_model_flops_by_hand() -> None:
    result = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1)
    rate, flops = result.rows("examples_per_second"), result.rows("model_flops_per_second")
    assert flops.keys() == rate.keys() == set(range(1, 21))
    assert all(flops[step] == pytest.approx(FLOPS * rate[step]) for step in rate)
    assert result.rows("mfu") == {}  # nobody knows the peak of a CPU
    assert " mfu " not in result.out


def test_mfu_of_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "get_available_flops", lambda _, dtype: {torch.float64: 2e9}[dtype])
    result = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.precision", "64-true")
    flops, mfu = result.rows("model_flops_per_second"), result.rows("mfu")
    assert all(mfu[step] == pytest.approx(flops[step] / 2e9) for step in range(1, 21))
    assert float(summary(result.out)["mfu"].rstrip("%")) == pytest.approx(100 * result.rows("summary/mfu")[20], abs=0.1)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-true", torch.float16)])
def test_the_peak_is_of_all_devices_in_the_precision_of_the_run(
    monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(record, "get_available_flops", lambda device, asked: 3e12 if asked is dtype else None)
    trainer: Any = SimpleNamespace(precision=precision, world_size=4, strategy=SimpleNamespace(root_device=None))
    assert record.peak_flops(trainer) == 12e12
    trainer.precision = "transformer-engine"
    assert record.peak_flops(trainer) is None


@pytest.mark.slow
def test_the_summary_is_printed_and_logged_once() -> None:
    result = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 6)
    printed = summary(result.out)
    assert list(printed) == [
        "examples_per_second", "data_wait", "model_flops_per_second", "peak_memory_mib", "start_seconds",
        "training_seconds", "validation_seconds", "checkpoints_seconds", "end_seconds",
    ]  # fmt: skip
    assert sorted(result.rows("train/loss")) == list(range(1, 121))  # those from before the header changed, too
    (seconds,) = result.rows("summary/training_seconds").values()
    rate = result.rows("summary/examples_per_second")
    assert rate == {120: pytest.approx(6 * 1259 / seconds)}
    assert float(printed["examples_per_second"].replace(",", "")) == pytest.approx(rate[120], abs=0.5)
    assert printed["training_seconds"] == f"{seconds:.2f}"
    assert printed["data_wait"] == f"{result.rows('summary/data_wait')[120]:.1%}" != "0.0%"


@pytest.mark.slow
def test_a_resumed_run_counts_from_its_resumption() -> None:
    run = ("fit", *DIGITS, *CSV, "--model.schedule", "{shape: constant, warmup_examples: 600}")
    run_here(*run, "--trainer.max_epochs", 2)
    on = run_here(*run, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    seconds = on.rows("summary/training_seconds")[60]
    assert on.rows("summary/examples_per_second")[60] == pytest.approx(1259 / seconds)
    nothing_left = run_here(*run, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert nothing_left.code == 0, nothing_left.err
    assert "examples_per_second" not in nothing_left.out


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_has_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingStopped):
        fit(Points(), Stop(), Last(), Summary(), plugins=SlowIO())
    assert summary(capsys.readouterr().out)["checkpoints_seconds"].startswith("0.1")
    log = Result(0, f"run folder: {Path.cwd()}", "")
    assert log.rows("summary/examples_per_second").keys() == {3}


@pytest.mark.slow
def test_accuracy_of_the_rows_own_batch_however_it_is_run() -> None:
    common = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.precision", "64-true")
    whole = run_here(*common).rows("train/accuracy")
    assert len(whole) == 20
    assert all(accuracy * 64 == pytest.approx(round(accuracy * 64)) for accuracy in list(whole.values())[:-1])
    assert whole[20] > whole[1]
    assert run_here(*common, "--data.micro_batch_size", 10).rows("train/accuracy") == whole


class Halved(small.Classify):
    """The rate is halved after each step. The loss of one step is not finite."""

    rate: float | Tensor = 1.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"},
        }

    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        return losses * torch.nan if self._own_data is None and self.trainer.global_step == 2 else losses


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)])
def test_a_row_has_rate_and_norm_of_its_step_and_none_of_a_skipped_one(rate: float | Tensor) -> None:
    task, log = Halved(small.network()), small.Memory()
    task.rate = rate
    small.fit(task, logger=[log], log_every_n_steps=1, max_epochs=1)
    assert log.found("learning_rate") == {step: 0.5 ** (step - 1) for step in (1, 2, 4, 5, 6, 7)}
    assert log.found("gradient_norm").keys() == log.found("learning_rate").keys()
