"""Many small networks trained side by side in one training, one per learning rate and seed.

A step of one small network costs more in Python than in arithmetic. So the networks of all seeds are stacked, and those
of all rates run one after another within a step. Each network has its own initial weights, split of the data, labels,
dropout, batch norm statistics and rate, and its gradient is that of its own loss. The networks share the number of
steps and the positions that make up a batch; each split has other images at these positions."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import study
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from study import FewDigits, Key, Run, Setting
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.callbacks.record import Record
from batchwise.data.module import DataModule
from batchwise.models.dropout import Dropout
from batchwise.tasks.task import Task


class Linears(nn.Module):
    """Stacked linear layers: [S, N, in] to [S, N, out]."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]).contiguous())
        biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers]
        self.bias = nn.Parameter(torch.stack(biases)[:, None], requires_grad=layers[0].bias is not None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each to its own inputs."""
        return torch.baddbmm(self.bias, inputs, self.weight)


class Norms(nn.Module):
    """Stacked batch norms or layer norms."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        size = len(layers) * layers[0].weight.numel()
        self.batch = nn.BatchNorm1d(size) if isinstance(layers[0], nn.BatchNorm1d) else None
        self.weight = nn.Parameter(torch.ones(len(layers), 1, layers[0].weight.numel()), self.batch is None)
        self.bias = nn.Parameter(torch.zeros_like(self.weight), self.batch is None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [S, N, H] to the same shape."""
        if self.batch is None:
            return F.layer_norm(inputs, inputs.shape[-1:]) * self.weight + self.bias
        flat = inputs.transpose(0, 1).flatten(1)
        return self.batch(flat).view(inputs.shape[1], inputs.shape[0], -1).transpose(0, 1)


class Networks(nn.Module):
    """MLPs of the same shape, one per seed: inputs [S, N, features] to logits [S, N, classes]."""

    def __init__(self, networks: Sequence[Any]) -> None:
        super().__init__()
        kinds = {nn.Linear: Linears, nn.BatchNorm1d: Norms, nn.LayerNorm: Norms}
        self.layers = nn.ModuleList()
        for alike in zip(*(network.layers for network in networks), strict=True):
            if not isinstance(alike[0], nn.Flatten | nn.Identity):
                self.layers.append(kinds.get(type(alike[0]), lambda layers: layers[0])(alike))

    def forward(self, values: Tensor) -> Tensor:
        """Apply each to its own inputs."""
        for layer in self.layers:
            # Dropout takes the examples first.
            values = layer(values.transpose(0, 1)).transpose(0, 1) if isinstance(layer, Dropout) else layer(values)
        return values


class Splits(DataModule):
    """The splits of several seeds: inputs [N, S, features], targets [N, S]."""

    def __init__(self, parts: Sequence[FewDigits], **kwargs: Any) -> None:
        super().__init__(batch_size_schedule=parts[0].batch_size_schedule, **kwargs)
        self.parts = parts

    def load(self, split: str) -> Any:
        """Return images and digits, side by side."""
        images, digits = zip(*(part.load(split) for part in self.parts), strict=True)
        return torch.stack(images, 1).flatten(2), torch.stack(digits, 1)

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Normalise each split with its own statistics."""
        mean, std = (
            torch.tensor(each)[:, None] for each in zip(*(part.statistics for part in self.parts), strict=True)
        )
        return replace(batch, inputs=(batch.inputs.float() - mean) / std)

    def labels(self) -> Tensor | None:
        """Return the training labels, if they are the same in all splits at each position."""
        digits = self.load("train")[1]
        return digits[:, 0].contiguous() if bool((digits == digits[:, :1]).all()) else None


class SideBySide(Task):
    """Classify each example with each network. The loss of an example is the sum over the networks."""

    def __init__(self, rates: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rates_of_networks = rates
        self.right, self.loss_sums = torch.zeros(()), torch.zeros(())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, S, features] to logits [N, rates x S, classes]."""
        own: Any = self.network
        return torch.cat([networks(inputs.transpose(0, 1)) for networks in own]).transpose(0, 1)

    def losses(self, batch: MicroBatch) -> Tensor:
        """Return one sum of cross-entropies per example [N]."""
        logits, targets = self(batch.inputs), batch.targets.repeat(1, len(self.rates_of_networks))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        if self.training:
            self.loss_sums = self.loss_sums + losses.detach().sum(0)
        else:
            self.right = self.right + (logits.argmax(2) == targets).sum(0)
        return losses.sum(1)

    def parameter_groups(self) -> list[Any]:
        """Return one group per rate."""
        own: Any = self.network
        return [
            {"params": [p for p in networks.parameters() if p.requires_grad], "lr": rate}
            for networks, rate in zip(own, self.rates_of_networks, strict=True)
        ]


class Curves(Callback):
    """Adds accuracy and loss to each run after each validation."""

    def __init__(self, runs: list[Run], setting: Setting) -> None:
        self.runs, self.setting, self.epochs = runs, setting, 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Add a point to each curve; stop when all have reached the target."""
        (record,) = (callback for callback in trainer.callbacks if isinstance(callback, Record))
        seconds, epoch, plan = record.totals(pl_module).seconds, trainer.current_epoch + 1, pl_module.data.plan
        images = len(pl_module.data.split("val"))
        for run, right, loss in zip(self.runs, pl_module.right.tolist(), pl_module.loss_sums.tolist(), strict=True):
            run.epochs.append(epoch)
            run.accuracy.append(100 * right / images)
            run.loss.append(loss / (plan.examples_per_epoch * (epoch - self.epochs)))
            run.seconds.append(seconds)
            run.steps.append(trainer.global_step)
        pl_module.right, pl_module.loss_sums, self.epochs = torch.zeros(()), torch.zeros(()), epoch
        done = all(run.reached(self.setting.target) is not None for run in self.runs)
        trainer.should_stop = done and epoch >= self.setting.least


def train(setting: Setting, rates: Sequence[float], seeds: Sequence[int], scale: float) -> list[list[Run]]:
    """Return a run per rate and seed."""
    networks = nn.ModuleList()
    for _ in rates:
        each = []
        for seed in seeds:
            torch.manual_seed(seed)
            each.append(setting.network())
        networks.append(Networks(each))
    task = SideBySide(
        rates,
        network=networks,
        optimizer=partial(setting.optimizer, lr=rates[0]),
        schedule=setting.schedule,
        reference_batch_size=setting.reference_batch_size,
        max_skipped_steps=0,  # one diverged network must not stop the others
    )
    parts = [setting.data(split_seed=seed) for seed in seeds]
    data = Splits(parts, batch_size=setting.batch_size, order=setting.order(), seed=0)
    runs = [Run() for _ in range(len(rates) * len(seeds))]
    with tempfile.TemporaryDirectory() as folder, study.silence():
        trainer = study.trainer(folder, setting, scale, [Curves(runs, setting)])
        trainer.fit(task, datamodule=data)
        task.right = torch.zeros(())
        trainer.test(task, datamodule=data, verbose=False)
        test = data.split("test")
        assert test is not None
        for run, right in zip(runs, task.right.tolist(), strict=True):
            run.test = 100 * right / len(test)
    return [runs[first : first + len(seeds)] for first in range(0, len(runs), len(seeds))]


def train_all(given: argparse.Namespace, settings: dict[Key, Setting]) -> dict[Key, list[Run]]:
    """Train each setting once per seed, those that differ only in their rate side by side; return the runs."""
    runs: dict[Key, list[Run]] = {}
    for key, setting in settings.items():
        if key not in runs:
            alike = {k: s.lr for k, s in settings.items() if replace(s, lr=setting.lr) == setting}
            found = train(setting, list(alike.values()), range(given.seeds), given.scale)
            runs |= dict(zip(alike, found, strict=True))
    return {key: runs[key] for key in settings}
