"""The argument parser: one line for a mistake, and a new class does not inherit the settings of the old one."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import FrameType
from typing import Any, NoReturn, get_origin

import torch
import yaml
from jsonargparse import Namespace, _actions, _typehints, set_loader, set_parsing_settings
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._loaders_dumpers import get_loader_exceptions, yaml_load
from jsonargparse._util import import_object
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from batchwise.errors import Mistake
from batchwise.origin import place, said
from batchwise.run import program
from batchwise.run.explain import explain

# Defaults may be members of an enumeration, such as those of Lightning's Timer. In a configuration they are plain.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

register_type(torch.device)  # the default of an argument of StochasticWeightAveraging; in a configuration it is a text

# Beyond what jsonargparse denies by itself (`os`, `subprocess`, `pickle` and others): what runs code of a file or an
# address. An argument without a type takes any class, so that a configuration could name these too.
set_parsing_settings(
    import_path_denylist=[
        *(
            "torch.load",
            "torch.serialization",
            "torch.hub",
            "torch.jit.load",
            "torch.package",
            "torch.utils.cpp_extension",
        ),
        *("numpy.load", "joblib", "dill", "cloudpickle", "pandas.read_pickle"),
    ]
)


def _load(text: str) -> Any:
    """Return the value of a flag. YAML takes one that begins with `#` for a comment, and so for null."""
    value = yaml_load(text)
    return text if value is None and text.lstrip().startswith("#") else value


set_loader("yaml", _load, get_loader_exceptions("yaml"))


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prog", f"python -m {program.name}")  # before Python 3.14, argparse says __main__.py
        # An abbreviated flag would change its meaning on the day another flag is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_instantiator(instantiate, object, subclasses=True)
        self._of_the_verb: list[str] = []

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a verb, which is a method of the trainer, and remember which they are."""
        self._of_the_verb = super().add_method_arguments(*args, **kwargs)
        return self._of_the_verb

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the configuration on a command line. An error in a file of the user's is one line."""
        try:
            return super().parse_args(*args, **kwargs)
        except Broken as error:
            if os.environ.get("BATCHWISE_TRACEBACK"):
                traceback.print_exception(error.__cause__)
            print(f"error: {error}", file=sys.stderr)
            self.exit(2)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return the configuration without what the verb alone knows and has as always, so that every verb takes it."""
        shown = namespace.clone()
        for key in self._of_the_verb:
            if shown.get(key) == self.get_default(key):
                shown.pop(key, None)
        return super().dump(shown, *args, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Raise TypeError for a wrong value, also for one in the place of a group of keys."""
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            value = namespace.get(action.dest, Namespace())
            if isinstance(action, _ActionConfigLoad) and not isinstance(value, Namespace):
                raise TypeError(f'Parser key "{action.dest}": Unable to load config "{value}"')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option[2:] for action in parser._actions for option in action.option_strings]
        lists = [action.dest for action in parser._actions if get_origin(getattr(action, "_typehint", None)) is list]
        # The message of a wrong name has no key, but the frame that raised it is in the check of one.
        raised = [*traceback.walk_tb(ex.__traceback__)] if isinstance(ex, KeyError) else []
        outer = _outer_keys(raised[-1][0] if raised else inspect.currentframe())
        print(f"error: {explain(message, known, lists, outer)}", file=sys.stderr)
        self.exit(2)


