"""Short trainings of a copy, in this process. The task and the data of the caller stay as they were."""

import contextlib
import copy
import io
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from batchwise.batching.schedule import BatchSizes
from batchwise.data.module import DataModule
from batchwise.tasks.task import Task


class NoPlateau(Callback):
    """Leaves `ReduceLROnPlateau` out: a short training has no plateau, and validates at other times than the whole."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let its turn never come."""
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:
                config.frequency = NEVER


def train(
    trainer: pl.Trainer, task: Task, data: DataModule, steps: int, callbacks: list[Callback], validate: float = 0
) -> None:
    """Train for some steps like a trainer, on its devices and in its precision and memory format; print nothing.

    Args:
        trainer: stays as it is.
        task: is trained, so give a copy.
        data: has the examples; see `resized`.
        steps: the most optimizer steps.
        callbacks: all callbacks of the training.
        validate: on what to validate, as `limit_val_batches` says it (0: do not, 1.0: on all), after each step for
            which a callback sets the trainer's `val_check_batch` to 1.
    """
    kind = trainer.strategy.root_device.type
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        short = type(trainer)(
            max_steps=steps,
            accelerator=kind,
            devices=trainer.num_devices if kind == "cpu" else trainer.device_ids,
            num_nodes=trainer.num_nodes,
            strategy="ddp" if trainer.world_size > 1 else "auto",
            precision=trainer.precision,  # type: ignore[arg-type]
            channels_last=getattr(trainer, "channels_last", False),  # type: ignore[call-arg]
            compile=getattr(trainer, "compile", False),  # type: ignore[call-arg]
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            callbacks=[*callbacks, NoPlateau()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=validate,
            check_val_every_n_epoch=None,
            val_check_interval=NEVER,
            default_root_dir=folder,
        )
        short.fit(task, datamodule=data)


def resized(data: DataModule, batch_size: int, micro_batch_size: int | None) -> DataModule:
    """Return a copy of a data module with other sizes, that shares the examples."""
    other = copy.copy(data)
    other.batch_size, other.micro_batch_size = batch_size, micro_batch_size
    other.batch_tokens = other.micro_batch_tokens = None
    other.batch_size_schedule = BatchSizes()
    other.order = copy.copy(data.order)
    other.attach(None)
    return other


NEVER = 2**62  # a number of steps that no training has
