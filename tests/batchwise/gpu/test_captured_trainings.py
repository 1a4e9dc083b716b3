"""Captured steps in trainings of many kinds. Weights, buffers and all rows of the log are those of ordinary steps.

The reference has the same arguments and a callback that listens to steps. For such a callback, steps are ordinary ones.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import parts
import pytest
import small
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.batching.loader import Batch
from batchwise.models.dropout import Dropout
from batchwise.optim.schedule import Schedule
from batchwise.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("capture" not in inspect.signature(Trainer).parameters, reason="Trainer takes no capture"),
]

EPOCHS = 6
"""Some steps of each shape come before its recording, and the last batch of an epoch has a shape of its own."""


@pytest.fixture(autouse=True)
def on_a_cpu_too(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU stands in, there are no graphs, but all else is done: the same steps run in the same way."""
    if device.type == "cpu":
        for module in ("captured", "step"):
            monkeypatch.setattr(f"batchwise.tasks.{module}.DEVICES", ("cpu", "cuda"), raising=False)


class Listens(Callback):
    """The engine takes the longer way for it."""

    def on_train_batch_start(self, *_: Any) -> None: ...


def was_captured(trainer: Any) -> bool:
    return trainer.lightning_module._step.captured.replays > 0


def trained(
    make: Callable[[], small.Task], data: Callable[[], small.Points] = small.Points, listens: bool = False, **more: Any
) -> tuple[small.Task, Any, parts.Rows]:
    """Train with capture; return the task, its trainer and its log."""
    rows, callbacks = parts.Rows(), [*more.pop("callbacks", list)(), *([Listens()] if listens else [])]
    settings = {"max_epochs": EPOCHS, "log_every_n_steps": 4, "limit_val_batches": 0, "capture": "auto"} | more
    task, trainer = small.fit(make(), data(), logger=rows, callbacks=callbacks, **settings)
    return task, trainer, rows


def compare(
    make: Callable[[], small.Task],
    data: Callable[[], small.Points] = small.Points,
    captured: bool = True,
    tolerance: float = 1e-12,
    **settings: Any,
) -> Any:
    """Compare weights, buffers and logs of captured and ordinary steps; return the trainer of the captured ones."""
    theirs, ordinary, expected = trained(make, data, listens=True, **settings)
    ours, trainer, rows = trained(make, data, **settings)
    assert not was_captured(ordinary)
    assert was_captured(trainer) == captured
    assert trainer.global_step == ordinary.global_step > 0
    assert small.furthest(theirs, make()) > 0.05
    assert small.furthest(ours, theirs) < tolerance
    assert len(rows.rows) > 5
    assert parts.far(rows, expected) < 100 * tolerance
    return trainer


def of(*layers: nn.Module, optimizer: Any = small.adamw, kind: Any = small.Classify, **more: Any) -> Any:
    """Return what makes the same task each time; its network has copies of `layers` after its first one."""
    return lambda: kind(parts.mlp(*copy.deepcopy(layers)), optimizer=optimizer, **more)


class Weighted(parts.WithoutMetrics):
    """Targets have weights, some of them none."""

    def losses(self, batch: MicroBatch) -> Any:
        return super().losses(batch), batch.targets.to(batch.inputs) / 2


