"""Networks, data and tasks that several tests on a GPU share."""

from functools import partial
from typing import Any

import small
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from batchwise import MicroBatch, Task
from batchwise.trainer import Trainer

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

PLANTED = 50
"""An example that no trial before training looks at."""


class Points(small.Points):
    """The points in another precision, perhaps with infinite inputs in some examples."""

    def __init__(self, dtype: torch.dtype = torch.float64, infinite: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.x = self.x.to(dtype)
        self.x[list(infinite)] = float("inf")


class Images(small.Points):
    """64 images of 3 x 8 x 8 pixels."""

    def __init__(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


class WithoutMetrics(small.Classify):
    """Nothing but the loss."""

    def losses(self, batch: MicroBatch) -> Tensor:
        return F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")


def mlp(*layers: nn.Module) -> nn.Sequential:
    """The same weights each time, without dropout; `layers` come after the first linear layer."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8, bias=not layers), *layers, nn.Tanh(), nn.Linear(8, 3)).double()


def convnet() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 3))


class Rows(Logger):
    """Keeps what is logged in `rows`, by step, without figures of speed and memory."""

    name = "rows"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        left_out = ("examples_per_second", "data_wait", "model_flops_per_second", "mfu", "peak_memory_mib")
        kept = {name: float(value) for name, value in metrics.items() if name not in left_out}
        self.rows.setdefault(step or 0, {}).update(kept)


def far(ours: Rows, theirs: Rows) -> float:
    """The largest difference between the values of two logs, which must have the same rows and names."""
    assert {step: row.keys() for step, row in ours.rows.items()} == {s: row.keys() for s, row in theirs.rows.items()}
    assert ours.rows
    return max(abs(value - theirs.rows[step][name]) for step, row in ours.rows.items() for name, value in row.items())


def moved(task: Task, start: nn.Module) -> float:
    """How far training has moved the weights, so that equal weights are not those from before."""
    return small.furthest(task.network, start)


def fit(task: Task, data: small.Points, **settings: Any) -> tuple[Task, Trainer]:
    return small.fit(task, data, **settings)
