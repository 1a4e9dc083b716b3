"""How large must the window of `BlockShuffled` be? Digits in 56 shards of 16 images, sorted by class or at random.

For each window: how unlike the data set the classes of a batch are (their total variation), what a batch is worth, and
the accuracy after one epoch and after ten, with plain SGD, batches of 32 and the better of two rates (by validation).

    python scripts/lab/study_window.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import study
import torch
from side_by_side import train_all
from study import FewDigits, Setting
from study_order import IMAGES, alike, better, by_digit
from torch import Tensor

from batchwise.batching.order import Order, Shuffled
from batchwise.batching.shards import BlockShuffled

SHARD, BATCH, RATES, EPOCHS = 16, 32, (0.1, 0.4), (1, 10)
WINDOWS = (1, 2, 4, 8, 14, 28, 56)


class Windows(BlockShuffled):
    """`BlockShuffled` for images in memory, in shards of equal size."""

    def prepare(self, *arguments: Any, **others: Any) -> Self:
        """Set the sizes of the shards too."""
        return super().prepare(*arguments[:6], shards=torch.full((IMAGES // SHARD,), SHARD))


def variation(order: Order, choose: Callable[[Tensor], Tensor], seeds: int) -> float:
    """Return the total variation of the classes of a batch from those of all images, on average."""
    data, found = FewDigits(choose=choose), []
    digits = torch.as_tensor(data.load("train")[1])
    share = digits.bincount(minlength=10) / len(digits)
    for seed in range(seeds):
        batches = digits[order.prepare(IMAGES, BATCH, seed).indices(0, 0, IMAGES)].view(-1, BATCH)
        own = torch.stack([batch.bincount(minlength=10) / BATCH for batch in batches])
        found.append((own - share).abs().sum(1).mean().item() / 2)
    return study.mean(found)


def main() -> None:
    """Train and print."""
    given = study.arguments(__doc__)
    orders: dict[str, Callable[[], Order]] = {f"{window}": partial(Windows, window) for window in WINDOWS}
    orders["uniform shuffle"] = Shuffled
    kinds = {"sorted": by_digit, "random": alike}
    settings = {
        (name, kind, epochs, rate): Setting(
            BATCH, rate, epochs, order=orders[name], data=partial(FewDigits, choose=choose), every=epochs
        )
        for name in study.few(given, orders)
        for kind, choose in kinds.items()
        for epochs in EPOCHS
        for rate in RATES
    }
    runs, rows = train_all(given, settings), []
    for name in study.few(given, orders):
        made = orders[name]()
        row: list[Any] = [name, f"{variation(made, by_digit, 20):.2f}"]
        row.append(f"{made.worth(BATCH):.1f}" if isinstance(made, Windows) else f"{BATCH}")
        for kind in kinds:
            for epochs in EPOCHS:
                row.append(study.spread(run.test for run in better(runs, name, kind, epochs)))
        rows.append(row)
    head = ["shards in a window", "total variation", "worth"]
    head += [f"{kind} shards, {epochs} epoch{'s' * (epochs > 1)}" for kind in kinds for epochs in EPOCHS]
    study.finish(given, None, windows=study.table("Accuracy by the window", head, rows))


if __name__ == "__main__":
    main()
