"""Lightning's hooks of a step: how often, in which order, with what; and that they are the user's to override."""

import copy
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import small
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor

from batchwise import Batch, Task
from batchwise.tasks.hooks import STEP_HOOKS

IN_ORDER = {
    1: [
        *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
        *("on_before_optimizer_step", "on_train_batch_end"),
    ],
    4: [
        *("on_train_batch_start", "on_before_zero_grad", *["on_before_backward", "on_after_backward"] * 4),
        *("on_before_optimizer_step", "on_train_batch_end"),
    ],
}
"""By the number of micro-batches, as docs/callbacks.md has it."""


def noted(calls: list[tuple[str, tuple]], name: str, skip: int) -> Any:
    def hook(*arguments: Any) -> None:
        calls.append((name, arguments[skip:]))

    return hook


@pytest.mark.parametrize("parts", IN_ORDER)
def test_step_hooks(parts: int) -> None:
    seen: dict[str, list] = {"callback": [], "module": []}

    class Own(small.Classify):
        pass

    for hook in STEP_HOOKS:
        setattr(Own, hook, noted(seen["module"], hook, 1))
    listener = LambdaCallback(**{hook: noted(seen["callback"], hook, 2) for hook in STEP_HOOKS})
    data = small.Points(batch_size=16, micro_batch_size=16 // parts)
    task, trainer = small.fit(
        Own(small.network(), optimizer=small.adamw), data, max_epochs=1, callbacks=[listener], gradient_clip_val=1.0
    )
    assert trainer.global_step == 4
    for calls in seen.values():
        assert [name for name, _ in calls] == 4 * IN_ORDER[parts]
        for name, arguments in calls:
            if name in ("on_before_zero_grad", "on_before_optimizer_step"):
                (optimizer,) = arguments
                assert optimizer is trainer.optimizers[0]
            elif name == "on_before_backward":
                (loss,) = arguments
                assert loss.ndim == 0
                assert loss.requires_grad
            elif name.startswith("on_train_batch"):
                assert isinstance(arguments[-2], Batch)
        starts = [arguments for name, arguments in calls if name == "on_train_batch_start"]
        assert [(batch.step, index) for batch, index in starts] == [(step, step) for step in range(4)]
    ends = [arguments for name, arguments in seen["callback"] if name == "on_train_batch_end"]
    assert [index for *_, index in ends] == [0, 1, 2, 3]
    losses = [outputs["loss"] for outputs, *_ in ends]
    assert all(loss.dtype == torch.float64 for loss in losses)
    assert torch.stack(losses).mean().item() == pytest.approx(task._measures.epoch_loss, abs=1e-15)


def test_the_loss_of_a_step_is_that_of_the_whole_batch() -> None:
    found = {}
    for parts in (16, 5):
        losses: list[Tensor] = []
        listener = LambdaCallback(on_train_batch_end=lambda *a, losses=losses: losses.append(a[2]["loss"]))
        small.fit(data=small.Points(batch_size=16, micro_batch_size=parts), max_epochs=1, callbacks=[listener])
        found[parts] = torch.stack(losses)
    torch.testing.assert_close(found[16], found[5], rtol=0, atol=1e-15)


class Average(Callback):
    """An exponential moving average of the weights, in one of the hooks that people use."""

    def __init__(self, hook: str) -> None:
        self.mean: list[Tensor] = []
        setattr(self, hook, self.move)

    def move(self, trainer: Any, pl_module: Task, *_: Any) -> None:
        weights = [weight.detach().clone() for weight in pl_module.parameters()]
        self.mean = [old.lerp(new, 0.1) for old, new in zip(self.mean, weights, strict=True)] if self.mean else weights


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_train_batch_end"])
def test_an_average_of_the_weights_does_not_depend_on_micro_batches(hook: str) -> None:
    means = []
    for size in (16, 4, 2):
        average = Average(hook)
        small.fit(data=small.Points(batch_size=16, micro_batch_size=size), callbacks=[average])
        means.append(torch.cat([weight.flatten() for weight in average.mean]))
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(means[2], means[0], rtol=0, atol=1e-13)


def test_callbacks_are_left_as_they_are() -> None:
    """They can be called by hand, wrapped, and used again in another trainer."""

    class Empty(Callback):
        pass

    class Wrapper(Callback):
        def __init__(self, inner: Callback) -> None:
            self.inner, self.calls = inner, 0

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.calls += 1
            self.inner.on_train_batch_end(*arguments)

    empty = Empty()
    wrapper = Wrapper(empty)
    task, trainer = small.fit(callbacks=[empty, wrapper])
    for hook in STEP_HOOKS:
        assert callable(getattr(empty, hook))
        assert callable(getattr(task, hook))
    empty.on_train_batch_end(trainer, task, None, None, 0)
    again = Average("on_train_batch_end")
    small.fit(callbacks=[empty, wrapper, again])
    assert wrapper.calls == 2 * 21
    assert not set(STEP_HOOKS) & set(vars(empty))
    assert again.mean


# Overrides without super()


class Seen(Callback):
    """The figures that an override could spoil."""

    def __init__(self) -> None:
        self.val: list[float] = []
        self.epochs: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Task) -> None:
        self.val.append(float(trainer.callback_metrics["val/loss"]))
        self.epochs.append(pl_module._measures.epoch_loss)


