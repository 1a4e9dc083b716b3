"""Schedulers of PyTorch that depend on the length of the training, which a resume with another length would break."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

LENGTHS = (
    *("total_steps", "total_iters", "total_size", "T_max", "T_0", "step_size", "milestones", "_milestones"),
    *("max_epochs", "max_steps", "max_iters", "num_training_steps"),  # of schedulers outside PyTorch
)
"""Names in the state of a scheduler that say when something happens. The others say what, or how far it is."""


def changed_length(scheduler: LRScheduler, saved: Mapping[str, Any]) -> str | None:
    """Return how the length of a new scheduler differs from that in a state; None: not at all.

    PyTorch restores the length too. So the rate would go on as if the training had its old length.

    Args:
        scheduler: has loaded no state.
        saved: the state of a scheduler, from a checkpoint.
    """
    kind = type(scheduler)
    types = int | float | list | Mapping if kind.__module__.startswith("torch.") else int | float
    own = dict(_lengths(scheduler.state_dict(), kind.__name__, types))
    for name, old in _lengths(saved, kind.__name__, types):
        if name in own and own[name] != old:
            return f"{name} {_shown(old)}, and is now made with {_shown(own[name])}"
    return None


def _lengths(state: Mapping[str, Any], name: str, types: Any) -> Iterator[tuple[str, Any]]:
    """Yield the lengths in a state by their names, also those of schedulers within. Lists of others may be used up."""
    yield from ((f"{name}.{key.strip('_')}", state[key]) for key in LENGTHS if isinstance(state.get(key), types))
    for number, inner in enumerate(state.get("_schedulers") or ()):
        yield from _lengths(inner, f"{name}[{number}]", types)


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, Mapping) else value  # MultiStepLR counts its milestones
