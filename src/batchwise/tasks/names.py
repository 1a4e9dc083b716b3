"""Names of a task that the engine keeps for itself. A subclass that uses one is refused at once."""

from inspect import isfunction
from typing import Any

from lightning.pytorch import LightningModule

from batchwise.data.names import is_final

THE_ENGINES = {
    "training_step": "write losses",
    "validation_step": "write losses, and make_metrics",
    "test_step": "write losses, and make_metrics",
    "predict_step": "write predictions",
    "configure_model": "make the layers in __init__ of the network",
    "automatic_optimization": "leave it out, or for several optimizers write batchwise.tasks.adversarial.Adversarial",
    "on_before_batch_transfer": "write transform in the data module",
    "on_after_batch_transfer": "write transform in the data module",
    "transfer_batch_to_device": "write transform in the data module",
}
"""What a subclass must not override, each with what to write instead."""

SET_IN_TRAINING = ("_current_fx_name", "_trainer", "forward")
"""What Lightning sets at each hook, and what it and the engine replace for a moment. None of it is checked."""


def check_class(cls: type) -> None:
    """Check the names of a subclass of a task.

    Raises:
        TypeError: a name takes the place of one that the engine keeps.
    """
    engine = [base for base in cls.__mro__ if base.__module__.startswith("batchwise.")]
    kept = {name for base in engine for name, member in vars(base).items() if is_final(member) or _is_private(name)}
    for name in (*THE_ENGINES, *kept):
        owner = next(base for base in cls.__mro__ if name in vars(base))  # may be a mixin
        if not owner.__module__.startswith(("batchwise.", "lightning.")):
            if name in THE_ENGINES:
                raise TypeError(f"{owner.__name__}.{name} would take the place of the exact step: {THE_ENGINES[name]}")
            raise TypeError(f"{owner.__name__}.{name} replaces what its base class uses: choose another name")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_abc_")) and not hasattr(LightningModule, name)


def check_attribute(task: LightningModule, name: str, value: Any) -> None:
    """Check an attribute that a task is about to set.

    Raises:
        ValueError: it takes the place of a method that the engine calls, or of an object in which it keeps its state.
    """
    if name in SET_IN_TRAINING:
        return
    if name == "automatic_optimization" and not value:  # Lightning's schedulers and counters depend on it
        raise ValueError(f"{name} is {value}: {THE_ENGINES[name]}")
    kept, member = type(vars(task).get(name)), getattr(type(task), name, None)
    is_state = kept.__module__.startswith("batchwise.tasks.") and not isinstance(value, kept | None)
    is_called = isfunction(member) and member.__module__.startswith("batchwise.")
    if is_state or is_called or (isinstance(member, property) and member.fset is None):
        raise ValueError(f"{type(task).__name__} sets self.{name}, which its base class uses: choose another name")