def nothing(*_: Any, **__: Any) -> None:
    """Neither does anything nor calls super()."""


NOT_HERE = (
    *("on_gpu", "on_after_batch_transfer", "on_before_batch_transfer"),  # no hook; refused
    *("on_validation_model_eval", "on_validation_model_train"),  # Lightning itself sets the mode in these
)
HOOKS = [name for name in dir(pl.LightningModule) if name.startswith("on_") and name not in NOT_HERE]
HOOKS += ["setup", "teardown", "prepare_data"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Seen]:
    seen = Seen()
    task, _ = small.fit(callbacks=[seen], default_root_dir=tmp_path_factory.mktemp("untouched"))
    return task, seen


def test_these_are_all_hooks() -> None:
    assert len(HOOKS) > 35
    assert set(STEP_HOOKS) < set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.slow
def test_an_override_without_super_changes_nothing(hook: str, untouched: tuple[Task, Seen]) -> None:
    task, reference = untouched
    seen = Seen()
    own = type("Own", (small.Classify,), {hook: nothing})
    if (
        hook == "on_validation_model_eval"
    ):  # Lightning's own work is in these: without it there is dropout in validation
        pytest.skip("is Lightning's own, not the engine's")
    changed, _ = small.fit(own(small.network(), optimizer=small.adamw), callbacks=[seen])
    assert small.furthest(changed, task) == 0
    assert seen.val == reference.val
    assert seen.epochs == reference.epochs


REFUSED = (
    *("training_step", "validation_step", "test_step", "predict_step", "configure_model", "automatic_optimization"),
    *("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_be_overridden_says_so(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Own\.{name} would take the place of the exact step: .*[a-z]$"):
        type("Own", (small.Classify,), {name: nothing})


@pytest.mark.parametrize("name", ["data", "measure", "prepare", "_outputs", "_couples", "_summed_loss", "_turns"])
def test_what_the_engine_calls_by_itself_says_so_too(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Own\.{name} replaces what its base class uses: choose another name$"):
        type("Own", (small.Classify,), {name: nothing})
    mixin = type("Mixin", (), {name: nothing})
    with pytest.raises(TypeError, match=rf"^Mixin\.{name} replaces"):
        type("Own", (mixin, small.Classify), {})


@pytest.mark.parametrize("name", ["data", "counts", "predictions", "record", "_step", "_measures", "_rates", "_tuning"])
def test_an_attribute_must_not_hide_the_engine(name: str) -> None:
    task = small.Classify(small.network(), optimizer=small.adamw)
    with pytest.raises(
        ValueError, match=f"^Classify sets self.{name}, which its base class uses: choose another name$"
    ):
        setattr(task, name, [])


class Ordinary(small.Classify):
    """Gives ordinary names to things of its own."""

    names: ClassVar[tuple[str, ...]] = (
        *("share", "frozen", "unit", "sums", "step", "batch", "metrics", "window", "held", "shown", "rates", "scale"),
        *("schedule", "optimizer", "confusion", "limit", "stop", "epoch_sums", "ghosts", "is_frozen", "channels_last"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in self.names:
            setattr(self, name, "mine")


def test_ordinary_names_are_free(untouched: tuple[Task, Seen]) -> None:
    task, trainer = small.fit(Ordinary(small.network(), optimizer=small.adamw))
    assert all(getattr(task, name) == "mine" for name in Ordinary.names)
    assert small.furthest(task, untouched[0]) == 0
    assert copy.deepcopy(trainer.callback_metrics)["val/loss"] < 1


class Plain(pl.LightningModule):
    """A module that unpacks its batches, as usual."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _, _ = batch

    validation_step = test_step = predict_step = training_step

    def configure_optimizers(self) -> None:
        pass


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_plain_trainer_is_refused(verb: str) -> None:
    """`test` and `validate` measured nothing, and a module that is no task met batches that it did not know."""
    settings: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "precision": "64-true"}
    for module in (small.Classify(small.network(), optimizer=small.adamw), Plain()):
        plain = pl.Trainer(max_epochs=1, **settings)
        with pytest.raises(TypeError, match=r"a Task trains with batchwise\.Trainer"):
            getattr(plain, verb)(module, datamodule=small.Points())


class Warm(small.Classify):
    """Lightning's documented way to warm a rate up, and to zero gradients."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.trainer.global_step + 2)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def test_optimizer_step_and_zero_grad_are_honoured() -> None:
    rates: list[float] = []
    listener = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    )
    _, trainer = small.fit(Warm(small.network(), optimizer=small.adamw), max_epochs=1, callbacks=[listener])
    assert rates == pytest.approx([0.01 * (step + 2) for step in range(7)])
    assert trainer.global_step == 7


def test_a_clipping_of_ones_own_is_honoured() -> None:
    norms: list[float] = []

    class Own(small.Classify):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            )

    small.fit(Own(small.network(), optimizer=small.adamw), max_epochs=1)
    assert norms == pytest.approx([0.01] * 7, rel=1e-3)
