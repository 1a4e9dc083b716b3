"""Representative batches against skewed ones: the order of the examples, from sorted by class to stratified.

Plain SGD with a constant rate, 10 epochs, and for each order the better of two rates (by validation). Then the same
with data in which five of the ten digits are rare, for shuffled, stratified and balanced batches.

    python scripts/lab/study_order.py --png docs/study_order.png
"""

from collections.abc import Callable
from functools import partial

import study
import torch
from side_by_side import train_all
from study import FewDigits, Run, Setting
from torch import Tensor

from batchwise.batching.order import Order, Sequential, Shuffled
from batchwise.batching.random import mix
from batchwise.batching.sampling import Balanced, Stratified, Weighted
from batchwise.models.mlp import MLP

RATES = {16: (0.05, 0.2), 128: (0.2, 0.8)}
IMAGES = 896  # full batches of either size: a last batch of three images would have an undue effect
RARE = 6


class OneClass(Order):
    """Batches of one class, except where two classes meet: the examples are sorted, and the batches are shuffled."""

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return the examples of these positions. Each batch is one of the sorted data; the short one stays last."""
        full = len(self) // self.batch_size
        batches = mix(self._key(epoch), torch.arange(full)).argsort() * self.batch_size
        positions = (batches[:, None] + torch.arange(self.batch_size)).flatten()
        return torch.cat([positions, torch.arange(len(positions), len(self))])[start:stop]


def alike(digits: Tensor) -> Tensor:
    """Return the indices of the images in an order that has the same digit at each position in all splits."""
    return by_digit(digits)[torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))]


def by_digit(digits: Tensor) -> Tensor:
    """Return the indices of the images, sorted by digit."""
    return digits.argsort(stable=True)[:IMAGES]


def rare(digits: Tensor) -> Tensor:
    """Return the indices of 80 images of each of the digits 0 to 4, and of `RARE` images of each other digit."""
    return torch.cat([(digits == digit).nonzero().squeeze(1)[: 80 if digit < 5 else RARE] for digit in range(10)])


ORDERS: dict[str, tuple[Callable[[], Order], Callable[[Tensor], Tensor]]] = {
    "sorted by digit": (Sequential, by_digit),
    "batches of one digit, shuffled": (OneClass, by_digit),
    "shuffled once, then the same order": (Sequential, alike),
    "shuffled in each epoch": (Shuffled, alike),
    "drawn with replacement": (partial(Weighted, [1.0] * IMAGES), alike),
    "stratified": (Stratified, alike),
    "balanced": (Balanced, alike),
}
COLUMNS = {
    "batch 16": (16, MLP),
    "batch 128": (128, MLP),
    "batch 16, batch norm": (16, partial(MLP, norm="batch")),
}


def better(runs: dict, *key: object) -> list[Run]:
    """Return the runs at the better of the rates."""
    found = [each for (*other, _), each in runs.items() if tuple(other) == key]
    return max(found, key=lambda each: study.mean(run.val for run in each))


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__)
    settings = {}
    for order in study.few(given, ORDERS):
        make, choose = ORDERS[order]
        data = partial(FewDigits, choose=choose)
        for column, (size, network) in COLUMNS.items():
            for rate in RATES[size]:
                settings[order, column, rate] = Setting(size, rate, 10, order=make, network=network, data=data)
    runs = train_all(given, settings)
    rows = []
    figure, axes = study.panels(len(COLUMNS))
    for order in study.few(given, ORDERS):
        each = [better(runs, order, column) for column in COLUMNS]
        rows.append([order, *(study.spread(run.test for run in found) for found in each)])
        for panel, column, found in zip(axes, COLUMNS, each, strict=True):
            means = [study.mean(values) for values in zip(*(run.accuracy for run in found), strict=True)]
            panel.plot(found[0].epochs, means, label=order)
            panel.set(xlabel="epoch", ylabel="validation accuracy (%)", title=column)
    axes[0].legend(fontsize=7)
    tables = {"orders": study.table("Test accuracy after 10 epochs", ["order", *COLUMNS], rows)}

    kinds = {"shuffled in each epoch": Shuffled, "stratified": Stratified, "balanced": Balanced}
    few = partial(FewDigits, choose=rare)
    settings = {
        (name, size, rate): Setting(size, rate, 20, order=order, data=few, every=20)
        for name, order in kinds.items()
        for size in (16, 128)
        for rate in RATES[size]
    }
    runs = train_all(given, settings)
    rows = [
        [name, *(study.spread(run.test for run in better(runs, name, size)) for size in (16, 128))] for name in kinds
    ]
    title = f"Digits 5 to 9 with {RARE} training images each: test accuracy (all digits alike) after 20 epochs"
    tables["rare"] = study.table(title, ["order", "batch 16", "batch 128"], rows)
    study.finish(given, figure, **tables)


if __name__ == "__main__":
    main()
