"""One optimizer step from one global batch: exact, whatever runs out of memory or of finite numbers."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from batchwise.batching.gradients import Number, full, gradients_of, scale_gradients, weighted_sum
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.batching.random import mix
from batchwise.data.module import DataModule
from batchwise.errors import TrainingStopped
from batchwise.models import place
from batchwise.models.dropout import Dropout
from batchwise.models.norm import GhostBatchNorm, convert_batchnorm

DRAWS = 0x647261
"""Tells what is drawn in training from what else is drawn from the same seed."""

Losses = Tensor | tuple[Tensor, Tensor]


_PLAIN = {"_current_fx_name", "share", "sums", "window", "epoch_sums", "skipped_in_a_row", "row_is_due", "_micro_batch"}


class Sums(NamedTuple):
    """Sums over targets: numbers on the host, or tensors that are still on the device."""

    loss: Number = 0.0
    count: Number = 0.0
    stops: Number = 0.0
    """Devices that were asked to stop."""

    def plus(self, loss: Number, count: Number) -> "Sums":
        """Return the sums with more targets."""
        if isinstance(loss, Tensor) and loss.device.type != "mps":
            loss = loss.double()
        return Sums(self.loss + loss, self.count + count, self.stops)

    def mean(self) -> float:
        """Return the mean loss; waits for the device."""
        return float(self.loss / self.count) if self.count else float("nan")


class ExactStep(pl.LightningModule, ABC):
    """Runs the micro-batches of a global batch, reduces once, divides once, steps.

    One item of the training loader is one optimizer step, so all of Lightning's counters count the same thing.

    Args:
        network: any module that takes `batch.inputs`.
        ghost_batch_size: replace the network's batch norms by ghost batch norms over so many examples.
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; after so many in a row training
            stops. 0: do not look (on a GPU, looking waits for the device at each step).
    """

    def __init__(self, network: nn.Module, ghost_batch_size: int | None = None, max_skipped_steps: int = 10) -> None:
        super().__init__()
        if ghost_batch_size is not None and not convert_batchnorm(network, ghost_batch_size):
            raise ValueError(
                f"model.ghost_batch_size is {ghost_batch_size}, but the network has no batch norm: leave it out"
            )
        self.network = network
        self.max_skipped_steps = max_skipped_steps
        self.ghosts = [layer for layer in network.modules() if isinstance(layer, GhostBatchNorm)]
        sizes = {layer.ghost_batch_size for layer in self.ghosts}
        if len(sizes) > 1:
            raise ValueError(f"the network has ghost batches of {sorted(sizes)} examples: write one size")
        self.unit = sizes.pop() if sizes else 1
        for number, layer in enumerate(layer for layer in network.modules() if isinstance(layer, Dropout)):
            layer.number = number
        self.share: Batch | None = None
        self.skipped_in_a_row = 0
        self.held: list[nn.Parameter] = []
        """Those that do not move for now: their gradient is dropped."""
        self.stop_requested = False
        """Set on any device, it makes all of them stop after the same step."""
        self._micro_batch = 0
        # Over all devices: of this step, since the last row in the log, and since the epoch began.
        self.sums, self.window, self.epoch_sums = Sums(), Sums(), Sums()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set plain attributes without a search for parameters: Lightning sets one of them 40 times per step."""
        if name in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def losses(self, batch: MicroBatch) -> Losses:
        """Return one loss per target, [N] or [N, T], never averaged; or (losses, weights) shaped alike."""

    @property
    def data(self) -> DataModule:
        """The data module that owns the batching."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise TypeError("a Task trains from a batchwise.data.module.DataModule: pass datamodule= to the trainer")
        return data

    def summed_loss(self, batch: MicroBatch) -> tuple[Tensor, Number]:
        """Return the loss sum and the count of a batch on the device."""
        losses = self.losses(batch)
        losses, weights = losses if isinstance(losses, tuple) else (losses, None)
        if losses.ndim == 0 or len(losses) != len(batch):
            raise ValueError(
                f"{type(self).__name__}.losses gave the shape {list(losses.shape)} for {len(batch)} examples: return "
                "one loss per target (reduction='none'), with the examples in the first dimension"
            )
        return weighted_sum(losses, batch.weights, weights)

    def reduce_sums(self, sums: Sums) -> Sums:
        """Return the sums over all devices: on a CPU as numbers, elsewhere on the device, so that nothing waits."""
        if self.trainer.world_size > 1:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            values = [torch.as_tensor(value, dtype=dtype, device=self.device) for value in sums]
            sums = Sums(*self.reduce(torch.stack(values)).unbind())
        if self.device.type == "cpu":
            sums = Sums(*(float(value) for value in sums))
        return sums

    def reduce(self, values: Tensor) -> Tensor:
        """Return the sum over all devices, each part of the batch counted once."""
        total = self.trainer.strategy.reduce(values, reduce_op="sum")
        assert isinstance(total, Tensor)
        copies = self.trainer.world_size // self.data.replicas[0]
        return total if copies == 1 else total / copies

    # Lightning's hooks

    def on_train_start(self) -> None:
        """Take what costs nothing to leave out from each step."""
        leave_out_empty_hooks(self.trainer.callbacks, Callback)  # type: ignore[attr-defined]
        leave_out_empty_hooks([self], pl.LightningModule)
        self._leave_batches_on_the_host()
        for ghost in self.ghosts:
            ghost.zero_sums()

    def _leave_batches_on_the_host(self) -> None:
        """Spare Lightning the way through its transfer hooks, where nobody has written one."""
        hooks = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
        owners = ((self, pl.LightningModule), (self.data, DataModule))
        if all(getattr(type(owner), hook) is getattr(base, hook) for owner, base in owners for hook in hooks):
            self.trainer.strategy.batch_to_device = lambda batch, *_, **__: batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Take this device's share of the next global batch."""
        if batch.step != self.trainer.global_step:
            raise RuntimeError(
                f"the loader gave the batch of step {batch.step}, but step {self.trainer.global_step} is due"
            )
        self.share = batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss sum of one micro-batch, scaled so that the sum over all is near the mean of the batch."""
        micro_batch = self.data.to_device(batch.micro_batches[self._micro_batch], self.device, training=True)
        loss, count = self.summed_loss(micro_batch)
        self.sums = self.sums.plus(loss.detach(), count)
        # Data-parallel strategies average over devices. The nominal count keeps half-precision gradients in range.
        return loss * (self.data.replicas[0] / batch.size)

    # Lightning looks the signature up at each step; this saves it a search of 30 microseconds.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: gradients are zeroed once per global batch and not per micro-batch."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step with the exact gradient of the global batch; or skip the step where it is not finite."""
        assert optimizer_closure is not None
        loss = self.gradient(optimizer, optimizer_closure)
        if self.max_skipped_steps and not self._is_finite(optimizer):
            drop_gradients(optimizer)
            self._skip()
            return
        self.skipped_in_a_row = 0
        self.window = self.window.plus(self.sums.loss, self.sums.count)
        self.epoch_sums = self.epoch_sums.plus(self.sums.loss, self.sums.count)
        self._move_running_statistics()
        self.before_step(optimizer)
        optimizer.step(closure=lambda: loss)

    def forget_pass(self) -> None:
        """Forget what a pass over the micro-batches, which ran out of memory, has measured."""

    def before_step(self, optimizer: Any) -> None:
        """Do what is to be done between gradient and step."""

    # The gradient

    def gradient(self, optimizer: Any, backward: Callable[[], Any]) -> Tensor:
        """Leave the exact gradient of the global batch in the parameters; return the exact loss.

        Args:
            optimizer: its gradients are zeroed first.
            backward: runs `training_step` and the backward pass of the micro-batch that is due.
        """
        share = self.share
        assert share is not None
        loss = None
        while loss is None:
            drop_gradients(optimizer)
            self.forget_pass()
            self.sums = Sums()
            for ghost in self.ghosts:
                ghost.zero_sums()
            share.cut(self.data.micro_batch_limit, self._whole())
            loss = self._run_micro_batches(share, backward)
        for parameter in self.held:
            parameter.grad = None
        self.sums = self.reduce_sums(self.sums._replace(stops=float(self.stop_requested)))
        count = self.sums.count + (self.sums.count == 0)  # where no target counts, loss and gradient are zero
        scale_gradients(parameters(optimizer), share.size / count)
        exact = self.sums.loss / count
        return loss.fill_(exact)  # Lightning hands this very tensor to `on_train_batch_end`

    def _run_micro_batches(self, share: Batch, backward: Callable[[], Any]) -> Tensor | None:
        """Run all micro-batches and return the loss of the last; None if they must be run again, in smaller ones."""
        key = mix(self.data.seed or 0, DRAWS, share.step)
        loss = None
        try:
            for number, micro_batch in enumerate(share.micro_batches):
                self._micro_batch = number
                # What our own layers draw depends on the step and the example; what others draw, also on where their
                # micro-batch begins.
                place.current = place.Place(key, micro_batch.position, micro_batch.counts)
                seed_generator(self.device, key ^ micro_batch.position)
                # Gradients cross devices once per step, overlapped with the last backward pass.
                last = number == len(share.micro_batches) - 1
                with nullcontext() if last else self._no_sync():
                    loss = backward()
            return loss
        except RuntimeError as error:
            if not is_out_of_memory(error):
                if self.trainer.world_size > 1 and self.data.ran_out_of_memory():
                    raise TrainingStopped("another process ran out of memory", everywhere=True) from error
                raise
            message = str(error).splitlines()[0]
        finally:
            place.current = None
        # Outside the except clause, where the failed pass and its tensors are gone.
        self._halve(share, message)
        return None

    def _whole(self) -> int:
        """Return how many examples must stay together, for the network or for the data."""
        assert self.data.plan is not None
        return self.data.plan.unit

    def _no_sync(self) -> Any:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _halve(self, share: Batch, message: str) -> None:
        """Set half the limit for micro-batches.

        Raises:
            TrainingStopped: a micro-batch cannot be smaller; or there are several devices, which wait for one another
                in the middle of a backward pass.
        """
        size = share.largest()
        unit = self._whole()
        half = max(1, size // 2 // unit) * unit
        share.cut(half, unit)
        if share.largest() >= size:
            raise TrainingStopped(
                f"out of memory with {size} example(s) at once, which cannot be cut further ({message}): "
                "write a smaller model or input"
            )
        self.data.micro_batch_limit = half
        where = f"step {self.trainer.global_step}: out of memory with micro-batches of {size} examples"
        if self.trainer.world_size > 1:
            self.data.limit_file.write_text(str(half))
            raise TrainingStopped(f"{where} ({message}): the same command with --ckpt_path last goes on with {half}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{where}: the batch is run again in micro-batches of {half}; its result is the same", flush=True)

    def _move_running_statistics(self) -> None:
        if self.ghosts:
            sums = self.reduce(torch.cat([ghost.sums for ghost in self.ghosts], dim=1))
            widths = [ghost.sums.shape[1] for ghost in self.ghosts]
            for ghost, own in zip(self.ghosts, sums.split(widths, dim=1), strict=True):
                ghost.move_running(own)

    # Numbers that are not finite

    def _is_finite(self, optimizer: Any) -> bool:
        """Return whether loss and gradient are finite. All devices see the same, after the reduction."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:  # which looks at the gradient itself
            return math.isfinite(self.sums.loss)
        norms = torch._foreach_norm(gradients_of(optimizer))  # pyright: ignore[reportPrivateImportUsage]
        return math.isfinite(self.sums.loss + full(torch.stack(norms).sum()))

    def _skip(self) -> None:
        """Say which examples were in a skipped step; stop after too many in a row."""
        self.skipped_in_a_row += 1
        share, data = self.share, self.data
        assert share is not None
        assert data.plan is not None
        examples = data.order.indices(share.epoch, *data.plan.bounds(share.step)).tolist()
        path = Path(self.trainer.default_root_dir) / "skipped.csv"
        if self.trainer.is_global_zero:
            with path.open("a") as file:
                file.write(",".join(map(str, [share.step, *examples])) + "\n")
            some = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
            print(f"step {share.step}: loss or gradient is not finite; skipped; its examples: {some} (all: {path})")
        if self.skipped_in_a_row >= self.max_skipped_steps:
            last = path.parent / "checkpoints" / "last.ckpt"
            saved = f"; {last.name} has the weights from before" if last.exists() else ""
            raise TrainingStopped(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {share.step}: "
                f"lower the learning rate, or look at the examples in {path}{saved}",
                everywhere=True,
            )

    def stop_agreed(self) -> bool:
        """Return whether any device was asked to stop, as of the last step; all devices get the same answer."""
        if self.trainer.world_size == 1:
            return self.stop_requested
        # Reading waits for the device. On a CPU that is free; elsewhere it is done where a row in the log waits anyway.
        free = self.device.type == "cpu" or self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        return free and bool(self.sums.stops > 0)

    # What a checkpoint keeps besides

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of the epoch and of the next row of the log, so that mean losses are exact after a resume."""
        checkpoint["epoch_sums"] = [float(value) for value in self.epoch_sums]
        checkpoint["window"] = [float(value) for value in self.window]
        checkpoint["skipped_in_a_row"] = self.skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums."""
        # Lightning loads the weights before it converts the module: into float32, which 64-true would not survive.
        self.trainer.precision_plugin.convert_module(self)
        self.epoch_sums = Sums(*checkpoint["epoch_sums"])
        self.window = Sums(*checkpoint["window"])
        self.skipped_in_a_row = checkpoint["skipped_in_a_row"]


def row_is_due(trainer: Any, steps: int) -> bool:
    """Return whether a row is written after so many optimizer steps."""
    return steps % trainer.log_every_n_steps == 0 or steps == trainer.max_steps


def parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters that an optimizer moves (walking over a network's modules takes 50 times as long)."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def drop_gradients(optimizer: Any) -> None:
    """Set all gradients to None; what `Optimizer.zero_grad` does, without its entry for profilers."""
    for parameter in parameters(optimizer):
        parameter.grad = None


def leave_out_empty_hooks(objects: Iterable[Any], base: type) -> None:
    """Let Lightning pass over the hooks of a step that are as empty as in `base`: six calls per step and callback.

    Lightning asks whether a hook can be called, so None is left out.
    """
    for thing in objects:
        for hook in _STEP_HOOKS:
            if getattr(type(thing), hook, None) is getattr(base, hook) and hook not in vars(thing):
                setattr(thing, hook, None)


_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device, or the machine, has no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that random layers on `device` draw from (`torch.manual_seed` visits all accelerators)."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)
