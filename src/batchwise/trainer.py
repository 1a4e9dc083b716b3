"""Lightning's Trainer, with the loop and the defaults that an exact global batch needs."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import _PLUGIN_INPUT, CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from batchwise import host
from batchwise.arguments import taken, typed
from batchwise.callbacks.adding import AddUp
from batchwise.callbacks.phases import Phases
from batchwise.callbacks.pictures import Pictures
from batchwise.callbacks.record import Record
from batchwise.callbacks.recorder import Recorder
from batchwise.callbacks.samples import Samples
from batchwise.checkpoints import DurableIO, data_state
from batchwise.data.module import DataModule
from batchwise.errors import Mistake
from batchwise.loop import EpochLoop
from batchwise.ranges import PositiveInt
from batchwise.tasks.configured import UNREADABLE, refuse_unknown_keys, wrong_optimizers
from batchwise.tasks.logs import Connector, Results

REFUSED = {
    "overfit_batches": ", and write trainer.limit_train_batches, with data.order batchwise.batching.order.Sequential",
    "barebones": ", and write trainer.logger, enable_checkpointing and enable_progress_bar false",
    "model_registry": ", and write trainer.logger.log_model, which keeps checkpoints in W&B",
    "use_distributed_sampler": ", because the data module cuts the batches",
}
"""Arguments of Lightning's trainer that this one does not take, and what to write instead."""
LEAST = {
    "max_epochs": -1,
    "max_steps": -1,
    "num_nodes": 1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "gradient_clip_val": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "fast_dev_run": 0,
}
"""The smallest values of arguments that Lightning does not check, or refuses without a remedy."""
EVALUATED = {"validate": "val", "test": "test", "predict": "predict"}
"""The split that each evaluation takes."""


