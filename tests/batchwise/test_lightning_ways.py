"""What Lightning's documentation says one can do: it works, with the right weights, or one line says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import small
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from batchwise import MicroBatch, Schedule
from batchwise.callbacks.checkpoint import Last
from batchwise.errors import Mistake
from batchwise.models.norm import GhostBatchNorm
from batchwise.tasks.classification import Classification
from batchwise.tasks.regression import Regression

SAVING: dict[str, Any] = {"enable_checkpointing": True}


def flat() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def last() -> str:
    return str(Path("checkpoints/last.ckpt").absolute())


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def gone_on_with(task: Callable[[], Any], callbacks: Callable[[], list[Callback]], step: int, **more: Any) -> Any:
    """Train as a whole, and stopped after a step and gone on with; return both tasks."""
    settings = SAVING | more
    whole, _ = small.fit(task(), callbacks=[*callbacks(), Last()], default_root_dir=Path("whole"), **settings)
    small.fit(task(), callbacks=[*callbacks(), Last(), Stop(step)], **settings)
    again, trainer = small.fit(task(), callbacks=[*callbacks(), Last()], ckpt_path=last(), **settings)
    assert trainer.global_step == 7 * (trainer.max_epochs or 0)
    return whole, again


def usual(**kwargs: Any) -> small.Classify:
    settings: dict[str, Any] = {"optimizer": small.adamw} | kwargs
    return small.Classify(small.network(), **settings)


# Optimizers

SEVERAL: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "with schedulers": lambda a, b: ([a, b], [StepLR(a, 1)]),
    "dictionaries": lambda a, b: ({"optimizer": a}, {"optimizer": b, "lr_scheduler": StepLR(b, 1)}),
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_optimizers_are_refused(form: str) -> None:
    class Own(small.Classify):
        def configure_optimizers(self) -> Any:
            return SEVERAL[form](sgd(self.network[0].parameters()), sgd(self.network[2].parameters()))  # type: ignore[index]

    with pytest.raises(
        ValueError, match=r"^configure_optimizers gives several .*batchwise\.tasks\.adversarial\.[^\n]*$"
    ):
        small.fit(Own(flat()))


def test_no_optimizer_is_refused() -> None:
    class Own(small.Classify):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(ValueError, match="configure_optimizers gives None: return an optimizer"):
        small.fit(Own(flat()))


def test_manual_optimization_is_refused() -> None:
    class Own(small.Classify):
        def __init__(self) -> None:
            super().__init__(flat())
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"automatic_optimization is False: leave it out, or .*adversarial"):
        Own()


def test_an_optimizer_may_move_what_is_not_in_the_model() -> None:
    class Own(small.Classify):
        def configure_optimizers(self) -> Any:
            self.outside = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
            return torch.optim.Adam([*self.outside, *self.network.parameters()], lr=0.05)

        def losses(self, batch: MicroBatch) -> Tensor:
            shift = self.outside[0] if self.training else 0
            return F.cross_entropy(self(batch.inputs) + shift, batch.targets, reduction="none")

    small.fit(Own(flat()), callbacks=[Last()], max_epochs=1, **SAVING)
    (state,) = torch.load(last(), weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["params"] == [4, 0, 1, 2, 3]
    assert sorted(state["state"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("how", "limit"), [("norm", 0.1), ("value", 0.01)])
@pytest.mark.parametrize("own", [False, True])
def test_clipping_is_that_of_a_plain_loop(how: str, limit: float, own: bool) -> None:
    class Own(small.Classify):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    data, module = small.Points(micro_batch_size=3), flat()
    task, _ = small.fit(
        (Own if own else small.Classify)(flat(), optimizer=sgd), data, gradient_clip_val=limit,
        gradient_clip_algorithm=how,
    )  # fmt: skip
    assert data.plan is not None
    optimizer = sgd(module.parameters())
    for step in range(21):
        index = data.order.indices(step // 7, *data.plan.bounds(step))
        optimizer.zero_grad()
        F.cross_entropy(module(data.x[index]), data.y[index]).backward()
        getattr(nn.utils, f"clip_grad_{how}_")(module.parameters(), limit)
        optimizer.step()
    assert small.furthest(task.network, module) < 1e-15


# Callbacks


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler cannot change a batch: write data"),
        (LearningRateFinder(), "LearningRateFinder cannot run the exact step: leave it out; the command tune"),
        (BatchSizeFinder(), "BatchSizeFinder cannot run the exact step: leave it out; the command tune"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(callback: Callback, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small.fit(callbacks=[callback])


def test_the_tuner_is_refused() -> None:
    from lightning.pytorch.tuner import Tuner  # pyright: ignore[reportPrivateImportUsage]

    task: Any = usual()
    task.lr = 0.1
    with pytest.raises(ValueError, match="LearningRateFinder cannot run the exact step"):
        Tuner(small.trainer()).lr_find(task, datamodule=small.Points())
    with pytest.raises(ValueError, match="BatchSizeFinder cannot run the exact step"):
        Tuner(small.trainer()).scale_batch_size(task, datamodule=small.Points())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), GhostBatchNorm(8, 5)])
def test_stochastic_weight_averaging_is_refused_with_batch_norm(norm: nn.Module) -> None:
    task = small.Classify(nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double())
    with pytest.raises(ValueError, match=r"leaves the statistics .*: write batchwise\.callbacks\.ema\.EMA"):
        small.fit(task, callbacks=[StochasticWeightAveraging(0.01)])


def test_callbacks_of_lightning_log_under_the_same_steps_after_a_resume() -> None:
    logs = [small.Memory() for _ in range(3)]

    def train(log: small.Memory, **more: Any) -> None:
        monitor = LearningRateMonitor("step")
        small.fit(
            logger=log,
            enable_checkpointing=True,
            log_every_n_steps=2,
            callbacks=[monitor, Last(every_n_steps=5)],
            **more,
        )

    train(logs[0])
    with pytest.raises(RuntimeError, match="power"):
        train(logs[1], task=Cut(small.network(), optimizer=small.adamw))
    train(logs[2], ckpt_path="checkpoints/last.ckpt")
    whole, resumed = (log.found("lr-AdamW") for log in (logs[0], logs[2]))
    assert min(resumed) == 10
    assert resumed == {step: rate for step, rate in whole.items() if step >= 10}


class Cut(small.Classify):
    """Fails in step 12."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch.step == 12:
            raise RuntimeError("power")


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.01, 2, 2)


