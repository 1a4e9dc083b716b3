"""The exponential moving average of the weights: what is evaluated, while training goes on with the weights."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from batchwise.errors import TrainingStopped
from batchwise.ranges import PositiveFloat

RAW = "raw_weights"
"""Where a checkpoint keeps the weights from which training goes on; its `state_dict` is the average."""


class EMA(Callback):
    """Averages the weights, and the running statistics, over the steps; validation and what is saved use the average.

    After n examples the weights of each step count half as much as those n + `half_life_examples` later, whatever the
    batch size: a step of b examples keeps 0.5 ** (b / half life) of the average (Karras et al. 2022, arXiv 2206.00364,
    in their code; the same rule follows the batch size in Busbridge et al. 2023, arXiv 2307.13813). The initial weights
    do not count (Kingma and Ba 2015, section 3), so the average is right from the first step, after which it is equal
    to the weights. A skipped step does not count.

    Checkpoints: the `state_dict` is the average, which `test`, `predict` and `model.init_from` take; training resumes
    from the weights beside it. When training has ended, the network has the average.

    Args:
        half_life_examples: after so many examples, the weights of a step count half as much.
    """

    def __init__(self, half_life_examples: PositiveFloat) -> None:
        if not half_life_examples > 0:  # from Python, it would grow the average without a word
            raise ValueError(f"EMA half_life_examples is {half_life_examples}: write a number of examples above 0")
        self.half_life = half_life_examples
        self._forget()

    def _forget(self) -> None:
        self.examples = 0
        """Examples of the steps that are in the average."""
        self.average: list[Tensor] = []
        """In single precision at least: in half precision, small changes would be lost. Empty before the first step."""
        self._current: list[Tensor] = []
        self._names: list[list[str]] = []  # of each tensor: tied weights have several
        self._restored: dict[str, Tensor] = {}
        self._swapped = False
        self._scale = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin without an average; a checkpoint's comes after."""
        self._forget()
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TrainingStopped(
                f"EMA cannot see whole weights under {type(trainer.strategy).__name__}: write trainer.strategy ddp, or "
                "leave it out",
                everywhere=True,
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                # Lightning does not ask callbacks what belongs into it.
                raise TrainingStopped("save_weights_only would not save the average: leave it out", everywhere=True)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint, and give the network the weights of training."""
        if RAW in checkpoint and trainer.state.fn == "fit":
            self._restored = {name: checkpoint["state_dict"][name] for name in checkpoint[RAW]}
            pl_module.load_state_dict(checkpoint[RAW], strict=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the tensors, which by now are where they stay."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in pl_module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor.detach()
        self._names, self._current = list(names.values()), list(tensors.values())
        if self._restored:
            self.average = [
                self._restored[names[0]].to(tensor.device, _wide(tensor))
                for names, tensor in zip(self._names, self._current, strict=True)
            ]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = 0.0 if scaler is None else scaler.get_scale()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average, unless the step was skipped."""
        if pl_module._step.finite.skipped_in_a_row or self._scaler_skipped(trainer):
            return
        if not self.average:
            self.average = [torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in self._current]
        self.examples += batch.size
        # (1 - keep) / (1 - keep of all so far): 1 at the first step.
        per_example = -math.log(2) / self.half_life
        weight = math.expm1(batch.size * per_example) / math.expm1(self.examples * per_example)
        current = [tensor.to(mean.dtype) for tensor, mean in zip(self._current, self.average, strict=True)]
        torch._foreach_lerp_(self.average, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    def _scaler_skipped(self, trainer: pl.Trainer) -> bool:
        """Return whether fp16's scaler skipped the step: it then lowers its scale."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return self._scale < before

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average:
            for mean, tensor in zip(self.average, self._current, strict=True):
                kept = tensor.clone()
                tensor.copy_(mean)
                mean.copy_(kept)
            self._swapped = not self._swapped

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place."""
        self._swap()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back, before a checkpoint is taken."""
        self._swap()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the network: it is what training was for."""
        self._swap()
        self._forget()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save both."""
        if not self.average:
            return
        means, weights = (self._current, self.average) if self._swapped else (self.average, self._current)
        checkpoint[RAW] = {}
        for names, mean, weight in zip(self._names, means, weights, strict=True):
            for name in names:
                checkpoint["state_dict"][name] = mean
                checkpoint[RAW][name] = weight

    def state_dict(self) -> dict[str, Any]:
        """Return what the average is over."""
        return {"examples": self.examples, "half_life_examples": self.half_life}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the average of a checkpoint."""
        self.examples = state_dict["examples"]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
