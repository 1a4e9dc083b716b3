"""Labels and their numbers, and values in a few words."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Return the different labels in an order that depends on them alone: numbers by their values, texts as texts.

    Texts that are the same by Unicode are one label: an accent may be a character of its own, as in names that macOS
    gives to files.
    """
    different = {normal(label) for label in set(labels)}
    numbers = all(label.isdecimal() for label in different)
    return sorted(different, key=lambda label: (int(label) if numbers else 0, label))


def normal(label: Any) -> Any:
    """Return a label in the usual one of the ways in which Unicode writes it (NFC), if it is a text."""
    return normalize("NFC", label) if isinstance(label, str) else label


def check_alike(labels: Iterable[str], where: object) -> None:
    """Refuse labels that differ only by case or blanks, and a whole number that is also written as 1.0.

    Raises:
        ValueError: two labels look alike.
    """
    alike: dict[str, set[str]] = defaultdict(set)
    for label in map(normal, set(labels)):
        alike[re.sub(r"^(-?\d+)\.0$", r"\1", " ".join(label.split()).casefold())].add(label)
    for several in alike.values():
        if len(several) > 1:
            names = " and ".join(map(repr, sorted(several)))
            raise ValueError(f"{where} has the labels {names}, which look like one: give both the same name")


def label_numbers(labels: Sequence[str], known: Sequence[str], where: object) -> Tensor:
    """Return the number of each label among those that training knows, int64 [N].

    Args:
        labels: one for each example.
        known: the labels, in the order of their numbers.
        where: what has the labels, for the message of an error.

    Raises:
        ValueError: training does not know a label.
    """
    by_label = {normal(label): number for number, label in enumerate(known)}
    different = set(labels)
    numbers = {label: by_label[normal(label)] for label in different if normal(label) in by_label}
    unknown = sorted_labels(map(str, different - numbers.keys()))
    if unknown:
        raise ValueError(
            f"{where} has the labels {shown(unknown)}, which training has not seen: it knows {shown(list(known))}"
        )
    return torch.from_numpy(np.fromiter((numbers[label] for label in labels), np.int64, len(labels)))


def class_numbers(labels: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
    """Return the number of each label among the different ones in rising order, int64 [N].

    Args:
        labels: one for each example, numbers or texts [N].

    Raises:
        ValueError: there is not one label for each example, or they cannot be put in order.
    """
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        labels = labels.double().numpy() if labels.is_floating_point() else labels.numpy()
    remedy = "write one number or text for each example, such as labels.argmax(1) of one-hot rows"
    try:
        values = np.asanyarray(labels)
    except ValueError:
        raise ValueError(f"the labels to split by are rows of unequal length: {remedy}") from None
    if values.ndim != 1 or not len(values):
        raise ValueError(f"the labels to split by are of shape {list(values.shape)}: {remedy}")
    try:
        # What is not a number, or no time, is unequal to itself.
        unequal = [value is None or value != value for value in values] if values.dtype == object else values != values
        missing = np.ma.getmaskarray(values) | np.asarray(unequal, bool)
        numbers = np.unique(np.asarray(values)[~missing], return_inverse=True)[1]
    except TypeError:
        raise ValueError(f"the labels to split by are of several types: {remedy}") from None
    if missing.any():
        raise ValueError(
            f"{missing.sum():,} of {len(values):,} labels to split by are missing: leave these examples out, or give "
            "them a class of their own"
        )
    return torch.from_numpy(numbers)


def shown(value: Any) -> str:
    """Return a value in a few words."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, list):
        some = ", ".join(map(shown, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
        return some if all(isinstance(item, str) for item in value) else f"[{some}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
