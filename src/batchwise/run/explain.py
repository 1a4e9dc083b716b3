"""Messages of jsonargparse as one line: key, value, and what to write instead."""

import difflib
import re
from ast import literal_eval
from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
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
    tried = re.search(
        r"Subtypes: (.*) Errors: - (.*?) Given value type: .*? Given value: ?(.*?)(?: - Expected a <class .*)?$",
        problem,
    )
    if not found and not tried:
        return _not_of_a_key(line, known, outer)
    key = outer + name
    if said := _no_name(key, problem):
        return said
    if denied := re.search(r"Importing '([^']+)' is not allowed", problem):
        return f"{key} names {denied[1]}, which may run any code: a configuration must not; call it in a class of yours"
    if early := re.search(r"NestedArg\(key='([\w.]+)'", problem):
        return f"{key}.{early[1]} comes before {key}: write --{key} CLASS first"
    if tried and (beside := _beside_a_class(tried[3])):
        return f"{key} has {', '.join(beside)} beside its class: write {key}.init_args.{beside[0]}"
    given = re.search(
        r"a path but ([^{\[]*?) ?either|class_path'?[ :=]+'(.+?)'|(?:path string:|Got value:) ([\w.]+)(?![\w.(])",
        problem,
    )
    path = given and next(filter(None, given.groups()), None)
    errors = tried[2].split(" - ") if tried else [problem]
    errors = [error for error in errors if not error.startswith(GENERAL)]
    own = [error for error in errors if _wanted(error) is None]  # the message of a class that refused a value, too
    if path and (said := _of_a_path(path, " - ".join(own) or problem)):
        return f"{key} {said}"
    problem = re.sub(r"^- Expected a path but .*?either not accessible or invalid - ", "", problem)
    keys = [option for option in known if option.startswith(f"{name}.")]
    if keys and (group := re.search(r'Unable to load config "(.*)"$', problem)):
        value = "null" if group[1] == "None" else group[1]
        return f"{key} is {value}, but it is a group of keys: write them, such as --{outer}{keys[0]}"
    value = (tried[3] or "''") if tried else _value(problem)
    numbers = tried and "<class 'int'>" not in tried[1] and re.search(r"typing\.Literal\[\d.*?\]", tried[1])
    if numbers:  # the error of Literal[16, 32] asks for any whole number
        errors = [error.replace("<class 'int'>", numbers[0]) for error in errors]
    if not errors and re.search("Not a valid subclass|an instantiatable class", problem):
        return f"{key} is {value}: write class_path and init_args"
    if own and tried:
        return own[0] if key in own[0] else f"{key}: {own[0]}"  # which may name a key itself
    words = dict.fromkeys(filter(None, map(_wanted, errors)))
    if KINDS["float"] in words:
        words.pop(KINDS["int"], None)
    if tried and "a dot import path" in tried[2] and "torch.Tensor" not in tried[1]:  # nobody names a class for a rate
        words[A_PATH] = None
    elif [*words] == ["a list"] and value and value[0].isalpha():
        words = [f"a list, such as [{value}]"]
    elif [*words] == ["a dict"] and value and value[0] == "{":  # which YAML reads as a text
        words = [f"a dict, such as {re.sub(r':(?! )', ': ', value)}"]
    wanted = " or ".join(words)
    if wanted and value is not None:
        each = "Not of type" in problem and "not 'list'" not in problem and (name in lists or value.startswith("["))
        verb = "holds" if each and not value.startswith("[") else "is"
        return f"{key} {verb} {value}: write {wanted}{' for each' if each else ''}"
    if " - Problem with given class_path" in problem:
        problem = problem[problem.rindex("Problem with") :]
    if wrong := re.search(r"Expected a dot import path string: ?(.*)", problem):
        return f"{key} is {wrong[1] or repr('')}: write {A_PATH}"
    return f"{key}: {problem}"


