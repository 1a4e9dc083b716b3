"""Optimizers and schedules of a user's own, given as Lightning documents it; and what callbacks do to rates."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateMonitor
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from batchwise.batching.schedule import Adaptive, Milestones
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.errors import Mistake
from batchwise.optim.schedule import Schedule

STEPS = 28  # four epochs


def flat() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    first, second = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.02}]


OPTIMIZERS = {
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=0.05),
    "two groups": lambda module: torch.optim.AdamW(two_groups(module), lr=0.05),
    "NAdam": lambda module: torch.optim.NAdam(module.parameters(), lr=0.02),
    "RMSprop": lambda module: torch.optim.RMSprop(module.parameters(), lr=0.01),
}


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    rates = [group["lr"] for group in optimizer.param_groups]
    momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    momentum &= not isinstance(optimizer, torch.optim.RMSprop)
    return OneCycleLR(optimizer, rates, total_steps=STEPS + 1, cycle_momentum=momentum)


SCHEDULERS: dict[str, tuple[Any, str]] = {
    "OneCycleLR by step": (one_cycle, "step"),
    "StepLR by epoch": (lambda optimizer: StepLR(optimizer, 1, 0.5), "epoch"),
    "ReduceLROnPlateau": (lambda optimizer: ReduceLROnPlateau(optimizer, "max", factor=0.7, patience=0), "epoch"),
}


class Own(small.Classify):
    """The documented override."""

    def __init__(self, module: nn.Module, optimizer: str, scheduler: str, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.choice = optimizer, scheduler

    def configure_optimizers(self) -> dict[str, Any]:
        made = OPTIMIZERS[self.choice[0]](self.network)
        scheduler, interval = SCHEDULERS[self.choice[1]]
        settings = {"scheduler": scheduler(made), "interval": interval}
        return {"optimizer": made, "lr_scheduler": settings | {"monitor": "val/loss"}}


class Watch(Callback):
    """Notes the rates that are used."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def reference(optimizer: str, scheduler: str, data: small.Points) -> tuple[nn.Module, list[list[float]]]:
    """The same in plain PyTorch: weights, and rates per step."""
    module = flat()
    made = OPTIMIZERS[optimizer](module)
    steps, interval = SCHEDULERS[scheduler]
    schedule, rates = steps(made), [[group["lr"] for group in made.param_groups]]

    def after_step(step: int) -> None:
        if interval == "step":
            schedule.step()
        elif step % 7 == 6:
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(module(data.x), data.y)
            schedule.step(*([loss.float()] if isinstance(schedule, ReduceLROnPlateau) else []))
        rates.append([group["lr"] for group in made.param_groups])

    small.plain_loop(module, data, made, STEPS, after_step)
    return module, rates[:-1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.slow
def test_the_documented_override(optimizer: str, scheduler: str) -> None:
    watch, data = Watch(), small.Points(micro_batch_size=4)
    task, _ = small.fit(Own(flat(), optimizer, scheduler), data, max_epochs=4, callbacks=[watch])
    module, rates = reference(optimizer, scheduler, data)
    assert len({rate[0] for rate in rates}) >= 2
    assert list(chain(*watch.rates)) == pytest.approx(list(chain(*rates)), rel=1e-12)
    assert small.furthest(task.network, module) < 1e-12
    # And stopped within the second epoch, then gone on with.
    settings: dict[str, Any] = {"enable_checkpointing": True}
    small.fit(Own(flat(), optimizer, scheduler), small.Points(), max_steps=10, callbacks=[Last()], **settings)
    on = Watch()
    again, _ = small.fit(
        Own(flat(), optimizer, scheduler), small.Points(), max_epochs=4, callbacks=[on, Last()],
        ckpt_path=str(Path("checkpoints/last.ckpt").absolute()), **settings,
    )  # fmt: skip
    assert list(chain(*on.rates)) == pytest.approx(list(chain(*rates[10:])), rel=1e-12)
    assert small.furthest(again.network, module) < 1e-12


class Super(small.Classify):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}}


