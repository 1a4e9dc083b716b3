"""The learning rate of each step. It is a function of the step number, unless the user sets it."""

import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from batchwise.optim.scaling import RULES, scale
from batchwise.optim.schedule import Schedule
from batchwise.tasks.players import Players

if TYPE_CHECKING:
    from batchwise.batching.plan import BatchPlan
    from batchwise.data.module import DataModule
    from batchwise.tasks.task import Task


class Rates:
    """Sets the rate from the batch size and the schedule.

    What the user sets has priority: an optimizer or scheduler from an overridden `configure_optimizers`, and groups,
    rates and schedulers from callbacks. One line then says so.

    Args:
        schedule: the learning rate over the training.
        reference: the batch size for which the optimizer's rate is given; None: the rate does not follow the batch.
        rule: how the rate follows the batch; None: by the class of the optimizer.

    Raises:
        ValueError: the rule is not known, or has no reference.
    """

    def __init__(self, schedule: Schedule, reference: int | None, rule: str | None) -> None:
        if reference is not None and reference < 1:
            raise ValueError(f"model.reference_batch_size is {reference}: write a number of examples")
        if rule not in (None, *RULES):
            raise ValueError(f"model.scaling is {rule}: write {', '.join(RULES)}, or null")
        if rule is not None and reference is None:
            raise ValueError(f"model.scaling is {rule}, but model.reference_batch_size is not set: write it too")
        self.schedule, self.reference, self.rule = schedule, reference, rule
        self.base: list[float] = []
        """The rate of each group at the current batch size, without the schedule."""
        self.taken: set[int] = set()
        """Numbers of the groups whose rate a callback sets."""
        self._optimizer: Optimizer | None = None
        self._settings: list[dict[str, Any]] = []
        self._set: list[float] = []
        self._follows: int | None = None
        self._total = math.inf

    def own(self, task: "Task", optimizer: Optimizer) -> None:
        """Set the rates of an optimizer that the task has made."""
        self._optimizer = optimizer
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if task.data.plan is not None:
            self._follow(task, task.data.plan.batch_size)
        self._total = self.examples_in_all(task.data)

    def start(self, task: "Task") -> None:
        """Begin a training, also one that is resumed.

        The settings come from the configuration and not from the checkpoint, because --force allows new ones.
        """
        trainer, optimizer, plan = task.trainer, self._optimizer, task.data.plan
        assert plan is not None
        if optimizer is None or optimizer is not trainer.optimizers[0]:
            self._optimizer = None
            if self.schedule != Schedule() or self.reference is not None:
                self._say(task, "configure_optimizers gives the optimizer, so model.schedule and scaling do nothing")
            return
        if trainer.lr_scheduler_configs:
            self._optimizer = None
            if self.schedule != Schedule():
                self._say(task, "configure_optimizers gives a scheduler, so model.schedule does nothing")
            return
        for number, (group, settings) in enumerate(zip(optimizer.param_groups, self._settings, strict=False)):
            if number not in self.taken:
                group.update(settings)
        before = max(0, trainer.global_step - 1)  # callbacks may read the rate of the last step
        self._follow(task, plan.size_at(before))
        self._apply(optimizer, plan, before)

    def set(self, task: "Task", step: int) -> None:
        """Set the rates of a step."""
        optimizer, plan = self._optimizer, task.data.plan
        if optimizer is None or plan is None:
            return
        groups = optimizer.param_groups[: len(self._settings)]  # callbacks may have added others
        if task.trainer.lr_scheduler_configs and len(self.taken) < len(groups):
            self.taken = set(range(len(groups)))
            self._say(task, f"step {step:,}: a callback gives a scheduler, which sets the learning rate from here")
        for number, (group, before) in enumerate(zip(groups, self._set, strict=False)):
            if group["lr"] != before and number not in self.taken:
                self.taken.add(number)
                self._say(task, f"step {step:,}: a callback sets the learning rate of group {number}: it keeps it")
        if plan.changes and plan.size_at(step) != self._follows:
            self._say(task, f"step {step:,}: batch_size {plan.size_at(step)} from here")
            self._follow(task, plan.size_at(step))
        self._apply(optimizer, plan, step)

    def _apply(self, optimizer: Optimizer, plan: "BatchPlan", step: int) -> None:
        """Set the rates for a step: base rate times schedule, except where a callback sets the rate."""
        factor = 1.0
        if not self.schedule.is_constant:
            factor = self.schedule.factor(plan.examples_at(step), plan.examples_at(step + 1), self._total)
        groups = optimizer.param_groups[: len(self._settings)]
        for number, (group, rate) in enumerate(zip(groups, self.base, strict=True)):
            if number not in self.taken:
                group["lr"] = rate * factor
        self._set = [group["lr"] for group in groups]

    def _follow(self, task: "Task", batch_size: int) -> None:
        """Set the base rate of each group for a batch size. The result depends on the size alone."""
        optimizer = self._optimizer
        assert optimizer is not None
        free = [number for number in range(len(self._settings)) if number not in self.taken]
        kept = {number: optimizer.param_groups[number]["lr"] for number in self.taken}
        for number in free:
            settings = self._settings[number]
            optimizer.param_groups[number].update(
                {key: settings[key] for key in ("lr", "weight_decay") if key in settings}
            )
        if self.reference not in (None, batch_size):
            each = optimizer.players.values() if isinstance(optimizer, Players) else [optimizer]
            for one in each:
                before = one.param_groups[0]["lr"]
                rule = scale(one, batch_size, self.reference, self.rule)
                if batch_size != self._follows:
                    self._say(
                        task,
                        f"learning rate {before:.4g} at {self.reference} examples per step is "
                        f"{one.param_groups[0]['lr']:.4g} at {batch_size} (model.scaling {rule})",
                    )
        for number, rate in kept.items():
            optimizer.param_groups[number]["lr"] = rate
        self.base = [group["lr"] for group in optimizer.param_groups[: len(self._settings)]]
        self._follows = batch_size

    def examples_in_all(self, data: "DataModule") -> float:
        """Return the number of examples in the whole training.

        Raises:
            ValueError: the schedule needs the length of the training, but there is no limit.
        """
        if data.total_steps() == math.inf and self.schedule.needs_end:
            raise ValueError(
                f"model.schedule {self.schedule.shape} needs to know how long training is: "
                "write trainer.max_epochs or trainer.max_steps"
            )
        return data.total_examples()

    def _say(self, task: "Task", line: str) -> None:
        if task.trainer.is_global_zero:
            print(line, flush=True)
