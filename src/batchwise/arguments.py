"""Arguments in Python: one of a wrong type, or out of its range, is one line, as it is on the command line."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

import numpy as np

from batchwise.errors import WrongArgument

Parameters = ParamSpec("Parameters")
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "collections.abc.Sequence": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a dict",
    "collections.abc.Mapping": "a dict",
    "os.PathLike": "a path",
    "PositiveInt": "a whole number of at least 1",
    "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number above 0 and below 1",
}
"""What to write for Python's types and for those of `jsonargparse.typing`."""
EXAMPLES = {
    "batchwise.Order": "batchwise.batching.sampling.Weighted in place of a sampler",
    "batchwise.Schedule": "Schedule(shape='cosine')",
}


def typed(init: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Let a constructor compare its arguments with their annotations, and take numbers of NumPy as ordinary ones.

    What works without this is taken: a path for a text, 1 for true; a tuple or an array, which becomes the list that is
    asked for. Functions are not looked into.
    """
    kinds = signature(init).parameters.items()
    names = [name for name, parameter in kinds if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @wraps(init)
    def check(*args: Any, **kwargs: Any) -> None:
        named = taken(init, dict(zip(names, args, strict=False)))
        init(*named.values(), *args[len(names) :], **taken(init, kwargs))  # type: ignore[call-arg]

    return check


def taken(function: Callable, given: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Return arguments as a function takes them.

    Args:
        function: its annotations are the types; what it has none for is not checked.
        given: the arguments by name.
        key: what stands before the names in a message, such as `schedule.`.

    Raises:
        WrongArgument: one of them has another type, or is out of its range.
    """
    hints, result = get_type_hints(function), {}
    for name, value in given.items():
        hint = hints.get(name, Any)
        try:
            result[name] = _as(hint, value)
        except (TypeError, ValueError):
            raise WrongArgument(f"{key}{name} is {_shown(value)}: write {_remedy(hint, value)}") from None
    return result


def _as(hint: Any, value: Any) -> Any:
    """Return a value as the type has it; raise TypeError or ValueError if it is of another."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        for one in of:
            with suppress(TypeError, ValueError):
                return _as(one, value)
        raise TypeError
    if kind is Literal:
        return of[[(type(one), one) for one in of].index((type(value), value))]
    if kind is bool:
        if isinstance(value, bool | np.bool_) or (isinstance(value, Integral) and value in (0, 1)):
            return bool(value)
        raise TypeError
    if kind in (int, float) or getattr(kind, "__module__", "") == "jsonargparse.typing":
        whole = issubclass(kind, int)
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise TypeError
        kind(value)  # type: ignore[call-arg]  # which has a range
        return value if type(value) in (int, float) else int(value) if whole else float(value)  # type: ignore[arg-type]
    if kind in (list, tuple, Sequence, Iterable):
        if kind is not Iterable:  # an array has a list of ordinary numbers
            value = getattr(value, "tolist", lambda: value)()
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError
        value = list(value) if kind is list else value
        if not of or type(value) not in (list, tuple):
            return value
        if kind is not tuple and {*map(type, value)} <= {*of}:  # quick, for the weights of a million examples
            return value
        each = of if kind is tuple and of[-1] is not ... else of[:1] * len(value)
        return type(value)(_as(*pair) for pair in zip(each, value, strict=True))
    if kind in (dict, Mapping) and of and type(value) is dict:
        # In YAML, the name of a layer or a column may be a number.
        return {str(name) if of[0] is str else name: _as(of[1], one) for name, one in value.items()}
    wanted = {str: str | PathLike, dict: Mapping}.get(kind, kind)
    if kind not in (Any, Callable) and isinstance(wanted, type | UnionType) and not isinstance(value, wanted):
        raise TypeError
    return value


def _remedy(hint: Any, value: Any) -> str:
    """Return what to write in place of a value, and an example where one can be given."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    examples = [f"[{_shown(value)}]" for option in options if option is not Any and _fits(option, [value])]
    if isinstance(value, type):
        own = [option for option in options if isinstance(option, type) and issubclass(value, option)]
        examples = [f"{value.__name__}(...)"] if own else examples
    examples += [EXAMPLES[name] for name in map(_name, options) if name in EXAMPLES]
    return _either(_wanted(hint, value)) + (f", such as {examples[0]}" if examples else "")


def _either(words: list[str]) -> str:
    """Return one of several words as a text."""
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _fits(hint: Any, value: Any) -> bool:
    with suppress(TypeError, ValueError):
        return _as(hint, value) is not None
    return False


def _wanted(hint: Any, value: Any = None) -> list[str]:
    """Return the words for each type that a value may have."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return [word for one in of if one is not NoneType for word in _wanted(one, value)]
    if kind is Literal:
        return list(map(repr, of))
    if of and kind in (list, tuple, Sequence) and isinstance(value, list | tuple):
        if kind is tuple and ... not in of and len(of) != len(value):
            return [f"a list of {len(of)}"]
        return [f"{_either(_wanted(of[0]))} for each"]
    if of and kind in (dict, Mapping) and isinstance(value, dict):
        return [f"{_either(_wanted(of[1]))} for each"]
    name = _name(kind)
    return ["True or False" if kind is bool else KINDS.get(name) or KINDS.get(name.rpartition(".")[2]) or f"a {name}"]


def _name(kind: Any) -> str:
    """Return the shortest name by which a class can be imported, such as `torch.nn.Module`."""
    module, name = getattr(kind, "__module__", ""), getattr(kind, "__qualname__", str(kind))
    parts = module.split(".")
    homes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    found = next((home for home in homes if getattr(sys.modules.get(home), name, None) is kind), module)
    return name if found == "builtins" else f"{found}.{name}"


def _shown(value: Any) -> str:
    """Return a value as it is written; an object that is not, or whose text is long, by its name."""
    text = repr(value)
    if len(text) <= 100 and "\n" not in text and " at 0x" not in text:
        return text
    return getattr(value, "__name__", f"{type(value).__name__}(...)")