def test_theirs_wins_and_a_line_says_so(capsys: pytest.CaptureFixture) -> None:
    watch = Watch()
    cosine = Schedule("cosine", warmup=0.1)
    small.fit(Super(small.network(), optimizer=small.adamw, schedule=cosine), max_epochs=1, callbacks=[watch])
    assert [rate for (rate,) in watch.rates] == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125, 0.00625])
    assert "configure_optimizers gives a scheduler, so model.schedule does nothing" in capsys.readouterr().out
    small.fit(Own(flat(), "SGD", "StepLR by epoch", schedule=cosine), max_epochs=1, callbacks=[watch])
    assert "configure_optimizers gives the optimizer, so model.schedule" in capsys.readouterr().out


class Constant(small.Classify):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda _: 1.0)}


@pytest.mark.parametrize(
    "grows", [Milestones([20], examples=[30]), Adaptive(60), None], ids=lambda one: type(one).__name__
)
def test_what_no_longer_follows_a_growing_batch_is_said(grows: Any, capsys: pytest.CaptureFixture) -> None:
    data: dict[str, Any] = {"batch_size_schedule": grows} if grows else {}
    settings: dict[str, Any] = {"callbacks": [NoiseScale()]} if isinstance(grows, Adaptive) else {}
    task = Constant(small.network(), optimizer=small.adamw, reference_batch_size=5)
    small.fit(task, small.Points(micro_batch_size=5, **data), max_epochs=1, **settings)
    out = capsys.readouterr().out
    line = "follows the batch stay at what they are for 10, though data.batch_size_schedule changes it: write model.sch"
    assert out.count(line) == (grows is not None)


class Long(small.Classify):
    """A schedule over the whole training, and then whatever length that has."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(flat())
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = self.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warm(optimizer: Any, steps: int) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, total_iters=3), CosineAnnealingLR(optimizer, steps - 3)], [3])


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (CosineAnnealingLR, "CosineAnnealingLR.T_max 14, and is now made with 28"),
        (lambda o, steps: PolynomialLR(o, steps), "PolynomialLR.total_iters 14, and is now made with 28"),
        (lambda o, steps: OneCycleLR(o, 0.1, steps), "OneCycleLR.total_steps 14, and is now made with 28"),
        (lambda o, steps: MultiStepLR(o, [steps // 2]), "MultiStepLR.milestones [7], and is now made with [14]"),
        (warm, "SequentialLR[1].T_max 11, and is now made with 25"),
        (lambda o, steps: ChainedScheduler([CosineAnnealingLR(o, steps)]), "ChainedScheduler[0].T_max 14, and is now"),
        (lambda o, steps: LambdaLR(o, lambda step: 1 - step / steps), None),
        (lambda o, _: SequentialLR(o, [LinearLR(o, total_iters=3), StepLR(o, 4)], [3]), None),
        (lambda o, _: CosineAnnealingWarmRestarts(o, 5, 2), None),
        (lambda o, _: CyclicLR(o, 0.01, 0.1, 4), None),
    ],
)
@pytest.mark.slow
def test_a_resume_of_another_length_is_refused_where_the_schedule_has_one(scheduler: Any, words: str | None) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True, "ckpt_path": None}
    small.fit(Long(scheduler), max_epochs=2, callbacks=[Last()], **settings)
    settings["ckpt_path"] = str(Path("checkpoints/last.ckpt").absolute())
    small.fit(Long(scheduler), max_epochs=2, callbacks=[Last()], **settings)  # the same length
    if words is None:
        _, trainer = small.fit(Long(scheduler), max_epochs=4, callbacks=[Last()], **settings)
        assert trainer.global_step == STEPS
        return
    with pytest.raises(Mistake, match=re.escape(f"last.ckpt is of a training with {words}")) as error:
        small.fit(Long(scheduler), max_epochs=4, callbacks=[Last()], **settings)
    assert len(str(error.value).splitlines()) == 1


class Cut(Callback):
    """Sets a rate from a step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.step == 3:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.001