def _of_a_path(path: str, problem: str) -> str | None:
    """Return what is wrong with the path of a class or function, and what to write."""
    if untyped := re.search(r"does not correspond to a subclass of (\w+)|a subclass of <class '(\w+)'>", problem):
        kind = untyped[1] or untyped[2]
        return (
            f"{path} gives no {kind}: write a class of that kind, or a function whose return type is written "
            f"(`-> {kind}`)"
        )
    if "is abstract" in problem:
        methods = sorted(getattr(locate(path), "__abstractmethods__", ["a method"]))
        return f"{path} lacks {' and '.join(methods)}: define {'them' if methods[1:] else 'it'} in the class"
    module = re.search(r"No module named '([\w.]+)'", problem)
    if module and f"{path}.".startswith(f"{module[1]}."):  # and not what a library lacks
        return f"is {path} ({module[0]}): write {A_PATH}, of this folder or of what is installed"
    absent = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", problem)
    module, name = absent.groups() if absent else ("", "")
    missing = f"{module}.{name}"
    if absent and f"{path}.".startswith(f"{missing}."):  # and not what the user's own file lacks
        home = import_module(module)
        if path == missing:
            names = [own for own, value in vars(home).items() if callable(value)]
        else:
            names = [part.name for part in iter_modules(getattr(home, "__path__", []))]
        near = [own for own in names if own.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean {path.replace(missing, f'{module}.{near[0]}')}?" if near else f"write {A_PATH}"
        return f"is {path}, but {module} has no {name}: {remedy}"
    return None


def _no_name(key: str, problem: str) -> str | None:
    """Return what to write in place of a key that cannot be one, such as a number, or a text with a blank."""
    wrong = re.search(
        r"(?:Key must be a string, got|Spaces not allowed in keys|Empty nested key): (.*?)\.(?: |$)", problem
    )
    return wrong and f"{key.strip('.') or 'the configuration'} has a key {wrong[1]}: write the name of an argument"


def _beside_a_class(value: str) -> list[str]:
    """Return the keys that stand beside `class_path` and `init_args`, from a value as Python writes it."""
    known = {"class_path", "init_args", "dict_kwargs"}
    with suppress(ValueError, SyntaxError):
        settings = literal_eval(value)
        if isinstance(settings, dict) and known & {*settings}:
            return [str(key) for key in settings if key not in known]
    return []


A_PATH = "the path of a class or function, such as package.module.Name"
GENERAL = (
    *("Not a valid subclass", "a class path (str)", "a dict with", "Does not validate", "Import path"),
    *("Expected a dot import path", "Expected a <class 'NoneType'>", "Expected an instantiatable class"),
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
    found = re.search(r": (.*) does not conform|(?:base 10|to float): '(.*)'|Got value: (.*?)(?: Subclass|$)", problem)
    return found and next(filter(None, found.groups()), None)


def _not_given(keys: list[str]) -> str:
    """Return what to write for required keys. Those of a command have its name before them, such as `sweep.target`."""
    keys = [key if key.startswith(("model.", "data.")) else key.rpartition(".")[2] for key in keys]
    flags = [f"--{key}" for key in keys if key.partition(".")[0] not in ("model", "data")]
    files = ["--config FILE"] if len(flags) < len(keys) else []
    return f"{' and '.join(keys)} {'are' if keys[1:] else 'is'} not set: write {' and '.join(files + flags)}"


def _not_of_a_key(line: str, known: Collection[str], outer: str) -> str:
    missing = re.search(r"arguments are required: (.*)", line)
    if said := _no_name(outer, line):
        return said
    if missing:
        return f"{outer}{missing[1]} is not set: write it" if outer else _not_given(missing[1].split(", "))
    if file := re.search(r"unrecognized arguments: ([^-]\S*\.ya?ml)", line):
        return f"{line}; did you mean --config {file[1]}?"
    unknown = re.search(r"[Uu]nrecognized arguments?: --([\w.-]+)", line) or re.search(
        r"(?:not accept|Option) (?:option )?'([\w.-]+)'", line
    )
    if unknown is None:
        return line
    key, last = outer + unknown[1], unknown[1].rpartition(".")[2].replace("-", "_")
    if last == "class_path" and outer:
        return f"{key} has other keys beside it: write those under {key.removesuffix(last)}init_args"
    line = line[: unknown.start(1)] + key + line[unknown.end(1) :]
    usual = USUAL.get(last, key)
    lacks = not outer and "." not in usual and usual not in known  # as tune lacks ckpt_path
    if usual != key and not lacks:
        return f"{line}; did you mean {usual}?"
    meant = sorted((option for option in known if option.startswith(unknown[1])), key=len)[:1]
    meant = meant or [option for option in known if option.endswith(f".{last}")][:1]
    meant = meant or difflib.get_close_matches(unknown[1], known, n=1)
    if not meant and outer not in ("", "model.", "data."):
        own = [option for option in known if option not in ("", "help") and "." not in option]
        line += f"; the class takes {', '.join(own) or 'no keys'}"
    elif not meant and key.startswith(("model.", "data.")):
        line += "; a class takes the keys of its base class if its __init__ has **kwargs and passes them on"
    return line + (f"; did you mean {outer}{meant[0]}?" if meant else "")
