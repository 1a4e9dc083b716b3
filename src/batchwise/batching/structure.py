"""Nested inputs and targets. Dicts and tuples are structure. A list holds one value per example, and is cut by example.

So `(pixels, age)` is two tensors of N rows each, and so is `{"pixels": x, "age": y}`. `[boxes_0, boxes_1, ...]` is one
field of N values, which may differ in shape. Each of these values may be nested again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def rebuild(value: Any, leaf: Callable[[Any], Any], each: Callable[[list], Any] | None = None) -> Any:
    """Return a structure of the same form, with other leaves.

    Args:
        value: tensors and other leaves in dicts, tuples, named tuples and lists.
        leaf: applied to each leaf, which is whatever is no dict, tuple or list.
        each: applied to each list of one value per example; None: `leaf` is applied within its values.
    """
    if isinstance(value, dict):
        return {key: rebuild(item, leaf, each) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [rebuild(item, leaf, each) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [rebuild(item, leaf) for item in value] if each is None else each(value)
    return leaf(value)


def on_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the structure with a function applied to each tensor, also within lists."""
    if isinstance(value, Tensor):
        return function(value)
    return rebuild(value, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def as_floats(value: Any, dtype: torch.dtype) -> Any:
    """Return the structure with all floats of one type. Whole numbers stay as they are."""
    if isinstance(value, Tensor):
        return value if value.dtype == dtype or not value.is_floating_point() else value.to(dtype)
    return on_tensors(value, lambda tensor: as_floats(tensor, dtype))


def pick(value: Any, places: Tensor) -> Any:
    """Return the examples at some places, int64 [N]."""
    return rebuild(
        value,
        lambda leaf: leaf[places] if isinstance(leaf, Tensor) else leaf,
        lambda values: [values[place] for place in places.tolist()],
    )


def part(value: Any, start: int, stop: int) -> Any:
    """Return the examples from `start` to before `stop`."""

    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor | list) else leaf

    return cut(value) if isinstance(value, Tensor) else rebuild(value, cut, cut)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf and each list of one value per example, with its place such as `inputs['pixels']`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}.{names[number]}" if names else f"{name}[{number}]")
    else:
        yield name, value


def named(fields: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of the fields of a batch, inputs first and targets last, with their places."""
    *inputs, targets = fields if len(fields) > 1 else (*fields, None)
    yield from leaves(inputs[0] if len(inputs) == 1 else tuple(inputs), "inputs")
    if len(fields) > 1:
        yield from leaves(targets, "targets")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors, also those within lists."""
    found: list[Tensor] = []
    on_tensors(value, found.append)
    yield from found


def shape(value: Any) -> str:
    """Return the shape of one example as text, such as `{'pixels': [3, 32, 32], 'age': []}`."""
    kinds = rebuild(
        value,
        lambda leaf: list(leaf.shape[1:]) if isinstance(leaf, Tensor) else type(leaf).__name__,
        lambda values: [type(values[0]).__name__ if values else "nothing", "..."],
    )
    return str(kinds)
