"""An exponential moving average of the weights. Validation uses the average, and training goes on with the weights."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.loader import Batch
from batchwise.errors import TrainingStopped
from batchwise.ranges import PositiveFloat
from batchwise.tasks.task import Task

RAW = "raw_weights"
"""The key under which a checkpoint has the weights. Its `state_dict` is the average."""


class EMA(Callback):
    """Averages the weights and the running statistics over the steps. Validation uses the average.

    A step of b examples keeps 0.5 ** (b / `half_life_examples`) of the average (Karras et al. 2022, arXiv 2206.00364,
    in their code). So the half-life in examples is the same at any batch size (Busbridge et al. 2023, arXiv
    2307.13813). The initial weights do not count (Kingma and Ba 2015, section 3), so the average is equal to the
    weights after the first step. A skipped step does not count.

    The `state_dict` of a checkpoint is the average. `test`, `predict` and `model.init_from` use it. The weights are
    beside it, and training resumes from them. After training, the network has the average.

    Args:
        half_life_examples: number of examples after which the weights of a step count half as much.
    """

    @typed
    def __init__(self, half_life_examples: PositiveFloat) -> None:
        self.half_life = half_life_examples
        self._forget()

    def _forget(self) -> None:
        self.examples = 0
        """Number of examples that the averaged steps have trained on."""
        self.average: list[Tensor] = []
        """Empty at first. At least in single precision, because half precision would lose small changes."""
        self._current: list[Tensor] = []
        self._names: list[list[str]] = []  # of each tensor; tied weights have several
        self._restored: dict[str, Tensor] = {}
        self._swapped = False
        self._scale = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: Task, stage: str) -> None:
        """Begin without an average. That of a checkpoint is loaded later."""
        self._forget()
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TrainingStopped(
                f"EMA cannot see whole weights under {type(trainer.strategy).__name__}: write trainer.strategy ddp, or "
                "leave it out",
                everywhere=True,
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                # Lightning calls no `on_save_checkpoint` for it.
                raise TrainingStopped("save_weights_only would not save the average: leave it out", everywhere=True)
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise TrainingStopped(
                    f"trainer.callbacks has EMA and {type(callback).__name__}, each of which puts its average into the "
                    "network: leave one of them out",
                    everywhere=True,
                )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint, and give the network the weights of training."""
        if RAW in checkpoint and trainer.state.fn == "fit":
            self._restored = {name: checkpoint["state_dict"][name] for name in checkpoint[RAW]}
            pl_module.load_state_dict(checkpoint[RAW], strict=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Find the tensors. They are on their device by now."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in pl_module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() or tensor.is_complex():
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor.detach()
        self._names, self._current = list(names.values()), list(tensors.values())
        if self._restored:
            self.average = [
                self._restored.get(names[0], tensor).to(tensor.device, _wide(tensor))
                for names, tensor in zip(self._names, self._current, strict=True)
            ]
        self._scale = _loss_scale(trainer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Move the average, unless the step was skipped."""
        pl_module._step.finite.settle(pl_module)  # a device that decides on skipping is waited for
        before, self._scale = self._scale, _loss_scale(trainer)
        # fp16's scaler lowers its scale when it skips a step.
        if pl_module._step.finite.skipped_in_a_row or self._scale < before:
            return
        if not self.average:
            self.average = [torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in self._current]
        self.examples += batch.size
        # (1 - keep) / (1 - keep of all so far): 1 at the first step.
        per_example = -math.log(2) / self.half_life
        weight = math.expm1(batch.size * per_example) / math.expm1(self.examples * per_example)
        current = [tensor.to(mean.dtype) for tensor, mean in zip(self._current, self.average, strict=True)]
        torch._foreach_lerp_(self.average, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average:
            for mean, tensor in zip(self.average, self._current, strict=True):
                kept = tensor.clone()
                tensor.copy_(mean)
                mean.copy_(kept)
            self._swapped = not self._swapped

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Evaluate the average."""
        self._swap()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Put the weights back, before a checkpoint is saved."""
        self._swap()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Leave the average in the network, whose weights are on the host by now, also if nothing was left to train."""
        average = {name: mean for names, mean in zip(self._names, self.average, strict=False) for name in names}
        pl_module.load_state_dict(average or self._restored, strict=False)
        self._forget()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:
        """Save the average and the weights."""
        if not self.average:
            return
        means, weights = (self._current, self.average) if self._swapped else (self.average, self._current)
        checkpoint[RAW] = {}
        for names, mean, weight in zip(self._names, means, weights, strict=True):
            for name in names:
                if name in checkpoint["state_dict"]:  # frozen parameters may be left out
                    checkpoint["state_dict"][name] = mean
                    checkpoint[RAW][name] = weight

    def state_dict(self) -> dict[str, Any]:
        """Return the number of examples in the average, and the half-life, which must not change on resume."""
        return {"examples": self.examples, "half_life_examples": self.half_life}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the average of a checkpoint."""
        self.examples = state_dict["examples"]


def _loss_scale(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 0.0 if scaler is None else scaler.get_scale()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
