"""The average of the weights where it is not ordinary. (Its values: tests/system/test_techniques.py.)"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from helpers import CSV, DIGITS, run_here
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.ema import EMA, RAW
from batchwise.errors import TrainingStopped
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images.flatten(1)).relu()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_tied_weights_and_half_precision(precision: str) -> None:
    task = Classification(Tied())
    saved = ModelCheckpoint(dirpath=".", filename="end", monitor=None)
    trainer = Trainer(**QUIET, precision=precision, max_epochs=2, callbacks=[EMA(1e5), saved])  # type: ignore[arg-type]
    trainer.fit(task, datamodule=Digits(batch_size=300))
    checkpoint = torch.load("end.ckpt", weights_only=True)
    for part in (checkpoint["state_dict"], checkpoint[RAW]):
        assert torch.equal(part["network.first.weight"], part["network.second.weight"])
    assert checkpoint["state_dict"]["network.head.weight"].dtype == torch.float32
    difference = checkpoint["state_dict"]["network.head.weight"] - checkpoint[RAW]["network.head.weight"].float()
    assert difference.abs().max() > 1e-4
    # Training over, the network is the average.
    assert torch.equal(
        task.network.state_dict()["head.weight"], checkpoint["state_dict"]["network.head.weight"].to(task.dtype)
    )


def test_a_step_that_the_scaler_skips_does_not_count() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    module = SimpleNamespace(
        state_dict=lambda keep_vars: {"weight": weight},
        _step=SimpleNamespace(finite=SimpleNamespace(skipped_in_a_row=0, settle=lambda _: None)),
    )
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    ema = EMA(10)
    ema.on_train_start(trainer, module)  # type: ignore[arg-type]
    counted = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.on_train_batch_end(trainer, module, None, SimpleNamespace(size=5), 0)  # type: ignore[arg-type]
        counted.append(ema.examples)
    assert counted == [5, 5, 10]


def test_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="half_life_examples is 0: write a number above 0"):
        EMA(0)
    trainer = Trainer(**QUIET, max_steps=1, callbacks=[EMA(9), ModelCheckpoint(save_weights_only=True)])
    with pytest.raises(TrainingStopped, match="save_weights_only would not save the average"):
        trainer.fit(Classification(Tied()), datamodule=Digits(batch_size=300))
    for other in (EMAWeightAveraging(), StochasticWeightAveraging(0.1)):
        trainer = Trainer(**QUIET, max_steps=1, callbacks=[EMA(9), other])
        with pytest.raises(TrainingStopped, match=f"EMA and {type(other).__name__}, each of which puts its average"):
            trainer.fit(Classification(Tied()), datamodule=Digits(batch_size=300))


@pytest.mark.slow
def test_test_of_best_measures_the_average() -> None:
    """The command that README gives, with and without the callback in the configuration."""
    average = "{class_path: batchwise.callbacks.ema.EMA, init_args: {half_life_examples: 2000}}"
    averaged = ("--trainer.callbacks", f"[{average}]")
    fit = run_here("fit", *DIGITS, *CSV, *averaged, "--trainer.max_steps", 12, "--trainer.val_check_interval", 4)
    assert fit.code == 0, fit.err
    measured = [run_here("test", *DIGITS, *CSV, *more, "--ckpt_path", "best") for more in (averaged, ())]
    assert measured[0].out == measured[1].out
    best = fit.checkpoint("best")
    raw = best.pop(RAW)
    best["state_dict"] |= raw
    torch.save(best, "raw.ckpt")
    other = run_here("test", *DIGITS, *CSV, "--ckpt_path", "raw.ckpt")
    losses = [float(re.findall(r"test/loss ([\d.]+)", result.out)[0]) for result in (measured[0], other)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert Path("raw.ckpt").exists()


class Waves(nn.Module):
    """Its weights are complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(self.weights) @ self.weights).abs()


def test_complex_weights_train_and_are_averaged() -> None:
    def trained(**sizes: int) -> tuple[Tensor, Tensor]:
        ema, last = EMA(20), []

        class Look(Callback):
            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                last.append(pl_module.network.weights.detach().clone())

        data = small.Points(**sizes)
        data.x[17] = torch.nan
        task, _ = small.fit(small.Classify(Waves(), optimizer=small.adamw), data, callbacks=[ema, Look()])
        return task.network.weights.detach(), last[0]  # pyright: ignore[reportReturnType]

    (average, last), (cut, _) = trained(), trained(micro_batch_size=3)
    assert last.isfinite().all()
    assert (average - last).abs().max() > 1e-3
    assert (average - cut).abs().max() < 1e-12


def test_a_resume_with_nothing_left_to_train_leaves_the_average() -> None:
    whole, _ = small.fit(callbacks=[EMA(20), Last()], enable_checkpointing=True)
    last = "checkpoints/last.ckpt"
    again, _ = small.fit(callbacks=[EMA(20), Last()], enable_checkpointing=True, ckpt_path=last)
    assert small.furthest(again, whole) == 0