def plain(value: Any) -> Any:
    """Return a value with ordinary numbers in place of those of `jsonargparse.typing`.

    A `PositiveInt` is checked when it is parsed. After that it must be an int, because a checkpoint that holds another
    type cannot be loaded with `weights_only`.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    for number in (int, float):
        if isinstance(value, number) and type(value).__module__ == "jsonargparse.typing":
            return number(value)
    return value


def instantiate(kind: Callable[..., object], /, *args: object, **kwargs: object) -> object:
    """Make an object of a configuration, from ordinary numbers.

    Raises:
        ValueError: code of the user's has failed in it, of which jsonargparse would keep the words alone.
    """
    try:
        return kind(*plain(args), **plain(kwargs))
    except Exception as error:
        if isinstance(error, Mistake) or not place(error):
            raise
        raise ValueError(said(error)) from error


def _outer_keys(frame: FrameType | None) -> str:
    """Return the keys of the classes around a nested parser, such as `model.network.`.

    Each class has a parser of its own, and jsonargparse does not tell it where it stands. But the outer parsers are
    on the stack, each checking the value of a key. If that function is renamed one day, the keys in messages are
    short.
    """
    keys = ""
    while frame is not None:
        if frame.f_code.co_name == "_check_type":
            keys = f"{frame.f_locals['self'].dest}.{keys}"
        frame = frame.f_back
    return keys


def _forget_settings(_: object, old: Any, new: Any) -> None:
    """Drop the settings of a class when another class takes its place, and say so.

    jsonargparse keeps the settings that the new class takes too. SGD would get the learning rate and the weight decay
    that were chosen for AdamW, without a word. jsonargparse has no option for this, so this function replaces
    jsonargparse's own. If jsonargparse renames it one day, the test of this function fails, and all else works.
    """
    if not old or "init_args" not in old or old["class_path"] == new["class_path"]:
        return
    own = inspect.signature(import_object(old["class_path"])).parameters  # type: ignore[arg-type]
    chosen = [
        name if isinstance(value, Namespace) else f"{name}={value}"
        for name, value in vars(old.init_args).items()
        if name not in own or own[name].default != value
    ]
    old.init_args = Namespace()
    note = f"note: {new['class_path']} takes the place of {old['class_path']}; forgotten: {', '.join(chosen)}"
    if chosen and note not in _said:
        _said.add(note)
        print(note, file=sys.stderr)


_said: set[str] = set()
_typehints.discard_init_args_on_class_path_change = _forget_settings


def _written(value: Any) -> Any:
    """Return a text as it is, and a function as its path.

    jsonargparse writes a sentence that no command can read in place of a text where a function may be, as in
    `ModelPruning`.
    """
    return value if isinstance(value, str) else _path_of(value)


_path_of = _typehints.serialize_as_import_path
_typehints.serialize_as_import_path = _written


ROOMS = ("batching", "callbacks", "data", "models", "sources", "tasks")
"""Where the engine has classes that a configuration may name."""
OTHERS = ("torch.", "torchmetrics.", "lightning.", "batchwise.tasks.", "batchwise.Task", "batchwise.run.")
"""Where classes are modules of PyTorch, but hardly networks: their names begin so."""


def _known(kind: Any, **settings: Any) -> list[str]:
    """Return the classes that help lists. jsonargparse lists those that are imported, and all layers of PyTorch."""
    if settings.get("closed_types", True):  # to find a class by its last name, and not for help
        return _imported(kind, **settings)
    for room in ROOMS:
        for module in iter_modules([str(Path(__file__).parents[1] / room)], f"batchwise.{room}."):
            import_module(module.name)
    paths = _imported(kind, **settings)
    return [path for path in paths if not path.startswith(OTHERS)] if "torch.nn.Module" in paths else paths


_imported = _typehints.get_all_subclass_paths
_typehints.get_all_subclass_paths = _known


class Broken(BaseException):
    """A file of the user's fails while it is imported. The message names the key, and the place in the file.

    jsonargparse takes any `Exception` of an import for a wrong path, and tries the other types that a value may have.
    """


def _import(path: str, *args: Any, **kwargs: Any) -> Any:
    """Import what a path names.

    Raises:
        Broken: a file of the user's fails.
    """
    try:
        return import_object(path, *args, **kwargs)
    except Exception as error:
        # What is not found in a package is looked for as a name in the package around it.
        for one in filter(None, (error, error.__context__)):
            if isinstance(one, SyntaxError) or place(one):
                words = str(one) if isinstance(one, SyntaxError) else said(one)  # which names the place itself
                raise Broken(f"{_outer_keys(inspect.currentframe())[:-1] or path}: {words}") from one
        raise


_typehints.import_object = _import  # type: ignore[attr-defined]
_actions.import_object = _import  # type: ignore[attr-defined]
