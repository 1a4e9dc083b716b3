"""Checks before training, so that a mistake costs seconds and one line."""

from pathlib import Path
from types import FunctionType
from typing import Any

from batchwise.callbacks.ema import EMA
from batchwise.checkpoints import data_state, read_checkpoint
from batchwise.data.examples import SPLITS
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, mistakes
from batchwise.models.frozen import fill_in
from batchwise.models.weights import weight_differences
from batchwise.run.resume import clipping_of, training_differences
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer


def load(trainer: Trainer, model: Task, data: DataModule, stage: str, checkpoint: Path | None = None) -> bool:
    """Load the data and make the plan in the first process of each machine; return whether this process is one.

    Raises:
        Mistake: the data cannot be read, or no plan can be made of it.
    """
    data.attach(trainer, model._step.unit)
    data.recall(checkpoint and data_state(checkpoint, data))
    if trainer.local_rank != 0:
        return False
    with mistakes():
        data.prepare_data()
        data.setup(stage)
    return True


def check(
    trainer: Trainer, model: Task, data: DataModule, stage: str, checkpoint: Path | None, config: dict | None
) -> int:
    """Load the data, try the network on it, and compare the checkpoint and the monitors with them.

    Only the first process of each machine does this. It reports a mistake for all processes.

    Args:
        trainer: has the callbacks whose monitors are checked.
        model: tried on the first examples.
        data: has the examples.
        stage: fit, validate, test or predict.
        checkpoint: the file that the run starts from; None: it starts afresh.
        config: the configuration of this training, if the checkpoint must be of the same one; empty: it has none.

    Returns:
        The optimizer steps that the checkpoint has done.

    Raises:
        Mistake: something is wrong.
    """
    if not load(trainer, model, data, stage, checkpoint):
        return 0
    done = 0
    with mistakes():
        model.prepare(data, SPLITS[stage][0])
        if checkpoint is not None:
            done = _check_checkpoint(checkpoint, trainer, model, data, config)
        if stage == "fit" and data.split("val") is not None:
            _check_monitors(trainer, model)
            _check_interval(trainer, data)
    return done


def _check_interval(trainer: Trainer, data: DataModule) -> None:
    every, epochs = getattr(trainer, "val_check_interval", None), trainer.check_val_every_n_epoch  # None: a time
    steps = data.plan.steps_per_epoch if data.plan else 0
    if isinstance(every, int) and epochs is not None and every > steps > 0:
        raise Mistake(
            f"trainer.val_check_interval is {every:,}, but an epoch has {steps:,} steps: write at most that, or "
            "trainer.check_val_every_n_epoch null, which counts on over epochs"
        )


def _check_monitors(trainer: Trainer, model: Task) -> None:
    for callback in trainer.callbacks:
        _check_monitor(trainer, model, type(callback).__name__, getattr(callback, "monitor", None))


def check_schedulers(trainer: Trainer, model: Task) -> None:
    """Raise Mistake if a schedule of the user's needs a value that is not measured. The optimizers have been made."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict:
            with mistakes():
                _check_monitor(trainer, model, type(config.scheduler).__name__, config.monitor)


def _check_monitor(trainer: Trainer, model: Task, name: str, monitor: str | None) -> None:
    known = model.metric_names()
    if monitor and monitor not in known and not any(map(_logs, [model, *trainer.callbacks])):
        raise ValueError(f"{name} monitors '{monitor}', which is not measured: write one of {', '.join(known)}")


def _logs(thing: Any) -> bool:
    """Return whether a user's task or callback logs values in its hooks, whose names are not known before training."""
    own = [kind for kind in type(thing).__mro__ if kind.__module__.split(".")[0] not in ("batchwise", "lightning")]
    methods = [one for kind in own for one in vars(kind).values() if isinstance(one, FunctionType)]
    return any({"log", "log_dict"} & set(method.__code__.co_names) for method in methods)


def _check_checkpoint(path: Path, trainer: Trainer, model: Task, data: DataModule, config: dict | None) -> int:
    checkpoint = read_checkpoint(path)
    saved = dict(checkpoint["state_dict"])
    try:
        fill_in(model, saved)
    except ValueError as error:
        raise ValueError(f"ckpt_path {path}: {error}") from None
    differences = weight_differences(saved, model.state_dict())
    if differences:
        raise ValueError(f"ckpt_path {path} is of another model: {differences}")
    if config is not None:
        epochs, most = checkpoint["epoch"], trainer.max_epochs
        if most is not None and 0 <= most < epochs:
            raise ValueError(f"trainer.max_epochs is {most}, but {path} has trained for {epochs} epochs: write more")
        half_life = next((callback.half_life for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        others = data.fingerprint(), half_life, clipping_of(trainer)
        changes = training_differences(checkpoint, config, type(data).__qualname__, *others)
        if changes:
            raise ValueError(
                f"ckpt_path {path} is of a training that differs ({'; '.join(changes)}): write the old values, or "
                f"{'--force true' if config else 'fit(..., force=True)'} to go on with the new"
            )
    return checkpoint["global_step"]
