"""Steps whose loss or gradient is not finite."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from batchwise.batching.gradients import full, gradients_of
from batchwise.errors import TrainingStopped

if TYPE_CHECKING:
    from batchwise.tasks.sums import Sums
    from batchwise.tasks.task import Task

ASKED = 32
"""Steps between two looks at what the device has skipped by itself; at most 63, the bits of the history."""


class Made(NamedTuple):
    """A step that was checked on the device."""

    step: int
    epoch: int


class Finite:
    """Decides whether a step is made or skipped. All devices decide alike, because the numbers are already reduced.

    On a GPU, the host need not wait: fused kernels read from the device whether to skip, and the host learns of it up
    to 64 steps later, or with the next row in the log.

    Args:
        most: after this many skipped steps in a row, training stops. 0: no check.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.skipped_in_a_row = 0
        self.history: Tensor | None = None
        """One bit for each step that was checked on the device, the newest last: 1 if it was skipped."""
        self._unread: list[Made] = []
        self._asked: list[Made] = []
        self._answer: tuple[Tensor, torch.cuda.Event | None] | None = None

    # While the host waits

    def passes(self, task: "Task", made: Made, sums: "Sums", optimizer: Any) -> bool:
        """Return whether the step may be made. If not, print its examples. This waits for the device.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        if not self.most:
            return True
        self.settle(task)
        finite = self._is_finite(task, sums, optimizer)
        self._note(task, made, skipped=not finite)
        return finite

    def _is_finite(self, task: "Task", sums: "Sums", optimizer: Any) -> bool:
        if getattr(task.trainer.precision_plugin, "scaler", None) is not None:  # it checks the gradient itself
            return math.isfinite(sums.loss)
        gradients = gradients_of(optimizer)
        if not gradients:
            return math.isfinite(sums.loss)
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        if task.device.type == "cpu" and task.device_mesh is None:  # nothing to wait for
            return math.isfinite(sums.loss + sum(norm.item() for norm in norms))
        return math.isfinite(sums.loss) and math.isfinite(full(torch.stack(norms).sum()))

    # On the device

    def checked(self, sums: "Sums", optimizer: Any, history: Tensor) -> tuple["Sums", Tensor]:
        """Let the optimizer's next step find out by itself whether to be skipped. Nothing waits.

        Args:
            sums: of the step.
            optimizer: fused, with the gradient of the step.
            history: gets one more bit.

        Returns:
            The sums, zero if the step is skipped; and whether it is made, a bool on the device.
        """
        loss = torch.as_tensor(sums.loss, device=history.device)
        norms = torch._foreach_norm(gradients_of(optimizer))  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.isfinite(loss + torch.stack(norms).sum()) if norms else torch.isfinite(loss)
        optimizer.found_inf = (~finite).float()
        history.mul_(2).add_(~finite)
        return sums._replace(loss=torch.where(finite, loss, 0.0), count=finite * sums.count), finite

    def start(self, device: torch.device) -> Tensor:
        """Return the history, on the device."""
        if self.history is None or self.history.device != device:
            self.history = torch.zeros((), dtype=torch.int64, device=device)
        return self.history

    def note_later(self, task: "Task", made: Made) -> None:
        """Note a step that was checked on the device. Every 32 steps, look at the 32 before them."""
        self._unread.append(made)
        if len(self._unread) < ASKED:
            return
        self._hear(task)
        assert self.history is not None
        if self.history.is_cuda:
            answer, event = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
            answer.copy_(self.history, non_blocking=True)
            event.record()
        else:
            answer, event = self.history.clone(), None
        self._answer, self._asked, self._unread = (answer, event), self._unread, []

    def settle(self, task: "Task") -> None:
        """Wait for the device, and handle the steps that it has skipped.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        self._hear(task)
        if self._unread:
            assert self.history is not None
            made, self._unread = self._unread, []
            self._handle(task, made, int(self.history))

    def _hear(self, task: "Task") -> None:
        if self._answer is not None:
            (answer, event), made = self._answer, self._asked
            self._answer, self._asked = None, []
            if event is not None and not event.query():  # else it happened long ago
                event.synchronize()
            self._handle(task, made, int(answer))

    def _handle(self, task: "Task", steps: list[Made], history: int) -> None:
        if not history & (2 ** len(steps) - 1):
            self.skipped_in_a_row = 0
            return
        for bit, made in zip(reversed(range(len(steps))), steps, strict=True):
            self._note(task, made, skipped=bool(history >> bit & 1))

    # What was skipped

    def _note(self, task: "Task", made: Made, skipped: bool) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        data = task.data
        assert data.plan is not None
        examples = data.order.indices(made.epoch, *data.plan.bounds(made.step)).tolist()
        path = Path(task.trainer.default_root_dir) / "skipped.csv"
        if task.trainer.is_global_zero:
            with path.open("a") as file:
                file.write(",".join(map(str, [made.step, *examples])) + "\n")
            some = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
            print(f"step {made.step}: loss or gradient is not finite; skipped; its examples: {some} (all: {path})")
        if self.skipped_in_a_row >= self.most:
            last = path.parent / "checkpoints" / "last.ckpt"
            saved = f"; {last.name} has the weights from before" if last.exists() else ""
            raise TrainingStopped(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {made.step}: "
                f"lower the learning rate, or look at the examples in {path}{saved}",
                everywhere=True,
            )


def skips_by_itself(optimizer: Any) -> bool:
    """Return whether an optimizer's kernels can skip a step on the device: the attribute `found_inf` of PyTorch."""
    return isinstance(optimizer, SGD | Adam) and all(group.get("fused") for group in optimizer.param_groups)