COSINE = {"schedule": Schedule("cosine", warmup=0.2)}
HALVES = {"data": lambda: small.Points(batch_size=20, micro_batch_size=10)}  # whole ghost batches of 5

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW, schedule": (of(**COSINE), {}),
    "micro-batches of 3": (of(**COSINE), {"data": lambda: small.Points(micro_batch_size=3)}),
    "one example at once": (of(), {"data": lambda: small.Points(micro_batch_size=1)}),
    "pinned": (of(), {"data": lambda: small.Points(micro_batch_size=3, resident_share=0.0)}),
    "SGD with momentum": (of(optimizer=parts.sgd, **COSINE), {}),
    "SGD": (of(optimizer=partial(torch.optim.SGD, lr=0.1)), {}),
    "amsgrad": (of(optimizer=partial(torch.optim.AdamW, lr=0.05, amsgrad=True)), {}),
    "clipping": (of(optimizer=parts.sgd), {"gradient_clip_val": 0.1}),
    "clipping by value": (of(optimizer=parts.sgd), {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "keyed dropout": (of(Dropout(0.3)), {"data": lambda: small.Points(micro_batch_size=3)}),
    "ordinary dropout": (of(nn.Dropout(0.3)), {"data": lambda: small.Points(micro_batch_size=3)}),
    "batch norm": (of(nn.BatchNorm1d(8)), {}),
    "ghost batch norm": (of(nn.BatchNorm1d(8), ghost_batch_size=5), HALVES),
    "weights of targets": (of(kind=Weighted), {}),
    "validation": (of(), {"limit_val_batches": 1.0}),
    "validation within an epoch": (of(), {"limit_val_batches": 1.0, "val_check_interval": 3}),
    "no check": (of(max_skipped_steps=0), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_are_ordinary_ones(name: str, on: dict[str, Any]) -> None:
    make, settings = CASES[name]
    compare(make, **settings, **on)


def test_most_steps_are_captured_and_the_last_batch_of_an_epoch_too(
    on: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 42 steps, 10 have a row in the log, and 3 or 4 of each of the two shapes come before its recording."""
    replayed: list[int] = []
    captured = type(trained(of(), max_epochs=1, **on)[0]._step.captured)
    original = captured.step

    def step(self: Any, task: Any, batch: Batch, *more: Any) -> Any:
        sums = original(self, task, batch, *more)
        if sums is not None:
            replayed.append(sum(map(len, batch.micro_batches)))
        return sums

    monkeypatch.setattr(captured, "step", step)
    _, trainer, _ = trained(of(), **on)
    assert trainer.lightning_module._step.captured.replays == len(replayed)
    assert 20 < len(replayed) < 36
    assert set(replayed) == {10, 4}


def test_without_capture_the_rate_is_not_rounded_but_all_else_is_equal(on: dict[str, Any]) -> None:
    ordinary, plain, _ = trained(of(**COSINE), capture=None, **on)
    ours, trainer, _ = trained(of(**COSINE), **on)
    assert (was_captured(plain), was_captured(trainer)) == (False, True)
    assert small.furthest(ours, ordinary) < 1e-5


@pytest.mark.parametrize("optimizer", [small.adamw, parts.sgd])
def test_a_step_that_is_not_finite_is_skipped(optimizer: Any, on: dict[str, Any], tmp_path: Path) -> None:
    """In epochs whose steps are captured too."""

    def data() -> parts.Points:
        return parts.Points(infinite=[parts.PLANTED])

    texts = []
    make = of(nn.BatchNorm1d(8), optimizer=optimizer, ghost_batch_size=5)
    results = []
    for listens in (True, False):
        folder = tmp_path / str(listens)
        folder.mkdir()
        results.append(trained(make, data, listens, default_root_dir=folder, log_every_n_steps=1000, **on))
        texts.append((folder / "skipped.csv").read_text())
    (theirs, _, expected), (ours, trainer, rows) = results
    assert was_captured(trainer)
    assert texts[0] == texts[1]
    assert [int(line.split(",")[0]) // 7 for line in texts[0].splitlines()] == list(range(EPOCHS))
    assert small.furthest(theirs, make()) > 0.05
    assert small.furthest(ours, theirs) < 1e-12
    assert parts.far(rows, expected) < 1e-10


def test_a_checkpoint_of_ordinary_steps_goes_on_captured(on: dict[str, Any], tmp_path: Path) -> None:
    path = str(tmp_path / "begun.ckpt")
    whole, _, _ = trained(of(), listens=True, **on)
    _, begun, _ = trained(of(), listens=True, max_epochs=2, **on)
    begun.save_checkpoint(path)
    task, trainer = small.fit(
        of()(), ckpt_path=path, max_epochs=EPOCHS, log_every_n_steps=4, limit_val_batches=0, capture="auto", **on
    )
    assert was_captured(trainer)
    assert trainer.global_step == 7 * EPOCHS
    assert small.furthest(task, whole) < 1e-12


def test_a_checkpoint_of_captured_steps_goes_on_in_ordinary_ones(on: dict[str, Any], tmp_path: Path) -> None:
    path = str(tmp_path / "begun.ckpt")
    whole, _, _ = trained(of(), listens=True, **on)
    _, begun, _ = trained(of(), max_epochs=3, **on)
    assert was_captured(begun)
    begun.save_checkpoint(path)
    task, _ = small.fit(
        of()(),
        ckpt_path=path,
        max_epochs=EPOCHS,
        log_every_n_steps=4,
        limit_val_batches=0,
        capture="auto",
        callbacks=[Listens()],
        **on,
    )
    assert small.furthest(task, whole) < 1e-12


def test_the_same_task_can_be_trained_again(on: dict[str, Any]) -> None:
    """A recording is of memory that the next training no longer has."""

    def twice(listens: bool) -> small.Task:
        task = trained(of(), listens=listens, **on)[0]
        return trained(lambda: task, listens=listens, **on)[0]

    ours, theirs = twice(False), twice(True)
    assert small.furthest(ours, theirs) < 1e-12


# What changes during the training


class WithBackbone(small.Classify):
    @property
    def backbone(self) -> nn.Module:
        return self.network[0]  # type: ignore[index]


def test_layers_that_a_callback_thaws(on: dict[str, Any]) -> None:
    make, still = of(kind=WithBackbone), of(kind=WithBackbone)().backbone
    trainer = compare(make, callbacks=lambda: [BackboneFinetuning(2, lambda _: 2.0, backbone_initial_lr=0.01)], **on)
    assert small.furthest(trainer.lightning_module.backbone, still) > 1e-3


class Freezes(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network[0].requires_grad_(trainer.current_epoch != 3)


def test_layers_that_a_callback_freezes_for_an_epoch(on: dict[str, Any]) -> None:
    compare(of(), callbacks=lambda: [Freezes()], **on)


class Factor(parts.WithoutMetrics):
    """Its attribute changes at the start of an epoch."""

    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 + self.trainer.current_epoch

    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * self.factor


def test_an_attribute_that_a_hook_changes(on: dict[str, Any]) -> None:
    compare(of(kind=Factor, optimizer=parts.sgd), **on)


class Clips(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.gradient_clip_val = 0.05 * (1 + trainer.current_epoch)


def test_a_clip_value_that_a_callback_changes(on: dict[str, Any]) -> None:
    compare(of(optimizer=parts.sgd), callbacks=lambda: [Clips()], gradient_clip_val=0.05, **on)


# What must not be captured


class ByStep(parts.WithoutMetrics):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) / (1 + self.global_step)


class Logs(parts.WithoutMetrics):
    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        self.log("own", losses, on_step=True, on_epoch=True)
        return losses


@pytest.mark.parametrize("kind", [ByStep, Logs])
def test_what_the_host_decides_is_not_captured(
    kind: Any, on: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compare(of(kind=kind, optimizer=parts.sgd), captured=False, **on)
    assert "trainer.capture: steps are not captured, because losses" in capsys.readouterr().out
