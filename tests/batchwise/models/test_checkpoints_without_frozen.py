"""Checkpoints without the parameters that do not learn: smaller, and a resume is the same."""

from pathlib import Path
from typing import Any

import examples
import pytest
import torch
from helpers import CSV, DIGITS, run_here
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from small import Classify, Points, adamw, fit, furthest, trainer
from torch import nn

from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.ema import EMA
from batchwise.errors import TrainingStopped
from batchwise.models.dropout import Dropout
from batchwise.models.frozen import CHECKSUM, checksum
from batchwise.tasks.classification import Classification


class Net(nn.Module):
    """A large first part, which is frozen."""

    def __init__(self, seed: int = 1) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.base = nn.Sequential(nn.Linear(5, 400), nn.BatchNorm1d(400), nn.Tanh(), nn.Linear(400, 8)).double()
        self.head = nn.Sequential(nn.Linear(8, 3), Dropout(0.2)).double()
        self.base.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(inputs))


def task(net: nn.Module | None = None, **settings: Any) -> Classify:
    return Classify(net or Net(), optimizer=adamw, **settings)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("ema", [False, True], ids=["", "ema"])
@pytest.mark.slow
def test_a_resume_is_the_same_without_the_frozen_parameters(ema: bool, tmp_path: Path) -> None:
    def extra() -> list[Any]:
        return [Last(), *([EMA(half_life_examples=20)] if ema else [])]

    sizes, states = [], []
    for keep in (True, False):
        whole, _ = fit(task(save_frozen=keep), max_epochs=3, callbacks=extra(), enable_checkpointing=True)
        last = tmp_path / "checkpoints" / "last.ckpt"
        states.append(saved(last)["state_dict"])
        sizes.append(last.stat().st_size)
        fit(task(save_frozen=keep), max_steps=10, callbacks=extra(), enable_checkpointing=True)
        again, _ = fit(
            task(save_frozen=keep), Points(), str(last), max_epochs=3, callbacks=extra(), enable_checkpointing=True
        )
        assert furthest(again, whole) < 1e-12
        values = [trainer().test(task(save_frozen=keep), Points(), str(last), verbose=False)[0] for _ in range(2)]
        assert values[0] == values[1]
    full, light = states
    assert set(full) - set(light) == {f"network.base.{name}" for name, _ in Net().base.named_parameters()}
    assert {name: value for name, value in light.items() if name != CHECKSUM}.keys() <= full.keys()
    assert all(torch.equal(light[name], full[name]) for name in light if name != CHECKSUM)
    # The running statistics change, so they are there.
    assert "network.base.1.running_mean" in light
    assert sizes[1] < sizes[0] * (0.5 if not ema else 0.4)


def test_what_was_thawed_meanwhile_is_saved(tmp_path: Path) -> None:
    class Backbone(Net):
        def __init__(self) -> None:
            super().__init__()
            self.base.requires_grad_(True)

    class Thawing(Classify):
        @property
        def backbone(self) -> Any:
            return self.network.base

    def made() -> tuple[Any, dict[str, Any]]:
        thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, train_bn=False)
        settings = {"callbacks": [Last(), thaw], "enable_checkpointing": True}
        return Thawing(Backbone(), optimizer=adamw, save_frozen=False), settings

    whole, settings = made()
    fit(whole, **settings, max_epochs=3)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    for steps in (5, 10):
        part, settings = made()
        fit(part, **settings, max_steps=steps)
        assert ("network.base.0.weight" in saved(Path(last))["state_dict"]) == (steps == 10)
        again, settings = made()
        fit(again, None, last, **settings, max_epochs=3)
        assert furthest(again, whole) < 1e-12


