"""`self.log`: against means computed by hand, in any micro-batches, in each logger."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import TWO, Result, run_here, run_process, wandb_records
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small import Classify, Memory, Points, adamw, fit, furthest, network, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from batchwise import MicroBatch
from batchwise.callbacks.checkpoint import Last

STEPS, PER_EPOCH, EVERY = 14, 7, 2
FLAGS = {
    "step": {"on_step": True, "on_epoch": False},
    "epoch": {"on_step": False, "on_epoch": True},
    "both": {"on_step": True, "on_epoch": True},
    "bar": {"prog_bar": True},
}


def values(inputs: Tensor) -> Tensor:
    return inputs.sum(1)


class Logging(Classify):
    """Logs the sum of each example's inputs, from one place, in one way."""

    def __init__(self, place: str, flags: dict[str, Any], scalar: bool = True) -> None:
        super().__init__(network(), optimizer=adamw)
        self.place, self.flags, self.scalar = place, flags, scalar

    def say(self, module: Any, inputs: Tensor) -> None:
        each = values(inputs)
        module.log("sum", each.mean() if self.scalar else each, **self.flags)

    def losses(self, batch: MicroBatch) -> Tensor:
        if self.place == "losses":
            self.say(self, batch.inputs)
        return super().losses(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.place == "task":
            self.say(self, torch.cat([one.inputs for one in batch.micro_batches]))


class Callback(pl.Callback):
    def __init__(self, task: Logging) -> None:
        self.task = task

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.task.place == "callback":
            self.task.say(self, torch.cat([one.inputs for one in batch.micro_batches]))


def expected(data: Points) -> tuple[dict[int, float], dict[int, float]]:
    """By hand: the mean of each batch by the number of steps done, and that of each epoch."""
    assert data.plan is not None
    each = values(data.x)
    steps = {
        step + 1: each[data.order.indices(step // PER_EPOCH, *data.plan.bounds(step))].mean().item()
        for step in range(STEPS)
    }
    return steps, {PER_EPOCH: each.mean().item(), STEPS: each.mean().item()}


def check(found: Any, data: Points, flags: str, name: str = "sum", tolerance: float = 1e-12) -> None:
    """Compare what a logger has with what was computed by hand."""
    steps, epochs = expected(data)
    rows = {step: mean for step, mean in steps.items() if step % EVERY == 0}
    if flags != "epoch":
        assert found(f"{name}_step" if flags == "both" else name) == pytest.approx(rows, abs=tolerance), (name, flags)
    if flags in ("epoch", "both"):
        assert found(f"{name}_epoch" if flags == "both" else name) == pytest.approx(epochs, abs=tolerance), (
            name,
            flags,
        )


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("place", ["losses", "task", "callback"])
@pytest.mark.slow
def test_values_in_the_log(place: str, flags: str, micro_batch_size: int | None) -> None:
    task, data, memory = Logging(place, FLAGS[flags]), Points(micro_batch_size=micro_batch_size), Memory()
    settings: dict[str, Any] = {"log_every_n_steps": EVERY, "limit_val_batches": 0, "max_epochs": 2}
    _, made = fit(task, data, callbacks=[Callback(task)], logger=memory, **settings)
    check(memory.found, data, flags)
    steps, epochs = expected(data)
    last = steps if flags in ("step", "bar") else epochs
    assert made.callback_metrics["sum"].item() == pytest.approx(last[STEPS], abs=1e-12)
    if flags == "bar":
        assert made.progress_bar_metrics["sum"] == pytest.approx(steps[STEPS], abs=1e-12)


@pytest.mark.parametrize("scalar", [False, True])
def test_a_value_per_example(scalar: bool) -> None:
    task, data, memory = Logging("losses", FLAGS["both"], scalar), Points(micro_batch_size=4), Memory()
    fit(task, data, logger=memory, log_every_n_steps=EVERY, limit_val_batches=0, max_epochs=2)
    check(memory.found, data, "both")


@pytest.mark.parametrize("size", [None, 3, 1])
def test_values_of_some_examples(size: int | None) -> None:
    """Each counts once, also where a micro-batch has one of them, or none."""

    class Picked(Classify):
        def losses(self, batch: MicroBatch) -> Tensor:
            self.log("sum", values(batch.inputs)[batch.targets == 1], on_step=False, on_epoch=True)
            return super().losses(batch)

    data, memory = Points(micro_batch_size=size), Memory()
    fit(Picked(network(), optimizer=adamw), data, logger=memory, limit_val_batches=0, max_epochs=1)
    expected = values(data.x)[data.y == 1].mean().item()
    assert [row["sum"] for _, row in memory.rows if "sum" in row] == [pytest.approx(expected, abs=1e-12)]


def test_evaluations_return_what_they_log() -> None:
    task, data = Logging("losses", FLAGS["both"]), Points(eval_batch_size=5)
    made, memory = trainer(logger=Memory()), Memory()
    found = made.validate(task, data, verbose=False)[0]
    assert found["sum_epoch"] == pytest.approx(values(data.x).mean().item(), abs=1e-12)
    assert set(found) == {"val/loss", "val/accuracy", "sum_epoch"}
    assert made.logger is not None
    assert made.logger.rows == [(0, pytest.approx(found, abs=1e-12))]  # type: ignore[attr-defined]
    assert "test/loss" in trainer(logger=memory).test(task, data, verbose=False)[0]


def test_other_reductions() -> None:
    class Extremes(Classify):
        def losses(self, batch: MicroBatch) -> Tensor:
            for reduce in ("min", "max", "sum"):
                each = values(batch.inputs)
                value = getattr(each, reduce)()
                self.log(reduce, value, reduce_fx=reduce, on_step=True, on_epoch=True)
            return super().losses(batch)

    data, memory = Points(micro_batch_size=3), Memory()
    fit(Extremes(network(), optimizer=adamw), data, logger=memory, log_every_n_steps=1, limit_val_batches=0)
    assert data.plan is not None
    for step, row in memory.rows:
        if "sum_step" in row:
            assert step is not None
            batch = values(data.x[data.order.indices((step - 1) // PER_EPOCH, *data.plan.bounds(step - 1))])
            found = [row[f"{name}_step"] for name in ("min", "max", "sum")]
            assert found == pytest.approx([batch.min().item(), batch.max().item(), batch.sum().item()], abs=1e-12)
    whole = values(data.x)
    assert memory.found("min_epoch")[PER_EPOCH] == whole.min().item()
    assert memory.found("sum_epoch")[PER_EPOCH] == pytest.approx(whole.sum().item(), abs=1e-12)


def test_a_batch_that_is_run_again_counts_once() -> None:
    class Full(Logging):
        ran_out = False

        def losses(self, batch: MicroBatch) -> Tensor:
            losses = super().losses(batch)
            if len(batch) > 3 and batch.position > 0 and self.training:
                self.ran_out = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return losses

    data, memory, task = Points(micro_batch_size=5), Memory(), Full("losses", FLAGS["both"])
    fit(task, data, logger=memory, log_every_n_steps=EVERY, limit_val_batches=0, max_epochs=2)
    assert task.ran_out
    check(memory.found, data, "both")


def test_an_epoch_that_is_resumed_counts_whole() -> None:
    data, memory = Points(), Memory()
    fit(
        Logging("losses", FLAGS["both"]),
        data,
        logger=Memory(),
        max_steps=11,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(dirpath=".", filename="here", every_n_train_steps=11)],
    )
    settings: dict[str, Any] = {"log_every_n_steps": EVERY, "limit_val_batches": 0, "max_epochs": 2}
    fit(Logging("losses", FLAGS["both"]), data, "here.ckpt", logger=memory, **settings)
    steps, epochs = expected(data)
    assert memory.found("sum_epoch") == pytest.approx({STEPS: epochs[STEPS]}, abs=1e-12)
    assert memory.found("sum_step") == pytest.approx({step: steps[step] for step in (12, 14)}, abs=1e-12)


class Measured(Classify):
    def __init__(self, only_training: bool, **flags: Any) -> None:
        super().__init__(network(), optimizer=adamw)
        self.hits, self.only_training, self.flags = MulticlassAccuracy(3, average="micro"), only_training, flags

    def losses(self, batch: MicroBatch) -> Tensor:
        if self.training or not self.only_training:
            self.hits(batch.inputs[:, :3].contiguous(), batch.targets)
            self.log("hits", self.hits, **self.flags)
        return super().losses(batch)


def test_metric_objects() -> None:
    memory, data = Memory(), Points(micro_batch_size=3)
    fit(Measured(True, on_step=False, on_epoch=True), data, logger=memory)
    right = (data.x[:, :3].argmax(1) == data.y).double().mean().item()
    assert memory.found("hits") == pytest.approx(dict.fromkeys((7, 14, 21), right), abs=1e-6)
    with pytest.raises(ValueError, match="on_step=False"):
        fit(Measured(True))
    with pytest.raises(ValueError, match="make one for each"):
        fit(Measured(False, on_step=False, on_epoch=True))


def test_a_metric_may_be_a_table_for_callbacks() -> None:
    class Own(Classify):
        def on_fit_start(self) -> None:
            self.confusion = MulticlassConfusionMatrix(3)

        def losses(self, batch: MicroBatch) -> Tensor:
            if not self.training:
                self.confusion.update(self(batch.inputs), batch.targets)
                self.log("confusion", self.confusion, logger=False)
            return super().losses(batch)

    for last in (None, "checkpoints/last.ckpt"):
        settings = {"callbacks": [Last()], "enable_checkpointing": True, "max_epochs": 4 if last else 2}
        _, made = fit(Own(network(), optimizer=adamw), ckpt_path=last, **settings)
        assert made.callback_metrics["confusion"].sum() == 64


def test_callbacks_may_monitor_it() -> None:
    task, data = Logging("losses", FLAGS["epoch"]), Points()
    stop = EarlyStopping("sum", patience=1)
    best = ModelCheckpoint(dirpath=".", monitor="sum", filename="{step}-{sum:.4f}", every_n_train_steps=3)
    _, made = fit(task, data, callbacks=[stop, best], enable_checkpointing=True, max_epochs=9)
    assert made.global_step == 14  # it is the same in each epoch
    assert best.best_model_path


def test_logging_changes_no_weight() -> None:
    plain, _ = fit()
    for place in ("losses", "task"):
        assert furthest(plain, fit(Logging(place, FLAGS["both"]))[0]) == 0


# In each logger, on several devices

MODULE = """
import json
from small import Classify, Memory, Points, network
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
import torch

FLAGS = %s


class Data(Points):
    def __init__(self, batch_size: int = 10, micro_batch_size: int | None = None):
        super().__init__(batch_size=batch_size, micro_batch_size=micro_batch_size)

    def load(self, split):
        return (self.x[:63], self.y[:63]) if split == "val" else (self.x, self.y)


class Everywhere(Classify):
    def __init__(self):
        super().__init__(network(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05))

    def say(self, place, module, batch):
        for name, flags in FLAGS.items():
            module.log(f"{place}/{name}", batch.inputs.sum(1).mean(), **flags)

    def losses(self, batch):
        if self.training:
            self.say("losses", self, batch)
        return super().losses(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        inputs = torch.cat([one.inputs for one in batch.micro_batches])
        for name, flags in FLAGS.items():
            self.log(f"task/{name}", inputs.sum(1).mean(), **flags)

    def on_train_epoch_end(self):
        self.log("end", float(self.global_rank))

    def on_validation_epoch_end(self):
        self.log("rank", float(self.global_rank))


class Monitors(EarlyStopping):
    def __init__(self):
        super().__init__(monitor="end", patience=9)

    def on_train_epoch_end(self, trainer, task):
        seen = [float(trainer.callback_metrics[name]) for name in ("end", "losses/epoch")]
        with open(f"seen{trainer.global_rank}", "a") as file:
            file.write(json.dumps(seen) + chr(10))
        super().on_train_epoch_end(trainer, task)

    def on_validation_end(self, trainer, task):
        with open(f"steps{trainer.global_rank}", "a") as file:
            file.write(f"{float(trainer.callback_metrics['losses/both_step'])}" + chr(10))


class Says(Callback):
    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        inputs = torch.cat([one.inputs for one in batch.micro_batches])
        for _ in range(3):
            trainer.logger.experiment.log({"own": batch_idx})  # W&B's own count of steps moves on
        for name, flags in FLAGS.items():
            self.log(f"callback/{name}", inputs.sum(1).mean(), **flags)
"""


@pytest.fixture
def everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (tmp_path / "own_logs.py").write_text(MODULE % FLAGS)
    here = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_logs", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{here}:{here.parents[1] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "log"}}
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": ".", "name": "tb"}}
    loggers = [{"class_path": "batchwise.run.wandb.WandbLogger"}, csv, board]
    settings = {
        "seed_everything": 0,
        "data": {"class_path": "own_logs.Data"},
        "model": {"class_path": "own_logs.Everywhere"},
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "logger": loggers,
            "callbacks": [{"class_path": "own_logs.Says"}, {"class_path": "own_logs.Monitors"}],
            "log_every_n_steps": EVERY,
            "max_epochs": 2,
        },
    }
    (tmp_path / "logs.yaml").write_text(json.dumps(settings))
    return ("fit", "--config", "logs.yaml")


def in_wandb(run: Result, name: str) -> dict[int, float]:
    found = {}
    for path in run.folder.glob("wandb/*run-*/run-*.wandb"):
        for record in wandb_records(path):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if name in row:
                found[int(row["trainer/global_step"])] = row[name]
    return found


def in_tensorboard(run: Result, name: str) -> dict[int, float]:
    events = EventAccumulator(str(next(run.folder.glob("tb/version_*")))).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.slow
def test_the_newest_step_is_monitored_where_no_row_is_due(everywhere: tuple[object, ...], devices: int) -> None:
    settings = (*everywhere, "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 50)
    run = run_here(*settings) if devices == 1 else run_process(*settings, *TWO, timeout=90)
    assert run.code == 0, run.err
    data = Points()
    fit(None, data, max_epochs=1)  # makes the plan
    steps, _ = expected(data)
    for rank in range(devices):
        seen = [float(line) for line in Path(f"steps{rank}").read_text().split()]
        assert seen == pytest.approx([steps[step] for step in (2, 4, 6, 9, 11, 13)], abs=1e-12)


@pytest.mark.parametrize(
    ("devices", "micro_batch_size"),
    [(1, None), (1, 3), *(pytest.param(2, size, marks=pytest.mark.weekly) for size in (None, 2))],
)
@pytest.mark.slow
def test_every_logger_on_any_devices(
    everywhere: tuple[object, ...], devices: int, micro_batch_size: int | None
) -> None:
    settings = (*everywhere, "--data.micro_batch_size", micro_batch_size or "null")
    run = run_here(*settings) if devices == 1 else run_process(*settings, *TWO, timeout=90)
    assert run.code == 0, run.err
    data = Points()
    fit(None, data, max_epochs=1)  # makes the plan
    for place in ("losses", "task", "callback"):
        for flags in FLAGS:
            name = f"{place}/{flags}"
            check(run.rows, data, flags, name)
            check(lambda name: in_wandb(run, name), data, flags, name)
            check(lambda name: in_tensorboard(run, name), data, flags, name, 1e-6)  # which keeps float32
    # Of 63 examples, the second of two devices has 32.
    assert list(run.rows("rank").values()) == pytest.approx([32 / 63 if devices == 2 else 0] * 2)
    means = [[(devices - 1) / 2, mean] for mean in run.rows("losses/epoch").values()]
    for rank in range(devices):
        seen = [json.loads(line) for line in Path(f"seen{rank}").read_text().splitlines()]
        assert torch.tensor(seen).sub(torch.tensor(means)).abs().max() < 1e-6


def test_the_example_of_the_documents() -> None:
    page = (Path(__file__).parents[3] / "docs" / "callbacks.md").read_text()
    names: dict[str, Any] = {"__name__": "example"}
    exec(page.split("```python\n")[1].split("```")[0], names)
    _, made = fit(names["Confident"](network(), optimizer=adamw))
    assert 1 / 3 < made.callback_metrics["confidence_epoch"] < 1


class SaveAt(pl.Callback):
    """Saves after a step, before the row of the step is written."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [5, 6])
def test_rows_after_a_resume_from_what_a_callback_has_saved(step: int, tmp_path: Path) -> None:
    path, whole, resumed = tmp_path / "saved.ckpt", Memory(), Memory()
    for memory, more in ((whole, {"callbacks": [SaveAt(step, path)]}), (resumed, {"ckpt_path": str(path)})):
        fit(Classify(network(), optimizer=adamw), Points(), logger=memory, log_every_n_steps=3, **more)
    before, after = whole.found("train/loss"), resumed.found("train/loss")
    assert after == pytest.approx({at: value for at, value in before.items() if at > step}, abs=1e-12)