def test_stochastic_weight_averaging() -> None:
    """The result is the mean of the weights where epochs begin; its scheduler takes the place of ours at once."""
    begun: list[list[Tensor]] = []
    rates: list[float] = []
    watch = LambdaCallback(
        on_train_epoch_start=lambda _, module: begun.append([p.detach().clone() for p in module.parameters()]),
        on_before_optimizer_step=lambda *a: rates.append(a[2].param_groups[0]["lr"]),
    )
    task, _ = small.fit(usual(schedule=Schedule("linear")), callbacks=[swa(), watch], max_epochs=5)
    means = [sum(weights) / 4 for weights in zip(*begun[1:], strict=True)]
    assert max(float((p - mean).abs().max()) for p, mean in zip(task.parameters(), means, strict=True)) < 1e-15
    assert len(set(rates[:7])) == 7
    assert rates[7:14] == [rates[6]] * 7
    assert rates[-14:] == pytest.approx([0.01] * 14)


@pytest.mark.parametrize("callback", [swa, lambda: EMAWeightAveraging(decay=0.9)])
@pytest.mark.parametrize("step", [5, 7, 23])  # resumed in its first epoch, Lightning's SWA goes on with a wrong rate
@pytest.mark.slow
def test_averaging_is_gone_on_with(callback: Callable[[], Callback], step: int) -> None:
    whole, again = gone_on_with(lambda: usual(schedule=Schedule("linear")), lambda: [callback()], step, max_epochs=5)
    assert small.furthest(whole, again) == 0


class WithBackbone(small.Classify):
    @property
    def backbone(self) -> nn.Module:
        return self.network[0]  # type: ignore[index]


