"""Which callbacks listen to Lightning's hooks, and calls of these hooks from our own loop."""

from collections.abc import Callable, Collection
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer import call

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def listens(thing: Any, hook: str) -> bool:
    """Return whether a callback or module overrides a hook, in its class or on the object."""
    base = Callback if isinstance(thing, Callback) else pl.LightningModule
    own = getattr(thing, hook, None)
    if own is None or getattr(own, "__func__", own) is getattr(base, hook):
        return False
    if isinstance(thing, ModelCheckpoint) and hook == "on_train_batch_end":  # idle, unless it saves by steps or time
        return thing._every_n_train_steps > 0 or thing._train_time_interval is not None
    return True


def listeners(trainer: Any, hooks: Collection[str]) -> list[Any]:
    """Return the callbacks and the module that override one of these hooks, in the order of Lightning's calls."""
    things = (*trainer.callbacks, trainer.lightning_module)
    return [thing for thing in things if any(listens(thing, hook) for hook in hooks)]


def before_step(trainer: Any) -> list[Callable[..., None]]:
    """Return the methods of callbacks that run before `on_train_batch_start` of any."""
    return [callback.before_step for callback in trainer.callbacks if hasattr(callback, "before_step")]


def is_ours(thing: Any) -> bool:
    """Return whether a callback or task belongs to the engine. These need nothing that Lightning does around a hook."""
    return type(thing).__module__.startswith("batchwise.")


def row_is_due(trainer: Any, steps: int) -> bool:
    """Return whether a row is written to the log after so many optimizer steps."""
    return steps % trainer.log_every_n_steps == 0 or steps == trainer.max_steps


def values_are_due(trainer: Any, steps: int) -> bool:
    """Return whether a logger, a checkpoint or a scheduler may read the values that a step has logged."""
    return (
        row_is_due(trainer, steps)
        or any(isinstance(one, ModelCheckpoint) and listens(one, "on_train_batch_end") for one in trainer.callbacks)
        or any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)
    )


def call_hook(trainer: Any, hook: str, *arguments: Any) -> None:
    """Call a hook of all callbacks, then of the module. It is done in Lightning's way, so that they may log in it."""
    call._call_callback_hooks(trainer, hook, *arguments)
    call._call_lightning_module_hook(trainer, hook, *arguments)
