"""The variance of a batch's gradient against the batch size: is it S / B, where S is that of single examples?

Training with a learning rate of zero leaves the weights unchanged, so that each step gives the gradient of another
batch at the same weights: at the initial ones, and after five epochs. The variance is the mean squared distance of a
batch's gradient from the gradient of all N examples. S is the same for single examples. The table also has the estimate
of S by `batchwise.batching.noise`, from the micro-batches of the same steps. In float64.

    python scripts/lab/study_gradient.py --png docs/study_gradient.png
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import study
import torch
from lightning.pytorch.callbacks import Callback
from study import EXAMPLES, FewDigits, Setting
from torch import Tensor, nn

from batchwise.batching.gradients import gradients_of
from batchwise.batching.order import Order, Shuffled
from batchwise.batching.sampling import Weighted
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.models.mlp import MLP

STEPS = 100
SIZES = (2, 8, 32, 128, 512, EXAMPLES)
DRAWN: dict[str, Callable[[], Order]] = {
    "with replacement": partial(Weighted, [1.0] * EXAMPLES),
    "without replacement": Shuffled,
}


class Gradients(Callback):
    """Keeps the squared distance of each full batch's gradient from a given one, and the sum of the gradients."""

    def __init__(self, size: int, centre: Tensor | float = 0.0) -> None:
        self.size, self.centre = size, centre
        self.squares: list[float] = []
        self.total: Tensor | float = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the size of the batch."""
        self.now = batch.size

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the gradient's distance, unless the batch is the short last one."""
        if self.now == self.size:
            gradient = torch.cat([each.flatten() for each in gradients_of(optimizer)])
            self.squares.append((gradient - self.centre).square().sum().item())
            self.total = self.total + gradient


class S(NoiseScale):
    """Pools the estimates of S over all steps."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=1, window=10**6)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Average over the batches, each weighted by its number of examples."""
        self.estimate()
        examples = sum(each.examples for each in self.samples)
        self.mean = sum(each.examples * each.noise for each in self.samples) / examples


def look(network: nn.Module, setting: Setting, seed: int, steps: int, *callbacks: Callback) -> None:
    """Show callbacks the gradients of some batches at the same weights."""
    here = replace(setting, lr=0.0, network=lambda: copy.deepcopy(network), every=10**9)
    study.train(here, seed, 1.0, callbacks, precision="64-true", max_epochs=-1, max_steps=steps)


def measure(network: nn.Module, seed: int, sizes: Sequence[int], steps: int) -> dict[tuple[int, str], float]:
    """Return the variance by batch size and kind of draw, and S by noise.py, each divided by its expected value."""
    everything = Gradients(EXAMPLES)
    look(network, Setting(EXAMPLES), seed, 1, everything)
    single = Gradients(1, everything.total)
    look(network, Setting(1), seed, min(EXAMPLES, 20 * steps), single)
    s = study.mean(single.squares)
    found = {}
    for size in sizes:
        setting = Setting(size, data=partial(FewDigits, micro_batch_size=max(1, size // 4)))
        for name, order in DRAWN.items():
            seen, noise = Gradients(size, everything.total), S()
            look(network, replace(setting, order=order), seed, steps, seen, noise)
            found[size, name] = study.mean(seen.squares) / (s / size)
            if order is not Shuffled:
                found[size, "S"] = noise.mean / s
    return found


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__)
    sizes, steps = study.few(given, SIZES), max(2, round(STEPS * given.scale))
    tables = {}
    figure, axes = study.panels(2)
    for epochs, panel in zip((0, 5), axes, strict=True):
        found = []
        for seed in range(given.seeds):
            torch.manual_seed(seed)
            network = MLP()
            if epochs:
                study.train(Setting(32, 0.2, epochs, network=lambda it=network: it), seed, given.scale)
            found.append(measure(network, seed, sizes, steps))
        left = [(EXAMPLES - size) / (EXAMPLES - 1) for size in sizes]
        rows = [
            [
                size,
                study.spread((each[size, "with replacement"] for each in found), 2),
                study.spread((each[size, "S"] for each in found), 2),
                study.spread((each[size, "without replacement"] for each in found), 2),
                f"{factor:.2f}",
            ]
            for size, factor in zip(sizes, left, strict=True)
        ]
        head = ["batch B", "with replacement / (S/B)", "S by noise.py / S", "without replacement / (S/B)"]
        head += ["(N-B)/(N-1)"]
        where = f"after {epochs} epochs" if epochs else "at the initial weights"
        tables[where] = study.table(f"Variance of the gradient {where}", head, rows)
        for name, style in zip(DRAWN, ("o", "s"), strict=True):
            means = [study.mean(each[size, name] for each in found) / size for size in sizes]
            panel.plot(sizes[:-1], means[:-1], style, label=f"measured, {name}")
        panel.plot(sizes, [1 / size for size in sizes], ":", color="gray", label="1 / B")
        corrected = [factor / size for factor, size in zip(left, sizes, strict=True)]
        panel.plot(sizes[:-1], corrected[:-1], "--", label="(N-B)/(N-1) / B")
        panel.set(xscale="log", yscale="log", xlabel="batch size B (examples)", ylabel="variance of the gradient / S")
        panel.set_title(where)
        panel.legend()
    study.finish(given, figure, **tables)


if __name__ == "__main__":
    main()