class FreezeLater(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(False)


class ThawLater(Callback):
    """Freezes in a hook that a resume calls again."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, pl_module: pl_module.backbone.requires_grad_(False))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: BackboneFinetuning(1, lambda _: 2.0, backbone_initial_lr=0.01),
        FreezeLater,
        lambda: ThawLater("on_fit_start"),
        lambda: ThawLater("on_train_start"),
    ],
)
@pytest.mark.parametrize("step", [3, 7, 9, 15])
@pytest.mark.slow
def test_what_a_callback_has_thawed_or_frozen_is_so_after_a_resume(callback: Any, step: int) -> None:
    whole, again = gone_on_with(
        lambda: WithBackbone(small.network(), optimizer=small.adamw), lambda: [callback()], step
    )
    assert small.furthest(whole, again) == 0


class Validated(Callback):
    """Notes the steps after which validation began, in all trainings."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("step", [2, 5, 8])
def test_after_a_resume_validation_is_due_at_the_same_steps(step: int) -> None:
    """Counted over epochs. A training that breaks off goes on where a checkpoint was saved before a step."""

    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                raise RuntimeError("power")

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> None:
        saving = [*callbacks, Last(every_n_steps=1)]
        by_steps: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None}
        small.fit(usual(), callbacks=saving, ckpt_path=ckpt_path, **SAVING, **by_steps)

    validated = Validated()
    with pytest.raises(RuntimeError, match="power"):
        run(validated, Breaks())
    run(validated, ckpt_path=last())
    assert validated.steps == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.slow
def test_a_plateau_is_found_by_what_was_measured_before_a_resume(strict: bool) -> None:
    class Own(small.Classify):
        def configure_optimizers(self) -> Any:
            optimizer = small.adamw(self.parameters())
            plateau = ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss", "strict": strict},
            }

    # Validation is after 4 of the 7 steps of an epoch, and the scheduler looks at the end of the epoch.
    whole, again = gone_on_with(lambda: Own(small.network()), lambda: [], 12, val_check_interval=4)
    assert small.furthest(whole, again) == 0


@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_train_steps": 7}, {"monitor": "val/loss"}])
@pytest.mark.slow
def test_training_goes_on_from_each_file_of_model_checkpoint(when: dict[str, Any]) -> None:
    whole, _ = small.fit(callbacks=[ModelCheckpoint("kept", save_top_k=-1, **when)], **SAVING)
    files = sorted(Path("kept").glob("*.ckpt"))
    assert len(files) in (3, 5)
    for path in files:
        again, trainer = small.fit(ckpt_path=str(path))
        assert trainer.global_step == 21
        assert small.furthest(again, whole) == 0


