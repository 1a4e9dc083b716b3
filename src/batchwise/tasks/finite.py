"""Steps whose loss or gradient is not finite."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from batchwise.batching.gradients import full, gradients_of
from batchwise.batching.loader import Batch
from batchwise.errors import TrainingStopped

if TYPE_CHECKING:
    from batchwise.tasks.step import Sums
    from batchwise.tasks.task import Task


class Finite:
    """Decides whether a step is made or skipped. All devices decide alike, because the numbers are already reduced.

    Args:
        most: after this many skipped steps in a row, training stops. 0: no check.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.skipped_in_a_row = 0

    def passes(self, task: "Task", batch: Batch, sums: "Sums", optimizer: Any) -> bool:
        """Return whether the step may be made. If not, print its examples.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        if not self.most or self._is_finite(task, sums, optimizer):
            self.skipped_in_a_row = 0
            return True
        self._skip(task, batch)
        return False

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

    def _skip(self, task: "Task", batch: Batch) -> None:
        self.skipped_in_a_row += 1
        data = task.data
        assert data.plan is not None
        examples = data.order.indices(batch.epoch, *data.plan.bounds(batch.step)).tolist()
        path = Path(task.trainer.default_root_dir) / "skipped.csv"
        if task.trainer.is_global_zero:
            with path.open("a") as file:
                file.write(",".join(map(str, [batch.step, *examples])) + "\n")
            some = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
            print(f"step {batch.step}: loss or gradient is not finite; skipped; its examples: {some} (all: {path})")
        if self.skipped_in_a_row >= self.most:
            last = path.parent / "checkpoints" / "last.ckpt"
            saved = f"; {last.name} has the weights from before" if last.exists() else ""
            raise TrainingStopped(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {batch.step}: "
                f"lower the learning rate, or look at the examples in {path}{saved}",
                everywhere=True,
            )
