"""Steps that are checked on the device. The host learns later which of them were skipped."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from batchwise.batching.gradients import Number, gradients_of

SIZE = 32
"""Steps between two looks at what the device has skipped."""


class Made(NamedTuple):
    """A step that is made, or skipped.

    Args:
        step: its number.
        epoch: number of its epoch.
        count: number of its targets, or sum of their weights.
    """

    step: int
    epoch: int
    count: Number


class Seen(NamedTuple):
    """Steps of which the host knows whether they were skipped.

    Args:
        steps: in their order, and whether each was skipped.
        loss: sum over the targets of those that were not skipped, on the device.
        count: number of these targets.
    """

    steps: list[tuple[Made, bool]]
    loss: Tensor
    count: Number


class Ledger:
    """What the device writes down of each step: whether it is skipped, and its loss.

    It has two pages. While one fills up, the other is on its way to the host.

    Args:
        device: where the steps are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._skipped = torch.zeros(2, SIZE, dtype=torch.float32, device=device)
        self._losses, self._counts = torch.zeros(2, 2, SIZE, dtype=torch.float64, device=device)
        # One view per step, made once: each takes the host almost as long as a kernel.
        pages = self._skipped, self._losses, self._counts
        self._flag, self._loss, self._count = ([page.unbind() for page in pair] for pair in pages)
        self._page, self._steps = 0, list[Made]()
        self._sent: tuple[list[Made], Tensor, torch.cuda.Event | None] | None = None
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def __len__(self) -> int:
        """Return the number of steps of which the host knows nothing yet."""
        return len(self._steps) + (len(self._sent[0]) if self._sent else 0)

    @property
    def line(self) -> Tensor:
        """Where the next step writes whether it is skipped: a zero on the device. Kernels take it as `found_inf`."""
        return self._flag[self._page][len(self._steps)]

    def check(self, loss: Number, optimizer: Any, line: Tensor) -> None:
        """Write 1 into a line if the loss or a gradient is not finite. Nothing waits."""
        values = [torch.as_tensor(loss, device=line.device), *gradients_of(optimizer)]
        for dtype in {value.dtype for value in values}:
            alike = [value for value in values if value.dtype == dtype]
            if dtype.itemsize < 4:  # of half precision the kernel knows only one kind
                norms = torch._foreach_norm(alike)  # pyright: ignore[reportPrivateImportUsage]
                alike = [torch.stack(norms).float()]
            torch._amp_foreach_non_finite_check_and_unscale_(alike, line, self._one)  # pyright: ignore[reportPrivateImportUsage]

    def add(self, made: Made, loss: Number) -> Seen | None:
        """Add a step that has written its line. If that fills a page, send it, and return the page before it."""
        page, number = self._page, len(self._steps)
        self._loss[page][number].fill_(loss)
        if isinstance(made.count, Tensor):
            self._count[page][number].fill_(made.count)
        self._steps.append(made)
        if len(self._steps) < SIZE:
            return None
        seen, skipped = self._receive(), self._skipped[page]
        if skipped.is_cuda:
            answer, event = torch.empty(SIZE, dtype=torch.float32, pin_memory=True), torch.cuda.Event()
            answer.copy_(skipped, non_blocking=True)
            event.record()
        else:
            answer, event = skipped.clone(), None
        self._sent, self._steps, self._page = (self._steps, answer, event), [], 1 - page
        self._skipped[self._page].zero_()
        return seen

    def _receive(self) -> Seen | None:
        """Return the page that was sent."""
        if self._sent is None:
            return None
        (steps, answer, event), self._sent = self._sent, None
        if event is not None and not event.query():  # else it happened long ago
            event.synchronize()
        return self._read(1 - self._page, steps, answer.tolist())

    def settle(self) -> list[Seen]:
        """Wait for the device, and return all that the host does not know."""
        seen = [] if (sent := self._receive()) is None else [sent]
        if self._steps:
            steps, page = self._steps, self._skipped[self._page]
            seen.append(self._read(self._page, steps, page.tolist()))
            self._steps = []
            page.zero_()
        return seen

    def _read(self, page: int, steps: list[Made], skipped: list[float]) -> Seen:
        known = [(made, bool(flag)) for made, flag in zip(steps, skipped, strict=False)]
        counts = [made.count for made, flag in known if not flag]
        kept = self._skipped[page, : len(steps)] == 0
        loss = torch.where(kept, self._losses[page, : len(steps)], 0.0).sum()
        if any(isinstance(count, Tensor) for count in counts):
            return Seen(known, loss, torch.where(kept, self._counts[page, : len(steps)], 0.0).sum())
        return Seen(known, loss, sum(counts))


def skips_by_itself(optimizer: Any) -> bool:
    """Return whether an optimizer's kernels can skip a step on the device: the attribute `found_inf` of PyTorch."""
    return isinstance(optimizer, SGD | Adam) and all(group.get("fused") for group in optimizer.param_groups)
