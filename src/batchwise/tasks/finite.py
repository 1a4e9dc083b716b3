"""Steps whose loss or gradient is not finite, and examples of evaluations whose loss is not."""

import cmath
import math
import warnings
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchwise.batching.collate import numbers
from batchwise.batching.device import send
from batchwise.batching.gradients import Number, full, gradients_of
from batchwise.batching.loader import MicroBatch
from batchwise.errors import TrainingStopped
from batchwise.tasks.exchange import gather_objects
from batchwise.tasks.ledger import Ledger, Made, Seen
from batchwise.tasks.sums import Sums

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


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
        self._step, self._before = -1, 0  # the newest step that was noted, and `skipped_in_a_row` before it
        self.has_scaler = False
        """Whether gradients are scaled, and checked, by the trainer's precision plugin."""
        self.ledger: Ledger | None = None
        self._evaluated: list[tuple[Tensor, Tensor]] = []

    def listen(self, task: "Task") -> None:
        """Ask what does not change within an epoch."""
        self.has_scaler = getattr(task.trainer.precision_plugin, "scaler", None) is not None
        if self.has_scaler:
            for _, optimizer in task._turns():
                # Made with fused=True, it would take out the scale itself, after clipping and the log.
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    # While the host waits

    def passes(self, task: "Task", made: Made, sums: Sums, optimizer: Any) -> bool:
        """Return whether the step may be made. If not, print its examples. This waits for the device.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        self.settle(task)
        if not self.most:
            return True
        finite = self._is_finite(task, sums, optimizer)
        self._note(task, made, skipped=not finite)
        return finite

    def _is_finite(self, task: "Task", sums: Sums, optimizer: Any) -> bool:
        gradients = [] if self.has_scaler else gradients_of(optimizer)  # a scaler checks the gradient itself
        if not gradients:
            return math.isfinite(sums.loss)
        if task.device.type == "cpu" and task.device_mesh is None:  # nothing to wait for, and gradients are whole
            total = sums.loss
            for gradient in gradients:
                total += gradient.sum().item()
            # A sum of large numbers may overflow.
            return cmath.isfinite(total) or (
                math.isfinite(sums.loss) and all(bool(gradient.isfinite().all()) for gradient in gradients)
            )
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        return math.isfinite(full(torch.stack(norms).sum()) + sums.loss)  # read once

    # On the device

    def start(self, device: torch.device) -> Ledger:
        """Return what the device writes its decisions into."""
        if self.ledger is None:
            self.ledger = Ledger(device)
        return self.ledger

    def add(self, task: "Task", made: Made, loss: Number) -> None:
        """Add a step that the device has checked, and handle the steps of which the host now knows."""
        assert self.ledger is not None
        seen = self.ledger.add(made, loss)
        if seen is not None:
            self._handle(task, seen)

    def settle(self, task: "Task") -> None:
        """Wait for the device, and handle all steps that it has checked.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        if self.ledger is not None and len(self.ledger):
            for seen in self.ledger.settle():
                self._handle(task, seen)

    def _handle(self, task: "Task", seen: Seen) -> None:
        task._measures.add(Sums(seen.loss, seen.count))
        for made, skipped in seen.steps:
            self._note(task, made, skipped)

    # What was skipped

    def _note(self, task: "Task", made: Made, skipped: bool) -> None:
        if made.step != self._step:  # else it is another turn on the same batch, by any player
            self._step, self._before, self.skipped_in_a_row = made.step, self.skipped_in_a_row, 0
        if not skipped or self.skipped_in_a_row:
            return
        self.skipped_in_a_row = self._before + 1
        data = task.data
        assert data.plan is not None
        examples = data.order.indices(made.epoch, *data.plan.bounds(made.step)).tolist()
        path = Path(task.trainer.default_root_dir) / "skipped.csv"
        if task.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)  # where nothing else is kept, nobody has made it
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

    # Evaluations

    def start_evaluation(self) -> None:
        """Begin an evaluation."""
        self._evaluated.clear()

    def look(self, batch: MicroBatch, given: Any) -> None:
        """Note whose losses of an evaluation are not finite. Nothing waits for the device."""
        for term in given.values() if isinstance(given, dict) else [given]:
            losses, weights = term if isinstance(term, tuple) else (term, None)
            if isinstance(losses, Tensor) and losses.shape[:1] == batch.index.shape:
                wrong = ~losses.detach().isfinite()
                if isinstance(weights, Tensor) and weights.shape == wrong.shape:
                    wrong &= send(weights != 0, wrong.device)
                self._evaluated.append((batch.index, wrong.reshape(len(batch), -1).any(1)))

    def end_evaluation(self, task: "Task", stage: str, loss: float) -> None:
        """If the mean loss of an evaluation is not finite, warn of the examples. All devices must call it."""
        if math.isfinite(loss):
            return
        found: list[Any] = [index[wrong.cpu()].tolist() for index, wrong in self._evaluated]
        if task.trainer.world_size > 1:
            found = [part for parts in gather_objects(found) for part in parts]
        wrong = sorted(set(chain.from_iterable(found)))
        if wrong and task.trainer.is_global_zero:
            warnings.warn(
                f"{stage}/loss is {loss}: the loss of {numbers(wrong)} of the {stage} split is not finite "
                f"({len(wrong):,} in all): look there for values that are missing or infinite",
                stacklevel=2,
            )
