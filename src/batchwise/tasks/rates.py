"""The learning rate of each step. It is a function of the step number, unless the user sets it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from batchwise.batching.schedule import Adaptive
from batchwise.data.learnt import plain
from batchwise.errors import Mistake
from batchwise.optim.lengths import changed_length
from batchwise.optim.scaling import Scaling
from batchwise.optim.schedule import Schedule
from batchwise.tasks.players import Players

if TYPE_CHECKING:
    from batchwise.batching.plan import BatchPlan
    from batchwise.data.module import DataModule
    from batchwise.tasks.task import Task


_PLAIN = (bool, int, float, str, tuple, type(None))
_EXECUTION = ("fused", "foreach", "capturable", "differentiable")
_FOLLOW = ("lr", "weight_decay", "betas", "alpha", "eps", "momentum")


class Rates:
    """Sets the rate from the batch size and the schedule, and the other settings that follow the batch.

    What the user sets has priority: an optimizer or scheduler from an overridden `configure_optimizers`, and groups,
    settings and schedulers from callbacks. One line then says so.

    Args:
        schedule: the learning rate over the training.
        scaling: how the settings of the optimizer follow the batch.
    """

    def __init__(self, schedule: Schedule, scaling: Scaling) -> None:
        self.schedule, self.scaling = schedule, scaling
        self.base: list[float] = []
        """The rate of each group at the current batch size, without the schedule."""
        self.taken: set[tuple[int, str]] = set()
        """What callbacks set: the numbers of groups, and the settings."""
        self.settings: dict[str, Any] = {}
        """Settings of the optimizer, in plain types, as far as the engine makes it. They decide the result."""
        self._optimizer: Optimizer | None = None
        self._settings: list[dict[str, Any]] = []
        self._set: list[dict[str, Any]] = []  # as the engine has left them
        self._follows: int | None = None
        self._total = math.inf
        self._single = False

    def refer(self, batch_size: int) -> None:
        """Take the settings as those for a batch size, unless the user says which one they are for."""
        self.scaling = replace(self.scaling, reference=self.scaling.reference or batch_size)

    def times(self, factor: float) -> float | None:
        """Multiply the configured rates, those at other batch sizes too. Do it before the first step.

        Returns:
            The rate of the first group, at this batch size; None: `configure_optimizers` of the task sets the rates.
        """
        if self._optimizer is None:
            return None
        for settings in self._settings:
            settings["lr"] *= factor
        self.base = [rate * factor for rate in self.base]
        return self.base[0]

    def note(self, optimizer: Optimizer) -> None:
        """Note the settings of an optimizer, for a checkpoint of this training."""
        groups = {}
        for number, group in enumerate(optimizer.param_groups):
            values = {key: value.item() if _is_number(value) else value for key, value in group.items()}
            groups[str(number)] = {
                key: value for key, value in values.items() if isinstance(value, _PLAIN) and key not in _EXECUTION
            }
        settings = {"optimizer": type(optimizer).__name__, "groups": groups}
        self.settings = plain(settings | {"schedule": asdict(self.schedule), "scaling": asdict(self.scaling)}, "model")

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
        changes = task.data.batch_size_schedule
        assert plan is not None
        # A captured step reads the rate in single precision. So that it need not matter which steps are captured:
        self._single = bool(getattr(trainer, "capture", None))
        if optimizer is None or optimizer is not trainer.optimizers[0]:
            self._optimizer = None
            if self.schedule != Schedule() or self.scaling.reference is not None:
                self._say(task, "configure_optimizers gives the optimizer, so model.schedule and scaling do nothing")
            return
        if trainer.lr_scheduler_configs:
            self._optimizer = None
            if self.schedule != Schedule():
                self._say(task, "configure_optimizers gives a scheduler, so model.schedule does nothing")
            if self.scaling.reference is not None and (plan.changes or isinstance(changes, Adaptive)):
                self._say(
                    task,
                    "configure_optimizers gives a scheduler, so the rate and all else that follows the batch stay at "
                    f"what they are for {plan.batch_size}, though data.batch_size_schedule changes it: write "
                    "model.schedule, or let the scheduler set them",
                )
            return
        if not trainer.ckpt_path:  # else the groups have what the checkpoint says
            self.look(task)
        for number, (group, settings) in enumerate(zip(optimizer.param_groups, self._settings, strict=False)):
            group.update({key: value for key, value in settings.items() if (number, key) not in self.taken})
        before = max(0, trainer.global_step - 1)  # callbacks may read the rate of the last step
        self._follow(task, plan.size_at(before))
        self._apply(optimizer, plan, before)

    def check_lengths(self, task: "Task", checkpoint: Mapping[str, Any]) -> None:
        """Compare new schedulers of the user's with those of a checkpoint, before they take its states.

        Raises:
            Mistake: one was made for another length of the training.
        """
        for config, state in zip(task.trainer.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False):
            if change := changed_length(config.scheduler, state):
                raise Mistake(
                    f"ckpt_path {task.trainer.ckpt_path} is of a training with {change}, but a resume keeps the old "
                    "one, and the rate would go wrong: write the old length (trainer.max_epochs, max_steps), "
                    "model.schedule in place of the scheduler, or model.init_from in place of ckpt_path"
                )

    def set(self, task: "Task", step: int) -> None:
        """Set the rates of a step."""
        optimizer, plan = self._optimizer, task.data.plan
        if optimizer is None or plan is None:
            return
        self.look(task)
        if plan.changes and plan.size_at(step) != self._follows:
            self._say(task, f"step {step:,}: batch_size {plan.size_at(step)} from here")
            self._follow(task, plan.size_at(step))
        self._apply(optimizer, plan, step)

    def look(self, task: "Task") -> None:
        """Note which settings callbacks have changed since the rates of a step were set last."""
        optimizer, step = self._optimizer, task.trainer.global_step
        if optimizer is None:
            return
        if task.trainer.lr_scheduler_configs:
            rates = {(number, "lr") for number in range(len(self._settings))}
            if not rates <= self.taken:
                self.taken |= rates
                self._say(task, f"step {step:,}: a callback gives a scheduler, which sets the learning rate from here")
        # Groups that callbacks have added come last.
        for number, (group, before) in enumerate(zip(optimizer.param_groups, self._set, strict=False)):
            for key, value in before.items():
                if group[key] != value and (number, key) not in self.taken:
                    self.taken.add((number, key))
                    name = "the learning rate" if key == "lr" else key
                    if key in _FOLLOW:  # others may be what the optimizer has counted: they stay, too
                        self._say(task, f"step {step:,}: a callback sets {name} of group {number}: it keeps it")

    def _apply(self, optimizer: Optimizer, plan: "BatchPlan", step: int) -> None:
        """Set the rates for a step: base rate times schedule, except where a callback sets the rate."""
        factor = 1.0
        if not self.schedule.is_constant:
            factor = self.schedule.factor(plan.examples_at(step), plan.examples_at(step + 1), self._total)
        groups = optimizer.param_groups[: len(self._settings)]
        for number, (group, rate) in enumerate(zip(groups, self.base, strict=True)):
            if (number, "lr") not in self.taken:
                rate = float(np.float32(rate * factor)) if self._single else rate * factor
                group["lr"] = self._set[number]["lr"] = rate

    def _follow(self, task: "Task", batch_size: int) -> None:
        """Set the rate and all other settings that follow the batch to their values at a batch size."""
        optimizer = self._optimizer
        assert optimizer is not None
        groups = optimizer.param_groups[: len(self._settings)]
        before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for group, settings in zip(groups, self._settings, strict=True):
            group.update({key: settings[key] for key in _FOLLOW if key in settings})
        each = optimizer.players.values() if isinstance(optimizer, Players) else [optimizer]
        lines = [line for one in each for line in self.scaling.apply(one, batch_size)]
        for number, (group, settings) in enumerate(zip(optimizer.param_groups, before, strict=True)):
            theirs = number >= len(groups)  # a callback has added it
            group.update({key: value for key, value in settings.items() if theirs or (number, key) in self.taken})
        for line in lines if batch_size != self._follows else []:
            self._say(task, line)
        task._step.captured.stale = True
        self._set = [
            {key: group[key] for key in settings if key not in _EXECUTION and isinstance(group[key], _PLAIN)}
            for group, settings in zip(groups, self._settings, strict=True)
        ]
        self.base = [group["lr"] for group in groups]
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


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