def test_a_rate_that_a_callback_sets_stays(capsys: pytest.CaptureFixture) -> None:
    watch, settings = Watch(), {"schedule": Schedule("linear"), "optimizer": small.adamw}
    checkpoints: dict[str, Any] = {"enable_checkpointing": True}
    whole, _ = small.fit(small.Classify(small.network(), **settings), max_epochs=2, callbacks=[Cut(), watch])
    rates = [rate for (rate,) in watch.rates]
    assert rates[:3] == pytest.approx([0.05 * (1 - step * 10 / 128) for step in range(3)])
    assert rates[3:] == [0.001] * 11
    assert capsys.readouterr().out.count("step 3: a callback sets the learning rate of group 0") == 1
    # It also stays after a resume, in which the callback has nothing more to set.
    # A resumed training has the schedule of the whole one, so that its length is given.
    stopped = small.trainer(max_epochs=2, callbacks=[Cut(), Last(), Stop(5)], **checkpoints)
    stopped.fit(small.Classify(small.network(), **settings), datamodule=small.Points())
    on, last = Watch(), str(Path("checkpoints/last.ckpt").absolute())
    again, _ = small.fit(
        small.Classify(small.network(), **settings), max_epochs=2, callbacks=[Cut(), on, Last()], ckpt_path=last,
        **checkpoints,
    )  # fmt: skip
    assert [rate for (rate,) in on.rates] == [0.001] * 9
    assert small.furthest(again, whole) < 1e-13


class Decay(Callback):
    """Sets other settings: one before training, two in its middle."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].param_groups[0]["eps"] = 1e-4

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.optimizers[0].param_groups[0].update(weight_decay=3.0, betas=(0.5, 0.7))


def test_other_settings_that_a_callback_sets_stay(capsys: pytest.CaptureFixture) -> None:
    """Also through a change of the batch size, which they would follow, and a resume."""

    def run(*callbacks: Any, **more: Any) -> tuple[Any, Any]:
        growth = {"batch_size": 10, "batch_size_schedule": Milestones([20], examples=[80])}
        task = small.Classify(small.network(), optimizer=small.adamw, reference_batch_size=10)
        trainer = small.trainer(max_epochs=2, callbacks=[Decay(), *callbacks], enable_checkpointing=True)
        trainer.fit(task, datamodule=small.Points(**growth), **more)
        return task, trainer.optimizers[0].param_groups[0]

    whole, group = run()
    assert (group["weight_decay"], group["betas"], group["eps"]) == (3.0, (0.5, 0.7), 1e-4)
    assert group["lr"] == pytest.approx(0.05 * 2**0.5)  # nobody has set it
    said = capsys.readouterr().out
    for line in (
        "step 0: a callback sets eps",
        "step 5: a callback sets betas",
        "step 5: a callback sets weight_decay",
    ):
        assert said.count(line) == 1
    run(Last(), Stop(5))  # saved before the next step has seen the change
    again, group = run(Last(), ckpt_path=str(Path("checkpoints/last.ckpt").absolute()))
    assert (group["weight_decay"], group["betas"], group["eps"]) == (3.0, (0.5, 0.7), 1e-4)
    assert small.furthest(again, whole) < 1e-13


class Counting(torch.optim.SGD):
    """Keeps what it has counted in its groups, as Prodigy and ScheduleFree do. Its steps become smaller."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.1)
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["count"])


def test_what_an_optimizer_counts_in_its_groups_is_no_setting_of_a_callback(capsys: pytest.CaptureFixture) -> None:
    def run(*callbacks: Any, **more: Any) -> Any:
        task, _ = small.fit(
            small.Classify(small.network(), optimizer=Counting),
            max_epochs=2, callbacks=list(callbacks), enable_checkpointing=True, **more,
        )  # fmt: skip
        return task

    whole = run()
    run(Last(), Stop(5))
    again = run(Last(), ckpt_path=str(Path("checkpoints/last.ckpt").absolute()))
    assert small.furthest(again, whole) < 1e-13
    assert "a callback sets" not in capsys.readouterr().out


