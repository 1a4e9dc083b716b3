"""Messages of jsonargparse as one line: key, value, and what to write instead."""

import difflib
import re
from collections.abc import Collection
from pydoc import locate

from batchwise.arguments import KINDS

USUAL = {
    "batch_size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "learning_rate": "model.optimizer.lr",
    "lr": "model.optimizer.lr",
    "num_workers": "data.num_workers",
    "optimizer": "model.optimizer",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "seed": "seed_everything",
    "weight_decay": "model.optimizer.weight_decay",
}
"""Where a key is that others have elsewhere, by the last part of its name."""


def explain(message: str, known: Collection[str] = (), lists: Collection[str] = (), outer: str = "") -> str:
    """Return a message of jsonargparse as one line: what is wrong, and what to write instead.

    Args:
        message: may have many lines, and the errors of every type that was tried.
        known: the options of the parser.
        lists: the keys whose values are lists.
        outer: the keys of the classes around it, such as `model.network.`.
    """
    line = re.sub(r"\s+", " ", message).strip()
    found = re.match(r'Parser key "([^"]+)": (.*)', line)
    name, problem = found.groups() if found else ("", line)
    tried = re.search(r"Errors: - (.*?) Given value type: .*? Given value: (.*)", problem)
    if not found and not tried:
        return _not_of_a_key(line, known, outer)
    key = outer + name
    if denied := re.search(r"Importing '([^']+)' is not allowed", problem):
        return f"{key} names {denied[1]}, which may run any code: a configuration must not; call it in a class of yours"
    given = re.search(r"a path but (.+?) either", problem)
    if given and (said := _of_a_path(given[1], problem)):
        return f"{key} {said}"
    if early := re.search(r"NestedArg\(key='([\w.]+)'", problem):
        return f"{key}.{early[1]} comes before {key}: write --{key} CLASS first"
    keys = [option for option in known if option.startswith(f"{name}.")]
    if keys and (group := re.search(r'Unable to load config "(.*)"$', problem)):
        value = "null" if group[1] == "None" else group[1]
        return f"{key} is {value}, but it is a group of keys: write them, such as --{outer}{keys[0]}"
    value = tried[2] if tried else _value(problem)
    errors = tried[1].split(" - ") if tried else [problem]
    errors = [error for error in errors if error != "Expected a <class 'NoneType'>" and not error.startswith(GENERAL)]
    own = [error for error in errors if _wanted(error) is None]
    if own and tried:  # the message of a class that refused a value
        return own[0] if key in own[0] else f"{key}: {own[0]}"  # which may name a key itself
    wanted = " or ".join(dict.fromkeys(filter(None, map(_wanted, errors))))
    if wanted and value is not None:
        each = "Not of type" in problem and (name in lists or value.startswith("["))
        verb = "holds" if each and not value.startswith("[") else "is"
        return f"{key} {verb} {value}: write {wanted}{' for each' if each else ''}"
    if " - Problem with given class_path" in problem:
        problem = problem[problem.rindex("Problem with") :]
    if given and "Expected a dot import path string" in problem:
        return f"{key} is {given[1]}: write the path of a class or function, such as package.module.Name"
    return f"{key}: {problem}"


def _of_a_path(path: str, problem: str) -> str | None:
    """Return what is wrong with the path of a class or function, and what to write."""
    if untyped := re.search(r"does not correspond to a subclass of (\w+)", problem):
        return (
            f"{path} gives no {untyped[1]}: write a class of that kind, or a function whose return type is written "
            f"(`-> {untyped[1]}`)"
        )
    if "is abstract" in problem:
        missing = sorted(getattr(locate(path), "__abstractmethods__", ["a method"]))
        return f"{path} lacks {' and '.join(missing)}: define {'them' if missing[1:] else 'it'} in the class"
    return None


GENERAL = (
    *("Not a valid subclass", "a class path (str)", "a dict with", "Does not validate", "Import path"),
    "Expected a dot import path",
)
"""Errors of jsonargparse that say less than the ones beside them."""


def _wanted(error: str) -> str | None:
    """Return what to write instead, from the error of one type; None: it is the message of a class."""
    restricted = re.match(r"Not of type (\w+): ", error)
    if restricted:
        return KINDS.get(restricted[1], restricted[1])
    expected = re.match(r"Expected an? (?!path but)(?:<class '(.*?)'>|typing\.Literal\[(.*?)\]|([^.]*))", error)
    return expected and (KINDS.get(expected[1], expected[1]) or (expected[2] or expected[3]).replace("'", ""))


def _value(problem: str) -> str | None:
    """Return the value that the error of a single type speaks of."""
    if "not 'NoneType'" in problem:
        return "null"
    found = re.search(r": (.*) does not conform|(?:base 10|to float): '(.*)'|Got value: (.*)", problem)
    return found and next(filter(None, found.groups()), None)


def _not_given(keys: list[str]) -> str:
    """Return what to write for required keys. Those of a command have its name before them, such as `sweep.target`."""
    keys = [key if key.startswith(("model.", "data.")) else key.rpartition(".")[2] for key in keys]
    flags = [f"--{key}" for key in keys if key.partition(".")[0] not in ("model", "data")]
    files = ["--config FILE"] if len(flags) < len(keys) else []
    return f"{' and '.join(keys)} {'are' if keys[1:] else 'is'} not set: write {' and '.join(files + flags)}"


def _not_of_a_key(line: str, known: Collection[str], outer: str) -> str:
    missing = re.search(r"arguments are required: (.*)", line)
    if missing:
        return f"{outer}{missing[1]} is not set: write it" if outer else _not_given(missing[1].split(", "))
    unknown = re.search(r"[Uu]nrecognized arguments?: --([\w.]+)", line) or re.search(
        r"(?:not accept|Option) (?:option )?'([\w.]+)'", line
    )
    if unknown is None:
        return line
    key, last = outer + unknown[1], unknown[1].rpartition(".")[2]
    line = line.replace(unknown[1], key, 1)
    usual = USUAL.get(last, key)
    lacks = not outer and "." not in usual and usual not in known  # as tune lacks ckpt_path
    if usual != key and not lacks:
        return f"{line}; did you mean {usual}?"
    meant = sorted((option for option in known if option.startswith(unknown[1])), key=len)[:1]
    meant = meant or [option for option in known if option.endswith(f".{last}")][:1]
    meant = meant or difflib.get_close_matches(unknown[1], known, n=1)
    if not meant and key.startswith(("model.", "data.")):
        line += "; a class takes the keys of its base class if its __init__ has **kwargs and passes them on"
    return line + (f"; did you mean {outer}{meant[0]}?" if meant else "")
