"""From a list of examples to the fields of a micro-batch, and one line where that cannot be done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from batchwise.batching.fetch import DataError, Example, as_tensor
from batchwise.batching.structure import named, rebuild

Collate = Callable[[list], Any]
"""Takes the examples of a micro-batch, and returns its inputs, or a tuple of inputs and targets."""


def stack(examples: Sequence[Any], indices: Sequence[int], name: str = "") -> Any:
    """Return the examples as one structure, by the rules of torch's `default_collate`.

    Tensors, arrays and numbers become tensors [N, ...]. Texts become a list. Within an example, a list is a structure
    of fixed length and becomes a tuple, because in a micro-batch a list has one value per example.

    Args:
        examples: of equal structure and shapes, at least one.
        indices: their numbers, for the error.
        name: their place in the example, for the error.

    Raises:
        DataError: they differ.
    """
    one = examples[0]
    if isinstance(one, Mapping):
        for place, example in enumerate(examples):
            if not isinstance(example, Mapping):
                _differ(name, indices, place, [f"a {type(each).__name__}" for each in (example, one)])
            if example.keys() != one.keys():
                _differ(name, indices, place, [f"the keys {sorted(map(str, each))}" for each in (example, one)])
        return {key: stack([example[key] for example in examples], indices, f"{name}[{key!r}]") for key in one}
    if isinstance(one, tuple | list):
        for place, example in enumerate(examples):
            if not isinstance(example, tuple | list):
                _differ(name, indices, place, [f"a {type(each).__name__}" for each in (example, one)])
            if len(example) != len(one):
                _differ(name, indices, place, [f"{len(each)} items" for each in (example, one)])
        names = _names(one, name)
        items = [stack(column, indices, names[i]) for i, column in enumerate(zip(*examples, strict=True))]
        return type(one)(*items) if hasattr(one, "_fields") else tuple(items)
    try:
        if isinstance(one, str | bytes) and not all(isinstance(example, type(one)) for example in examples):
            raise TypeError("texts, and values of another type")  # of which PyTorch would make a list
        with torch.no_grad():  # examples do not learn
            return default_collate(list(examples))
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = [list(getattr(example, "shape", ())) for example in examples]
        for place, shape in enumerate(shapes):
            if shape != shapes[0]:
                _differ(name, indices, place, [f"the shape {each}" for each in (shape, shapes[0])])
        for place, example in enumerate(examples):
            if type(example) is not type(one):
                _differ(name, indices, place, [f"a {type(each).__name__}" for each in (example, one)])
        raise DataError(
            f"example {indices[0]} has a {type(one).__name__}{_at(name)}: return tensors, arrays or numbers, or write "
            f"collate in the data module ({str(error).splitlines()[0]})"
        ) from error


def _names(example: Any, name: str) -> list[str]:
    if name:
        return [f"{name}.{field}" for field in getattr(example, "_fields", ())] or [
            f"{name}[{number}]" for number in range(len(example))
        ]
    if len(example) == 2:
        return ["inputs", "targets"]
    return [f"inputs[{number}]" for number in range(len(example) - 1)] + ["targets"]


def _at(name: str) -> str:
    return f" at {name}" if name else ""


def _differ(name: str, indices: Sequence[int], place: int, what: list[str]) -> None:
    raise DataError(
        f"example {indices[place]} has {what[0]}{_at(name)}, and example {indices[0]} has {what[1]}: bring them to one "
        "shape, or write collate(examples) in the data module, which returns inputs and targets"
    )


def checked(made: Any, indices: Sequence[int], maker: str) -> Example:
    """Return what a user's code made of some examples, as fields of as many.

    Args:
        made: inputs, or a tuple of inputs and targets.
        indices: numbers of the examples.
        maker: what made it, for the error.

    Raises:
        DataError: something in it is not one value per example.
    """
    fields = tuple(_plain(field) for field in (made if isinstance(made, tuple) else (made,)))
    for name, leaf in named(fields):
        if isinstance(leaf, str | bytes | int | float | None):
            continue  # the same for all of them
        if not isinstance(leaf, Tensor | list):
            kind = f"a {type(leaf).__name__}"
        elif isinstance(leaf, list) or leaf.ndim:
            if len(leaf) == len(indices):
                continue
            kind = f"a {type(leaf).__name__} of {len(leaf)}"
        else:
            kind = "one number"
        raise DataError(
            f"{maker} gave {kind} at {name} for {len(indices)} examples: return tensors with one row per example, "
            "dicts or tuples of them, or a list with one value per example"
        )
    return fields


def _plain(value: Any) -> Any:
    """Return tensors for arrays, and dicts for the likes of them, such as a `BatchEncoding`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: _plain(item) for key, item in value.items()}
        if isinstance(value, Tensor):
            return value.detach()  # examples do not learn
        return as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS" else value

    return rebuild(value, leaf)


def first(fields: Example) -> Example:
    """Return the first example of a micro-batch."""
    return tuple(rebuild(field, lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, _head) for field in fields)


def _head(values: list) -> Any:
    return values[0]


def numbers(indices: Sequence[int]) -> str:
    """Return the numbers of some examples as text."""
    some = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
    return f"example {some}" if len(indices) == 1 else f"examples {some}"