class Counts(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls.append("zero")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.calls.append("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls.append("end")


def test_who_comes_later_is_heard_from_the_next_epoch_on() -> None:
    counts = Counts()

    class Adds(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.callbacks.append(counts)
                pl_module.on_after_backward = lambda: counts.calls.append("backward")

    small.fit(callbacks=[Adds()])
    assert counts.calls == ["zero", "backward", "step", "end"] * 14


# Arguments of the trainer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overfit_batches": 2}, "trainer.overfit_batches is 2: leave it out, and write trainer.limit_train_batches"),
        ({"barebones": True}, "trainer.barebones is True: leave it out, and write trainer.logger"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0: write at least 1"),
        ({"limit_train_batches": 0.0}, "trainer.limit_train_batches is 0: write at least 1"),
    ],
)
def test_arguments_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small.fit(**settings)


# Evaluation, and one thing after another


def test_validate_and_test_return_what_was_measured() -> None:
    task, trainer = small.fit()
    measured = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert measured.keys() == {"val/loss", "val/accuracy"}
    (found,) = trainer.validate(task, datamodule=small.Points(), verbose=False)
    assert found == measured
    (found,) = trainer.test(task, datamodule=small.Points(), verbose=False)
    assert found == {name.replace("val", "test"): value for name, value in measured.items()}


def test_a_test_is_in_the_log_once() -> None:
    logger = CSVLogger(".", "log")
    small.trainer(logger=logger).test(usual(), datamodule=small.Points(), verbose=False)
    logger.save()
    header, *rows = (Path("log") / "version_0" / "metrics.csv").read_text().splitlines()
    assert "test/accuracy" in header
    assert len(rows) == 1


class Numbers(small.Points):
    def load(self, split: str) -> tuple[Tensor, Tensor]:
        return self.x, self.x[:, :2] * 5 + 100


def two_numbers() -> Regression:
    torch.manual_seed(1)
    return Regression(nn.Linear(5, 2).double(), optimizer=small.adamw)


TASKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "standardised": (two_numbers, Numbers),
    "balanced": (lambda: Classification(flat(), optimizer=small.adamw, class_weights="balanced"), small.Points),
    "init_from": (lambda: usual(init_from=last()), small.Points),
}


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_before_the_training_changes_nothing(name: str) -> None:
    small.fit(max_epochs=1, callbacks=[Last()], **SAVING)
    make, points = TASKS[name]
    reference, _ = small.fit(make(), points())
    task, data = make(), points()
    small.trainer().validate(task, datamodule=data, verbose=False)
    small.trainer().test(task, datamodule=points(), verbose=False)
    small.fit(task, data)
    assert small.furthest(task, reference) == 0


def test_other_data_is_checked_too() -> None:
    class Others(small.Points):
        def load(self, split: str) -> tuple[Tensor, Tensor]:
            return self.x, self.y + 1

    task = Classification(flat(), optimizer=small.adamw)
    small.fit(task, max_epochs=1)
    with pytest.raises(ValueError, match=r"label 3 .* but model\.network has 3 outputs"):
        small.fit(task, Others())


@pytest.mark.parametrize("step", [3, 9])  # for the latter, a row is written to the log
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_training_after_one_that_broke_off_in_a_step(error: type[BaseException], step: int) -> None:
    class Breaks(small.Classify):
        broken = False

        def losses(self, batch: MicroBatch) -> Tensor:
            losses = super().losses(batch)
            if self.training and not self.broken and self.trainer.global_step == step:
                self.broken = True
                raise error
            return losses

    data = small.Points(micro_batch_size=4)
    reference, _ = small.fit(data=small.Points(micro_batch_size=4))
    task = Breaks(small.network(), optimizer=small.adamw)
    with pytest.raises((KeyError, SystemExit)):  # Lightning makes an exit of an interrupt
        small.fit(task, data)
    task.network.load_state_dict(small.network().state_dict())
    _, trainer = small.fit(task, data)
    assert trainer.global_step == 21
    assert small.furthest(task, reference) == 0


def test_the_same_trainer_goes_on_with_more_epochs() -> None:
    reference, _ = small.fit(usual(optimizer=sgd), max_epochs=5)
    task, data, trainer = usual(optimizer=sgd), small.Points(), small.trainer()
    trainer.fit(task, datamodule=data)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 35
    assert small.furthest(task, reference) == 0


def configured(kind: type[small.Task], network: nn.Module) -> Any:
    """A task without arguments, as `load_from_checkpoint` makes it."""

    class Own(kind):
        def __init__(self, rate: float = 0.05) -> None:
            super().__init__(network, optimizer=small.adamw)
            self.save_hyperparameters()

    return Own


@pytest.mark.parametrize(
    ("kind", "network", "data"),
    [(small.Classify, flat(), small.Points), (Regression, nn.Linear(5, 2).double(), Numbers)],
)
def test_load_from_checkpoint(kind: Any, network: nn.Module, data: Any) -> None:
    import copy

    task, _ = small.fit(configured(kind, network)(), data(), callbacks=[Last()], max_epochs=1, **SAVING)
    own = configured(kind, copy.deepcopy(network))
    loaded = own.load_from_checkpoint(last(), weights_only=True)
    assert loaded.state_dict().keys() == task.state_dict().keys()
    assert small.furthest(loaded, task) == 0


# Logging


class Logs(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        self.log("mine" if self.training else "val/mine", losses.mean(), on_epoch=True)
        return losses


@pytest.mark.parametrize("micro_batch_size", [None, 3, 4])
def test_what_losses_logs_is_a_mean_over_examples(micro_batch_size: int | None) -> None:
    """Also of micro-batches of unequal sizes: 10 = 4 + 3 + 3, and 4 = 2 + 2 in the last batch of an epoch."""
    data = small.Points(micro_batch_size=micro_batch_size, eval_batch_size=9)
    task, trainer = small.fit(Logs(small.network(), optimizer=small.adamw), data, max_epochs=2)
    metrics = trainer.callback_metrics
    assert float(metrics["mine"]) == pytest.approx(task._measures.epoch_loss, abs=1e-7)
    assert float(metrics["val/mine"]) == pytest.approx(float(metrics["val/loss"]), abs=1e-7)


# Overrides


class Everything(small.Classify):
    """The optimizer's hooks, overridden as Lightning documents them; each notes its call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[str] = []

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append("on_before_zero_grad")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls.append("optimizer_zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append("backward")
        super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.calls.append("optimizer_step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda _: 1.0), "interval": "step"}]


def test_all_hooks_of_the_optimizer_together() -> None:
    reference, _ = small.fit(data=small.Points(micro_batch_size=5))
    task = Everything(small.network(), optimizer=small.adamw)
    small.fit(task, small.Points(micro_batch_size=5))
    one = ["on_before_zero_grad", "optimizer_zero_grad", "backward", "backward", "optimizer_step", "lr_scheduler_step"]
    assert task.calls[:12] == one * 2
    assert len(task.calls) == 18 * 6 + 3 * 5  # the last batch of an epoch has 4 examples
    assert small.furthest(task, reference) == 0


def test_a_mixin_must_not_override_the_step_either() -> None:
    class Mixin:
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(TypeError, match=r"^Mixin\.validation_step would take the place of the exact step"):
        type("Own", (Mixin, small.Classify), {})


def test_the_rest_of_an_epoch_cannot_be_skipped() -> None:
    class Own(small.Classify):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    with pytest.raises(Mistake, match=r"on_train_batch_start returned -1, .*: write trainer\.limit_train_batches"):
        small.fit(Own(flat()))


def test_a_module_that_is_no_task_is_refused() -> None:
    class Plain(pl.LightningModule):
        def training_step(self, *_: Any) -> None: ...

        def configure_optimizers(self) -> Any: ...

    with pytest.raises(TypeError, match=r"^Plain is no batchwise\.Task"):
        small.trainer().fit(Plain(), datamodule=small.Points())


# Two processes

TWO: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}


class SomeCount(small.Classify):
    """Most micro-batches have no target that counts; in one step there is none at all."""

    def losses(self, batch: MicroBatch) -> Any:
        losses = super().losses(batch)
        none = self.training and self.trainer.global_step == 3
        return losses, torch.zeros_like(losses) if none else (batch.targets == 0).to(losses)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
        self.second.weight = self.first.weight
        self.last = nn.Linear(5, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


class OneIsWrong(small.Classify):
    """In two steps, the loss of the last process is not finite."""

    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        wrong = self.trainer.global_step in (3, 4) and self.trainer.global_rank == self.trainer.world_size - 1
        return losses * float("nan") if self.training and wrong else losses


TWICE: dict[str, tuple[Callable[[], Any], Callable[[], list[Callback]]]] = {
    "weights": (lambda: SomeCount(small.network(), optimizer=small.adamw), list),
    "tied": (lambda: small.Classify(Tied(), optimizer=small.adamw), list),
    "not finite": (lambda: OneIsWrong(small.network(), optimizer=small.adamw), list),
    "SWA": (usual, lambda: [swa()]),
    "EMA": (usual, lambda: [EMAWeightAveraging(decay=0.9)]),
    "thawed": (
        lambda: WithBackbone(small.network(), optimizer=small.adamw),
        lambda: [BackboneFinetuning(1, lambda _: 2.0, backbone_initial_lr=0.01)],
    ),
    "logged": (lambda: Logs(small.network(), optimizer=small.adamw), list),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.slow
def test_two_processes(name: str) -> None:
    make, callbacks = TWICE[name]
    one, _ = small.fit(make(), small.Points(micro_batch_size=1), callbacks=callbacks())
    two, trainer = small.fit(make(), small.Points(micro_batch_size=1), callbacks=callbacks(), **TWO)
    assert small.furthest(one, two) < 1e-14
    assert float(trainer.callback_metrics["val/loss"]) < 1.5


class Later(small.Classify):
    """Its last layer is made in `setup`."""

    def setup(self, stage: str) -> None:
        self.network.add_module("last", nn.Linear(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["lazy", "setup"])
def test_layers_that_are_made_in_fit_follow_the_seed(kind: str) -> None:
    """Lightning seeds again where there are several processes; so what a script has drawn before must not matter."""

    def made(drawn: int) -> nn.Module:
        pl.seed_everything(0, verbose=False)
        layers = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
        if kind == "lazy":
            layers.append(nn.LazyLinear(3, dtype=torch.float64))
        task = (small.Classify if kind == "lazy" else Later)(layers, optimizer=small.adamw)
        if kind == "setup":
            layers.append(nn.Linear(4, 3, dtype=torch.float64))
        torch.rand(drawn)
        small.trainer(max_steps=1).fit(task, datamodule=small.Points())
        return task

    assert small.furthest(made(1), made(9)) < 1e-12