class FreezesLater(Callback):
    """Freezes a part of the head that has learnt until then."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= 3:
            pl_module.network.head[0].bias.requires_grad_(False)


def test_what_has_learnt_is_saved_also_where_it_is_frozen_later(tmp_path: Path) -> None:
    def settings(steps: int) -> dict[str, Any]:
        return {"callbacks": [Last(), FreezesLater()], "enable_checkpointing": True, "max_steps": steps}

    whole, _ = fit(task(save_frozen=False), **settings(12))
    last = tmp_path / "checkpoints" / "last.ckpt"
    again, _ = fit(task(save_frozen=False), **settings(5))
    for steps in (9, 12):
        again, _ = fit(task(save_frozen=False), None, str(last), **settings(steps))
        names = saved(last)["state_dict"]
        assert "network.head.0.bias" in names
        assert "network.base.0.weight" not in names
    assert furthest(again, whole) < 1e-12


def test_another_network_is_refused(tmp_path: Path) -> None:
    fit(task(save_frozen=False), max_steps=3, callbacks=[Last()], enable_checkpointing=True)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"those of this network are others: make it from the same weights \(model"):
        trainer().test(task(Net(seed=2)), Points(), last, verbose=False)
    deeper = Net()
    deeper.base.append(nn.Linear(8, 8).double())
    with pytest.raises(ValueError, match=r"leaves out 6,408 values that did not learn, and of this network 6,480 are"):
        trainer().test(task(deeper), Points(), last, verbose=False)
    (values,) = trainer().test(task(Net()), Points(), last, verbose=False)
    assert set(values) == {"test/loss", "test/accuracy"}


def test_what_changes_without_learning_is_not_lost() -> None:
    class Teacher(Classify):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.network.base[0].weight.mul_(0.99)  # type: ignore[union-attr, operator]

    settings: dict[str, Any] = {"max_steps": 3, "callbacks": [Last()], "enable_checkpointing": True}
    with pytest.raises(
        TrainingStopped, match=r"parameters that do not learn have changed, and would be lost: leave it"
    ):
        fit(Teacher(Net(), optimizer=adamw, save_frozen=False), **settings)
    fit(Teacher(Net(), optimizer=adamw), **settings)


def test_the_checksum_is_that_of_all_bits() -> None:
    values = [torch.randn(3, 4), torch.arange(5.0).bfloat16(), torch.ones(2, dtype=torch.float64)]
    right = checksum(values)
    assert right.tolist()[:2] == [19, 48 + 10 + 16]
    for changed in (0, 1, 2):
        others = [value.clone() for value in values]
        others[changed].view(-1)[0] += 1
        assert checksum(others)[2] != right[2]
    for moved in ([values[0].flip(0), *values[1:]], [-values[0], *values[1:]], [values[1], values[0], values[2]]):
        assert checksum(moved)[2] != right[2]
    apart = values[0].T.contiguous().T  # whatever the layout in memory
    assert torch.equal(checksum([apart, *values[1:]]), right)
    long = torch.arange(2**20 + 3, dtype=torch.float32)
    assert torch.equal(checksum([long]), checksum(long.split(2**19 + 1)))
    assert checksum([]).tolist() == [0, 0, 0]


@pytest.mark.slow
def test_adapters_of_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora, data = examples.load("lora"), examples.load("bert").Lines

    def made() -> tuple[Any, Any]:
        torch.manual_seed(1)
        return Classification(lora.adapted(), optimizer=adamw, exact_dropout=True, save_frozen=False), data(
            batch_size=13
        )

    settings: dict[str, Any] = {"callbacks": [Last()], "enable_checkpointing": True}
    whole, _ = fit(*made(), max_steps=6, limit_val_batches=1, **settings)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.stat().st_size < 60_000
    weights = saved(last)["state_dict"]
    assert all(".lora_" in name or ".modules_to_save." in name for name in weights if name != CHECKSUM)
    fit(*made(), max_steps=3, limit_val_batches=1, **settings)
    again, _ = fit(*made(), str(last), max_steps=6, limit_val_batches=1, **settings)
    assert furthest(again, whole) == 0


@pytest.mark.weekly
def test_on_the_command_line() -> None:
    small = (*DIGITS, *CSV, "--model.network.hidden_features", "[64]", "--model.schedule", "{shape: constant}")
    first = run_here("fit", *small, "--trainer.max_steps", 3, "--name", "first")
    assert first.code == 0, first.err
    source = str(first.folder / "checkpoints" / "last.ckpt")
    fine = (*small, "--model.init_from", source, "--model.freeze", "['layers.1']", "--model.save_frozen", "false")
    whole = run_here("fit", *fine, "--name", "whole", "--trainer.max_steps", 6)
    assert whole.code == 0, whole.err
    assert "trainable_parameters  778" in whole.out
    state = whole.checkpoint()["state_dict"]
    assert not any(name.startswith("network.layers.1.") for name in state)
    run_here("fit", *fine, "--name", "parts", "--trainer.max_steps", 3)
    again = run_here("fit", *fine, "--name", "parts", "--trainer.max_steps", 6, "--ckpt_path", "last")
    assert again.code == 0, again.err
    assert all(torch.equal(again.checkpoint()["state_dict"][name], value) for name, value in state.items())
    tested = run_here("test", *fine, "--name", "whole", "--ckpt_path", "last")
    assert tested.code == 0, tested.err
    other = run_here("test", *fine[:-6], "--name", "whole", "--ckpt_path", "last")  # without the weights it began with
    assert other.code == 2
    (line,) = (line for line in other.err.splitlines() if line.startswith("error:"))
    assert "the parameters that did not learn, and those of this network are others" in line
