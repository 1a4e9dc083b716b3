"""Weights by name: the differences between two sets of them, and the start from the weights of a file."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from glob import glob

import torch
from torch import Tensor, nn

from batchwise.models.weight_files import read_weights

TRAINED, REPLACED = ".modules_to_save.", ".original_module."
"""Parts of the names that peft gives to the weights of a copy of a module, which learns, and of the module."""

QUANTIZED = (torch.int8, torch.uint8)
"""Types of weights that mean nothing without the scales that other programs keep beside them."""


def weight_differences(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return in a few words how a checkpoint's weights differ in name or shape from a model's; None: not at all."""
    missing = [name for name in own if name not in saved]
    unexpected = [name for name in saved if name not in own]
    reshaped = [
        f"{name} {list(saved[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    kinds = (("it lacks", missing), ("it also has", unexpected), ("it has", reshaped))
    return "; ".join(f"{kind} {_some(names)}" for kind, names in kinds if names) or None


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# Names


def inner_name(name: str) -> str:
    """Return the name that a weight has without what wraps the whole network: our tasks, DDP and `torch.compile`."""
    return re.sub(r"^(module\.|network\.)+", "", name.replace("_orig_mod.", ""))


def _way(own: str, saved: str) -> tuple[tuple[str, ...], ...]:
    """Return what is around each of two names that are the same within."""
    mine, theirs = (name.replace("_orig_mod.", "").split(".") for name in (own, saved))
    while mine and theirs and mine[-1] == theirs[-1]:
        del mine[-1], theirs[-1]
    return tuple(mine), tuple(theirs)


def _unwrapped(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the saved name for each own name that is the same without what wraps a network.

    A network may have a part of its own that is called `network` or `module`. So what is around most of the names is
    what wraps it, and of what is around as many, the same name counts.

    Raises:
        ValueError: different weights fit one name, or one fits several.
    """
    inner: dict[str, list[str]] = {}
    for name in saved:
        inner.setdefault(inner_name(name), []).append(name)
    found = {name: inner[inner_name(name)] for name in own if inner_name(name) in inner}
    # Two weights fit only if both have the right shape.
    found = {
        name: [source for source in sources if saved[source].shape == own[name].shape] or sources
        for name, sources in found.items()
    }
    votes = Counter(_way(name, source) for name, sources in found.items() for source in sources)

    def rank(name: str, source: str) -> tuple[int, bool]:
        return votes[_way(name, source)], name == source

    best = {name: max(rank(name, source) for source in sources) for name, sources in found.items()}
    pairs: dict[str, str] = {}
    takers: dict[str, str] = {}
    for name in sorted(found, key=best.__getitem__, reverse=True):
        first, *others = [source for source in found[name] if rank(name, source) == best[name]]
        for other in others:
            if not _same(saved[first], saved[other]):
                raise ValueError(f"{first} and {other} may both be {name}: rename one of them")
        taker = takers.setdefault(first, name)
        if taker == name or own[taker].data_ptr() == own[name].data_ptr():
            pairs[name] = first
        elif best[taker] == best[name]:
            raise ValueError(f"{first} may be {taker} or {name}: rename it")
    return pairs


def plain_name(name: str) -> str:
    """Return the name that a weight has without peft either. peft itself saves adapters without `default`."""
    name = re.sub(r"^(base_model\.model\.)+", "", inner_name(name))
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+|default)(?=\.|$)", "", name)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


class _ByPlainName(dict[str, list[str]]):
    """The saved names by their plain names. What peft has trained counts, and not what it has replaced."""

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        for name in saved:
            self.setdefault(plain_name(name), []).append(name)
        for plain, names in self.items():
            self[plain] = [name for name in names if TRAINED in name] or names
        self._saved = saved

    def only(self, plain: str) -> str:
        """Return the one name.

        Raises:
            ValueError: different weights have this plain name.
        """
        first, *others = self[plain]
        for other in others:
            if not _same(self._saved[first], self._saved[other]):
                raise ValueError(f"{first} and {other} may both be {plain}: rename one of them")
        return first


def _beginnings(names: Iterable[str]) -> Counter[str]:
    """Return how many names begin with each path of modules."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:end]) + "." for end in range(1, len(parts)))
    return counts


def matched(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the saved name for each of a network's own names that has one.

    Names are compared as they are, then without what wraps a network. If none fits, the whole of one may be a part of
    the other, as the encoder of a classifier is.

    Raises:
        ValueError: several weights would fit.
    """
    plain, pairs = _ByPlainName(saved), _unwrapped(saved, own)
    others = {name: plain.only(plain_name(name)) for name in own if name not in pairs and plain_name(name) in plain}
    pairs |= {
        name: source
        for name, source in others.items()
        if (REPLACED not in name or TRAINED not in source) and inner_name(name) != inner_name(source)
    }
    if pairs:
        return pairs
    mine, ways = {name: plain_name(name) for name in own}, {}
    for start in _beginnings(mine.values()):
        within = {name: short.removeprefix(start) for name, short in mine.items() if short.startswith(start)}
        ways[start] = {name: plain.only(short) for name, short in within.items() if short in plain}
    for start in _beginnings(plain):
        within = {name: start + short for name, short in mine.items() if start + short in plain}
        ways[f"-{start}"] = {name: plain.only(long) for name, long in within.items()}
    fits = {
        start: {name: source for name, source in way.items() if saved[source].shape == own[name].shape}
        for start, way in ways.items()
    }
    most = max(map(len, fits.values()), default=0)
    best = [start for start, way in fits.items() if len(way) == most]
    if most and len(best) > 1:
        raise ValueError(f"it fits {' and '.join(start.strip('-.') for start in best[:2])} alike: rename the weights")
    return fits[best[0]] if most else {}


@torch.no_grad()
def take_weights(network: nn.Module, path: str) -> str:
    """Copy the weights of a file that have the same names and shapes into a network. Return a line that reports it.

    Other weights keep their initial values: the last layer, for example, if the number of classes is different. What
    wraps either network does not matter (a task, DDP, `torch.compile`, peft): see `matched`.

    Args:
        network: keeps its dtype and device.
        path: one of our checkpoints, a state dict (alone, or beside other things: see `USUAL`), or a `.safetensors`
            file; a folder that `save_pretrained` wrote; or a pattern such as `runs/name/*/checkpoints/best.ckpt`, of
            which the last by name is taken, which is the newest run.

    Raises:
        ValueError: there is no such file, nothing in it fits, names are ambiguous, or a weight is not finite.
    """
    found = sorted(glob(path))
    if not found:
        raise ValueError(f"model.init_from {path} does not exist: write a checkpoint, state dict or safetensors file")
    path = found[-1]

    def counts(name: str) -> bool:
        return not name.endswith("num_batches_tracked")

    own = {name: value for name, value in network.state_dict().items() if counts(name)}
    try:
        saved = {name: value for name, value in read_weights(path).items() if counts(name)}
    except ValueError as error:
        raise ValueError(f"model.init_from {path} {error}") from error
    try:
        pairs = matched(saved, own)
    except ValueError as error:
        raise ValueError(f"model.init_from {path}: {error}") from None
    fitting = [name for name, source in pairs.items() if saved[source].shape == own[name].shape]
    places = {own[name].data_ptr() for name in fitting}
    tied = [name for name, value in own.items() if name not in pairs and value.data_ptr() in places]
    renamed = {name: saved[source] for name, source in pairs.items()} | {name: own[name] for name in tied}
    rest = {name: value for name, value in saved.items() if name not in pairs.values()}
    differences = weight_differences(renamed | rest, own)
    if not fitting:
        raise ValueError(f"model.init_from {path} holds nothing that fits model.network: {differences}")
    first: dict[int, str] = {}
    for name in fitting:
        value, source = saved[pairs[name]], pairs[name]
        if own[name].is_floating_point() and (value.is_complex() or value.dtype in QUANTIZED):
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"model.init_from {path} has {source} as {kind}: save it as floating-point numbers")
        other = first.setdefault(own[name].data_ptr(), name) if value.numel() else name
        if other != name and own[other].shape == value.shape and not _same(value, saved[pairs[other]]):
            raise ValueError(
                f"model.init_from {path}: {source} and {pairs[other]} are one weight in model.network, and differ in "
                "the file: leave one of them out, or do not tie them"
            )
        # A mask of a network's own may have infinite values, so it may get them.
        if not bool(value.to(own[name]).isfinite().all()) and bool(own[name].isfinite().all()):
            raise ValueError(
                f"model.init_from {path} has NaN or infinite values in {source}: write a file from before "
                "training broke down"
            )
    for name in fitting:
        own[name].copy_(saved[pairs[name]])
    more = f"; what does not fit: {differences}" if differences else ""
    return f"weights from {path}: {len(fitting) + len(tied)} of {len(own)}{more}"