class Stop(Callback):
    """Asks for an end after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def test_a_group_that_is_added_later_keeps_its_rate() -> None:
    class Thaw(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.network[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.network[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": pl_module.network[0].parameters(), "lr": 0.007})

    watch = Watch()
    first = small.network()[0].weight
    task = small.Classify(small.network(), optimizer=small.adamw, schedule=Schedule("linear"))
    small.fit(task, max_epochs=2, callbacks=[Thaw(), watch])
    assert [rates[1:] for rates in watch.rates] == [[]] * 7 + [[0.007]] * 7
    assert len({rates[0] for rates in watch.rates}) == 14
    assert not torch.equal(task.network[0].weight, first)  # type: ignore[index]


@pytest.mark.parametrize("given", ["argument", "override"])
def test_lbfgs_is_refused_however_it_is_given(given: str) -> None:
    class Given(small.Classify):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    task = Given(flat()) if given == "override" else small.Classify(flat(), optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times per step: write another optimizer"):
        small.fit(task)


class Experts(nn.Module):
    """One of two experts sees each example; the second one only from the third epoch on, or it never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.second(inputs) if self.training and self.calls % 5 == 4 else self.first(inputs)


@pytest.mark.parametrize("momentum", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_fused_sgd_trains_where_a_parameter_has_no_gradient(momentum: dict[str, Any]) -> None:
    def made(fused: bool) -> small.Classify:
        return small.Classify(Experts(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, fused=fused, **momentum))

    ours, trainer = small.fit(small.Classify(Experts(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, **momentum)))
    assert trainer.optimizers[0].param_groups[0]["fused"]
    plain, _ = small.fit(made(False))
    assert small.furthest(ours, plain) < 1e-14


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true"])
@pytest.mark.slow
def test_nadam_resumes_exactly(precision: str) -> None:
    """It counts in a type of its own, which PyTorch rounds to that of the weights when it loads a state."""
    settings: dict[str, Any] = {"precision": precision, "enable_checkpointing": True, "max_epochs": 3}

    def task() -> small.Classify:
        network = flat().float() if precision == "32-true" else flat()
        return small.Classify(network, optimizer=lambda p: torch.optim.NAdam(p, lr=0.01))

    whole, trainer = small.fit(task(), precision=precision)
    small.fit(task(), callbacks=[Last(), Stop(9)], **settings)
    last = str(Path("checkpoints/last.ckpt").absolute())
    again, on = small.fit(task(), callbacks=[Last()], ckpt_path=last, **settings)
    assert on.global_step == trainer.global_step == 21
    assert small.furthest(again, whole) == 0


def test_lightnings_own_monitor_sees_the_rate_that_is_used() -> None:
    from lightning.pytorch.loggers import CSVLogger

    watch = Watch()
    small.fit(
        small.Classify(small.network(), optimizer=small.adamw, schedule=Schedule("linear")), max_epochs=1,
        logger=CSVLogger("."), log_every_n_steps=1, callbacks=[watch, LearningRateMonitor("step"), LambdaCallback()],
    )  # fmt: skip
    import csv

    with next(Path().glob("**/metrics.csv")).open() as file:
        rows = [float(row["learning_rate"]) for row in csv.DictReader(file) if row["learning_rate"]]
    assert rows == pytest.approx([rate for (rate,) in watch.rates])


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_a_rate_that_a_callback_sets_before_the_first_step_counts_from_it(hook: str) -> None:
    def set_rate(trainer: Any, *_: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 0.01

    watch, callback = Watch(), LambdaCallback(**{hook: set_rate})
    task = small.Classify(small.network(), optimizer=small.adamw, schedule=Schedule("linear"))
    small.fit(task, max_epochs=1, callbacks=[callback, watch])
    assert watch.rates == [[0.01]] * 7


def test_a_second_training_begins_anew() -> None:
    """Neither a rate that a callback set in the first one, nor the sums of an epoch that broke off, are in it."""

    class Break(Cut):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.step == 4:
                raise KeyError("broken off")

    settings = {"optimizer": small.adamw, "schedule": Schedule("linear")}
    task, watches = small.Classify(small.network(), **settings), (Watch(), Watch())
    with pytest.raises(KeyError, match="broken off"):
        small.fit(task, callbacks=[Break()])
    task.network.load_state_dict(small.network().state_dict())
    small.fit(task, max_epochs=1, callbacks=[watches[0]])
    other, _ = small.fit(small.Classify(small.network(), **settings), max_epochs=1, callbacks=[watches[1]])
    assert watches[0].rates == watches[1].rates
    assert small.furthest(task, other) == 0
    assert task._measures.epoch_loss == other._measures.epoch_loss