def check_arguments(given: dict[str, Any]) -> None:
    """Refuse arguments that would do something else than they say.

    Raises:
        ValueError: one of them would.
    """
    for name, remedy in REFUSED.items():
        if given.get(name):
            raise ValueError(f"trainer.{name} is {given[name]}: leave it out{remedy}")
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and value < least:
            raise ValueError(f"trainer.{name} is {value}: write at least {least}")
    every = given.get("val_check_interval")
    if _is_odd(every) or every in (0, 0.0):
        raise ValueError(
            f"trainer.val_check_interval is {every:g}: write a number of steps, or a share of the epoch up to 1.0; "
            "trainer.limit_val_batches 0 is no validation"
        )
    for split in ("train", "val", "test", "predict"):
        limit = given.get(f"limit_{split}_batches")
        if _is_odd(limit):
            raise ValueError(
                f"trainer.limit_{split}_batches is {limit:g}: write a number of batches, or a share from 0.0 to 1.0"
            )
    devices = given.get("devices")
    words = isinstance(devices, str) and not re.fullmatch(r"auto|-1|\s*\d[\d\s,]*", devices)
    if words or devices in (0, "0", []) or (isinstance(devices, int) and devices < -1):
        shown = devices or repr(devices)
        raise ValueError(f"trainer.devices is {shown}: write a number of at least 1, a list such as [0, 1], or auto")
    most = given.get("max_time")
    if isinstance(most, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", most.strip()):
        raise ValueError(f"trainer.max_time is {most or repr(most)}: write DD:HH:MM:SS, such as 00:01:30:00")


def _is_odd(limit: Any) -> bool:
    """Return whether a limit is neither a whole number nor a share."""
    return isinstance(limit, int | float) and (limit < 0 or (limit > 1 and limit % 1 != 0))


def listed(value: Any) -> list:
    """Return an argument that takes one thing, several or none, as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


class Unprofiled(PassThroughProfiler):
    """Measures nothing. It is faster than Lightning's, which matters because it is called 40 times per step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext:
        """Return a context that does nothing."""
        return self._nothing


class Trainer(pl.Trainer):
    """Lightning's Trainer. One loader item is one global batch, so Lightning itself never accumulates.

    Args:
        accumulate_grad_batches: micro-batches per device and optimizer step; null: derived from `data.batch_size` and
            `data.micro_batch_size`. It never changes the batch.
        log_every_n_steps: optimizer steps between two rows in the log.
        num_sanity_val_steps: validation batches to run before training. 0 is enough, because each run first tries the
            network on a few examples.
        enable_model_summary: print a table of the network's layers.
        use_distributed_sampler: must stay false, because the data module cuts the batches.
        callbacks: your callbacks. `Record`, `Pictures` and `Samples` are added, unless they are among them.
        plugins: as in Lightning. Checkpoints are written durably, unless a CheckpointIO is among them.
        profiler: "simple", "advanced" or "pytorch", to see where the time goes.
        channels_last: use the memory format "channels last" for images. Convolutions are faster with it on GPUs and
            with bf16. null: no, or the choice of `speed: auto`.
        compile: compile the network with `torch.compile`. The first steps then take up to minutes. null: no, or the
            choice of `speed: auto`.
        capture: auto: on a CUDA device, the step is recorded as CUDA graphs and replayed, where that gives the same
            result; one line says where not. `losses` must depend on nothing but the batch and tensors on the device.
            The learning rate is rounded to float32. null: no.
        matmul_precision: precision of float32 matrix products: highest (float32), high (TF32, faster on recent GPUs) or
            medium (bfloat16); null: PyTorch's own setting.
        threads: number of PyTorch's threads on the CPU, per process; null: the processes of a machine share its cores.
        max_time: training stops after it: DD:HH:MM:SS, or the arguments of `timedelta`, such as {hours: 1.5}.
        **kwargs: arguments of Lightning's Trainer.
    """

    callbacks: list[Callback]

    @typed
    def __init__(
        self,
        *,
        accumulate_grad_batches: PositiveInt | None = None,
        log_every_n_steps: int = 10,
        num_sanity_val_steps: int = 0,
        enable_model_summary: bool = False,
        use_distributed_sampler: bool = False,
        plugins: _PLUGIN_INPUT | Sequence[_PLUGIN_INPUT] | None = None,
        callbacks: list[Callback] | Callback | None = None,
        profiler: Profiler | str | None = None,
        channels_last: bool | None = None,
        compile: bool | None = None,
        capture: Literal["auto"] | None = None,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        threads: PositiveInt | None = None,
        max_time: str | timedelta | dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = taken(pl.Trainer.__init__, kwargs)
        own = {
            "log_every_n_steps": log_every_n_steps,
            "num_sanity_val_steps": num_sanity_val_steps,
            "max_time": max_time,
        }
        check_arguments(kwargs | own | {"use_distributed_sampler": use_distributed_sampler})
        self.accumulation = accumulate_grad_batches
        self.channels_last, self.compile, self.capture = bool(channels_last), bool(compile), capture
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        if threads is not None:
            host.set_threads(threads)
        extras, given = listed(plugins), listed(callbacks)
        if not any(isinstance(extra, CheckpointIO) for extra in extras):
            extras.append(DurableIO())
        usual = (Record(), Pictures(), Samples())
        usual = [one for one in usual if not any(isinstance(callback, type(one)) for callback in given)]
        super().__init__(
            callbacks=[Recorder(), AddUp(), *given, *usual],
            accumulate_grad_batches=1,
            log_every_n_steps=log_every_n_steps,
            num_sanity_val_steps=num_sanity_val_steps,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=False,
            plugins=extras,
            profiler=Unprofiled() if profiler is None else profiler,
            max_time=max_time,  # type: ignore[arg-type]  # fractions, too
            **kwargs,
        )
        if isinstance(self.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"trainer.strategy is {type(self.strategy).__name__}, which keeps gradients where the exact step does "
                "not see them: write ddp, or lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"
            )
        if getattr(self.strategy, "_start_method", None) == "spawn":
            raise ValueError(
                "trainer.strategy is ddp_spawn, which moves the data that is in memory: write ddp in a script, or "
                "ddp_notebook in a notebook"
            )
        # Lightning makes its own loop with the same arguments.
        self.fit_loop.epoch_loop = EpochLoop(self, min_steps=self.min_steps, max_steps=self.max_steps)
        for loop in (self.fit_loop.epoch_loop.val_loop, self.validate_loop, self.test_loop):
            loop._results = Results(self, training=False)
        self._logger_connector = Connector(self)
        # Lightning's handlers let a process end with code 0 after SIGTERM, and wait for other processes, which may wait
        # for this one. `Last` has its own. Without it, SIGTERM does what it does without Lightning.
        self._signal_connector.register_signal_handlers = lambda: None
        self.phases = Phases()

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        """The callback that keeps the best checkpoint, or else the first one that keeps any."""
        kept = self.checkpoint_callbacks
        return next((callback for callback in kept if isinstance(callback, ModelCheckpoint)), next(iter(kept), None))

    def _run(self, model: Any, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        data = getattr(self, "datamodule", None)
        if isinstance(data, DataModule):
            data.recall(ckpt_path and data_state(Path(ckpt_path), data))
        command = self.state.fn.value if self.state.fn else ""
        split = EVALUATED.get(command)
        if split and getattr(self, f"limit_{split}_batches") == 0:
            raise Mistake(
                f"trainer.limit_{split}_batches is 0, so there is nothing to {command}: write at "
                "least 1, or a share above 0"
            )
        refuse_unknown_keys()
        if isinstance(self.strategy, SingleDeviceStrategy):
            reset_seed()  # as Lightning does with several processes: layers that are made from here on are the same
        try:
            return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)
        except ValueError as error:
            if "loaded state dict" not in str(error):
                raise
            raise Mistake(
                f"ckpt_path {ckpt_path} has an optimizer of other parameters: leave model.freeze, lr_factors and "
                "decay_matrices_only as they were, or begin a training from these weights: model.init_from"
            ) from None
        except UNREADABLE as error:
            if line := wrong_optimizers(error):
                raise Mistake(line) from None
            raise

    def save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        """Save, and time it. Lightning has a hook for the beginning of a save, but none for the end."""
        before = self.phases.enter("checkpoints")
        try:
            super().save_checkpoint(*arguments, **keywords)
        finally:
            self.phases.enter(before)
