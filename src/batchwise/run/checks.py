"""Checks before training, so that a mistake costs seconds and one line."""

import math
import os
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from batchwise.checkpoints import data_state, read_checkpoint
from batchwise.data.examples import SPLITS
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, mistakes
from batchwise.host import use
from batchwise.models.frozen import fill_in
from batchwise.models.weights import weight_differences
from batchwise.run.resume import other_examples, training_differences
from batchwise.tasks.task import Task
from batchwise.tasks.trying import note_settings
from batchwise.trainer import Trainer

FORKED = ("cuda",)
"""Kinds of devices that a process cannot use after a fork, if they were used before it."""


def forks(trainer: Trainer) -> bool:
    """Return whether the processes that train are yet to be forked, as in a notebook, so that the GPU must wait."""
    return trainer.strategy.root_device.type in FORKED and getattr(trainer.strategy, "_start_method", "") == "fork"


def check_processes(trainer: pl.Trainer) -> None:
    """Raise Mistake if torchrun or SLURM has started another number of processes than one for each device.

    With one device, each of them would train by itself, into the same folder.
    """
    environment = trainer._accelerator_connector.cluster_environment
    started = trainer.world_size > 1 or not {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"}.isdisjoint(os.environ)
    if not started or not isinstance(environment, TorchElasticEnvironment | SLURMEnvironment):
        return
    total = environment.world_size()
    each = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or total)
    if (trainer.num_devices, trainer.num_nodes) != (each, total // each):
        raise Mistake(
            f"trainer.devices is {trainer.num_devices} and trainer.num_nodes {trainer.num_nodes}, but torchrun or "
            f"SLURM has started {total} processes, {each} on each machine: write --trainer.devices {each} "
            f"--trainer.num_nodes {total // each}"
        )


def load(trainer: Trainer, model: Task, data: DataModule, stage: str, checkpoint: Path | None = None) -> bool:
    """Load the data and make the plan in the first process of each machine; return whether this process is one.

    Raises:
        Mistake: the data cannot be read, or no plan can be made of it.
    """
    data.attach(trainer, model._step.unit)
    data.recall(checkpoint and data_state(checkpoint, data), lenient=True)  # it is compared below
    if trainer.local_rank != 0:
        return False
    if not forks(trainer):
        use(trainer.strategy.root_device)
    with mistakes():
        data.prepare_data()
        data.setup(stage)
        if stage == "fit" and data.plan is None:
            raise ValueError(f"{type(data).__name__}.setup made no plan: write super().setup(stage) at its end")
    return True


def check(
    trainer: Trainer, model: Task, data: DataModule, stage: str, checkpoint: Path | None, config: dict | None
) -> int:
    """Load the data, try the network on it, and compare the checkpoint and the monitors with them.

    Only the first process of each machine does this. It reports a mistake for all processes. Where they are yet to be
    forked, each tries the network by itself, when training begins.

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
        if is_tried := not forks(trainer):
            model.prepare(data, SPLITS[stage][0])
        elif stage == "fit":
            note_settings(model)
        if checkpoint is not None:
            done = _check_checkpoint(checkpoint, trainer, model, data, config, stage)
        if stage == "fit" and is_tried:
            _check_monitors(trainer, model, data)
        if stage == "fit" and data.split("val") is not None:
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


def _check_monitors(trainer: Trainer, model: Task, data: DataModule) -> None:
    for callback in trainer.callbacks:
        usual = isinstance(callback, ModelCheckpoint) and callback.filename == "best"
        strict = getattr(callback, "strict", True) is not False
        if _validates(trainer, data) or (strict and not usual):  # which keeps nothing then
            _check_monitor(trainer, model, data, callback, getattr(callback, "monitor", None))


def check_schedulers(trainer: Trainer, model: Task) -> None:
    """Raise Mistake if a schedule of the user's has no turn, or needs a value that is not measured.

    The optimizers have been made.
    """
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.frequency, int) or config.frequency < 1:
            raise Mistake(
                f"configure_optimizers: frequency is {config.frequency!r}: write a whole number of at least 1"
            )
        if config.reduce_on_plateau and config.strict:
            with mistakes():
                _check_monitor(trainer, model, model.data, config.scheduler, config.monitor)
                _check_turn(trainer, model.data, config)


def _check_turn(trainer: Trainer, data: DataModule, config: Any) -> None:
    """Raise ValueError if a schedule looks for a value of the validation before there has been one."""
    share, epochs = getattr(trainer, "val_check_interval", None), trainer.check_val_every_n_epoch or 1
    if data.plan is None or not (config.monitor or "").startswith("val/") or not isinstance(share, int | float):
        return
    steps = data.plan.steps_per_epoch
    measured = (epochs - 1) * steps + (share if isinstance(share, int) else max(1, int(steps * share)))
    each = steps if config.interval == "epoch" else 1
    if config.frequency * each < measured:
        raise ValueError(
            f"{type(config.scheduler).__name__} looks for '{config.monitor}' after step {config.frequency * each}, but "
            f"it is first measured after step {measured}: write frequency: {math.ceil(measured / each)}, for interval: "
            f"{config.interval}"
        )


def _validates(trainer: Trainer, data: DataModule) -> bool:
    return data.split("val") is not None and trainer.limit_val_batches != 0


def _check_monitor(trainer: Trainer, model: Task, data: DataModule, thing: Any, monitor: str | None) -> None:
    own = ["epoch", "step"] if isinstance(thing, ModelCheckpoint) else []  # which Lightning counts
    if not monitor or monitor in own:
        return
    measured, name = model.metric_names(), type(thing).__name__
    known = measured if _validates(trainer, data) else [one for one in measured if not one.startswith("val/")]
    if monitor in measured and monitor not in known:
        raise ValueError(
            f"{name} monitors '{monitor}', but nothing is validated: write one of {', '.join(known)}, or give it a "
            "validation split (trainer.limit_val_batches above 0)"
        )
    if monitor not in known and not any(map(_logs, [model, *trainer.callbacks])) and not _names_groups(model):
        raise ValueError(f"{name} monitors '{monitor}', which is not measured: write one of {', '.join(known)}")


def _names_groups(model: Task) -> bool:
    """Return whether a user's metric gives a dict, whose names, such as those of groups, depend on the examples."""
    found, metrics = model._measures.found, model._measures.metrics or {}
    own = [name for name, metric in metrics.items() if not type(metric).__module__.startswith("torchmetrics.")]
    return found is not None and any(name not in found for name in own)


def _logs(thing: Any) -> bool:
    """Return whether a user's task or callback logs values in its hooks, whose names are not known before training."""
    own = [kind for kind in type(thing).__mro__ if kind.__module__.split(".")[0] not in ("batchwise", "lightning")]
    methods = [one for kind in own for one in vars(kind).values() if isinstance(one, FunctionType)]
    return any({"log", "log_dict", "record"} & set(method.__code__.co_names) for method in methods)


def _check_checkpoint(
    path: Path, trainer: Trainer, model: Task, data: DataModule, config: dict | None, stage: str
) -> int:
    checkpoint = read_checkpoint(path)
    needed = ("global_step", "epoch", "optimizer_states") if stage == "fit" else ("global_step",)
    if not all(key in checkpoint for key in needed):
        raise ValueError(f"ckpt_path {path} has weights, and no training to go on with: write model.init_from {path}")
    saved = dict(checkpoint["state_dict"])
    try:
        fill_in(model, saved)
    except ValueError as error:
        raise ValueError(f"ckpt_path {path}: {error}") from None
    differences = weight_differences(saved, model.state_dict())
    if differences:
        raise ValueError(f"ckpt_path {path} is of another model: {differences}")
    if stage == "fit":
        epochs, most = checkpoint["epoch"], trainer.max_epochs
        if most is not None and 0 <= most < epochs and trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError("trainer.fast_dev_run is a new training of a few steps: leave ckpt_path out")
        if most is not None and 0 <= most < epochs:
            raise ValueError(f"trainer.max_epochs is {most}, but {path} has trained for {epochs} epochs: write more")
        if config is not None:
            changes = training_differences(checkpoint, config, trainer, model, data)
            if not changes:  # because other settings of the data make other examples
                data.check_recalled(training=True)
                changes = other_examples(checkpoint, data)
            if changes:
                raise ValueError(
                    f"ckpt_path {path} is of a training that differs ({'; '.join(changes)}): write the old values, or "
                    f"{'--force true' if config else 'fit(..., force=True)'} to go on with the new"
                )
    return checkpoint["global_step"]
