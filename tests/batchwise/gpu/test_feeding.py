"""However the examples come to the device, the batches and the trained weights are those of the CPU."""

from collections.abc import Callable
from typing import Any

import parts
import pytest
import small
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batchwise import MicroBatch

pytestmark = pytest.mark.gpu


class OneByOne(Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class FromWorkers(parts.Points):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype, num_workers=2)

    def load(self, split: str) -> Any:
        return OneByOne(self.x, self.y)


class Keeps(small.Classify):
    """Keeps the examples of each micro-batch of training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_start(self) -> None:
        self.seen.clear()  # of trials before training

    def losses(self, batch: MicroBatch) -> Tensor:
        if self.training:
            assert batch.inputs.device.type == self.device.type
            self.seen.append((batch.index.clone(), batch.inputs.cpu(), batch.targets.cpu()))
        return super().losses(batch)


FEEDS: dict[str, Callable[[torch.dtype], parts.Points]] = {
    "resident": lambda dtype: parts.Points(dtype, resident_share=1.0),
    "pinned": lambda dtype: parts.Points(dtype, resident_share=0.0),
    "workers": FromWorkers,
}


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"), [(torch.float64, "64-true", 1e-10), (torch.float32, "32-true", 1e-5)]
)
@pytest.mark.parametrize("feed", FEEDS)
def test_batches_and_weights_are_those_of_the_cpu(
    feed: str, dtype: torch.dtype, precision: str, tolerance: float, on: dict[str, Any], device: torch.device
) -> None:
    def trained(data: parts.Points, **settings: Any) -> Keeps:
        task = Keeps(small.network().to(dtype), optimizer=parts.sgd)
        parts.fit(task, data, max_epochs=2, precision=precision, **settings)
        return task

    expected = trained(parts.Points(dtype))
    data = FEEDS[feed](dtype)
    task = trained(data, **on)
    if device.type == "cuda" and feed != "workers":
        fetch: Any = data.feed("train")
        assert str(fetch) == feed
        assert fetch.fields[0].device.type == ("cuda" if feed == "resident" else "cpu")
    assert len(task.seen) == len(expected.seen) == 14
    for ours, theirs in zip(task.seen, expected.seen, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert parts.moved(task, small.network().to(dtype)) > 0.1
    assert small.furthest(task, expected) < tolerance


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7])
def test_micro_batches_are_the_whole_batch(micro_batch_size: int, on: dict[str, Any]) -> None:
    """None of them divides the batch of 10, or the last one of 4; keyed dropout is on."""
    whole, _ = small.fit(data=small.Points(), **on)
    cut, _ = small.fit(data=small.Points(micro_batch_size=micro_batch_size), **on)
    assert parts.moved(whole, small.network()) > 0.1
    assert small.furthest(whole, cut) < 1e-12
