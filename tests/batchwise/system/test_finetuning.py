"""Layers that learn later: by Lightning's callback, and by one of a few lines that is exact on any devices."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn

from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

THAW = """
from lightning.pytorch.callbacks import Callback

class Thaw(Callback):
    def __init__(self, layers: list[int], epoch: int) -> None:
        self.layers, self.epoch = layers, epoch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.current_epoch < self.epoch:
            for layer in self.layers:
                for parameter in pl_module.network.layers[layer].parameters():
                    parameter.grad = None
"""
RUN = (
    *("fit", *DIGITS, *CSV, "--data.batch_size", 200, "--trainer.precision", "64-true", "--trainer.max_epochs", 4),
    *("--trainer.callbacks", "[{class_path: thaw.Thaw, init_args: {layers: [1, 2], epoch: 2}}]"),
    *("--trainer.gradient_clip_val", 0.5, "--model.schedule", "{shape: constant, warmup: 0}"),
)


@pytest.fixture
def thaw(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("thaw.py").write_text(THAW)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    sys.modules.pop("thaw", None)


def fit(*arguments: object, run: Any = run_here, **environment: str) -> Result:
    result = run(*RUN, *arguments, **environment)
    assert result.code == 0, result.err
    return result


@pytest.mark.weekly
@pytest.mark.usefixtures("thaw")
def test_gradients_that_are_dropped_until_an_epoch_are_exact_on_any_devices() -> None:
    """In 4 micro-batches; and on one device until the layers thaw, and on two from there."""
    whole = fit("--name", "whole")
    frozen = fit("--trainer.max_epochs", 2, "--name", "frozen")
    initial = fit("--trainer.max_steps", 1, "--model.optimizer.lr", 0, "--name", "initial")
    layers = ("network.layers.1", "network.layers.2")
    names = [name for name in initial.checkpoint()["state_dict"] if name.startswith(layers)]
    assert len(names) == 3
    for name in names:
        before, held, after = (result.checkpoint()["state_dict"][name] for result in (initial, frozen, whole))
        assert torch.equal(held, before)
        assert (after - before).abs().max() > 1e-3
    four = fit("--trainer.accumulate_grad_batches", 4, "--name", "four")
    two = (*TWO, "--name", "frozen", "--ckpt_path", "last")
    resumed = fit(*two, run=run_process, PYTHONPATH=str(Path.cwd()), OMP_NUM_THREADS="1")
    assert furthest(whole, four) < 1e-12
    assert furthest(whole, resumed) < 1e-12


class Pretrained(Classification):
    @property
    def backbone(self) -> nn.Module:
        return self.network.layers[:2]  # type: ignore[index]


class Spy(Callback):
    """Notes the weights, and the rate of each group, as they are in the last step of each epoch."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.rates: list[list[float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append([parameter.detach().clone() for parameter in pl_module.network.parameters()])
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def backbone(accumulation: int) -> Spy:
    torch.manual_seed(0)
    spy, later = Spy(), BackboneFinetuning(2, lambda epoch: 1.5, backbone_initial_ratio_lr=0.1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=4,
        precision="64-true", accumulate_grad_batches=accumulation, callbacks=[later, spy],
    )  # fmt: skip
    trainer.fit(Pretrained(MLP(64, 10, [32])), datamodule=Digits(batch_size=200, seed=0))
    return spy


def test_the_callback_of_lightning() -> None:
    """It adds a group to the optimizer, whose rate it sets for each epoch."""
    one, four = backbone(1), backbone(4)
    first = [weights[0] for weights in one.weights]
    assert torch.equal(first[0], first[1])
    assert (first[2] - first[1]).abs().max() > 1e-5
    rate = one.rates[0][0]
    assert one.rates == [[rate], [rate], pytest.approx([rate, 0.1 * rate]), pytest.approx([rate, 0.15 * rate])]
    for ours, theirs in zip(one.weights, four.weights, strict=True):
        assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-12


LATER = """
from torch import nn
from batchwise.tasks.classification import Classification

class Pretrained(Classification):
    @property
    def backbone(self):
        return self.network.layers[:2]
"""


@pytest.mark.weekly
def test_the_callback_of_lightning_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP does not know the parameters that were frozen when it wrapped the module."""
    Path("later.py").write_text(LATER)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "later", raising=False)
    callback = (
        "{class_path: lightning.pytorch.callbacks.BackboneFinetuning, init_args: {unfreeze_backbone_at_epoch: 1}}"
    )
    run = (
        *("fit", *DIGITS, *CSV, "--model", "later.Pretrained", "--model.network", "batchwise.models.mlp.MLP"),
        *("--trainer.callbacks", f"[{callback}]"),
        *("--data.batch_size", 200, "--trainer.precision", "64-true", "--trainer.max_epochs", 3),
    )
    one = run_here(*run, "--name", "one")
    two = run_process(*run, *TWO, "--name", "two", PYTHONPATH=str(Path.cwd()), OMP_NUM_THREADS="1")
    assert one.code == two.code == 0, one.err + two.err
    assert furthest(one, two) < 1e-12
