"""The argument parser: one line for a mistake, and a new class does not inherit the settings of the old one."""

import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, _typehints
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated flag would change its meaning on the day another flag is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option[2:] for action in parser._actions for option in action.option_strings]
        print(f"error: {explain(message, known)}", file=sys.stderr)
        self.exit(2)


def check_files(arguments: list[str]) -> None:
    """Read the configuration files on a command line as YAML, because jsonargparse does not say which one is wrong.

    Raises:
        ValueError: a file is missing, is not YAML, or holds no keys.
    """
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    paths = [value if name in ("--config", "-c") else name.partition("=")[2] for name, value in pairs if _names(name)]
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise ValueError(f"--config {path} is not YAML{where}: {getattr(error, 'problem', error)}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"--config {path} holds no keys: write at least one, such as `trainer: {{max_epochs: 5}}`")


def _names(argument: str) -> bool:
    return argument in ("--config", "-c") or argument.startswith("--config=")


def explain(message: str, known: list[str]) -> str:
    """Return a message of jsonargparse as one line: what is wrong, and what was probably meant.

    Args:
        message: may have many lines, and the errors of every type that was tried.
        known: the options that there are.
    """
    line = re.sub(r"\s+", " ", message).strip()
    key = re.match(r'Parser key "([^"]+)"', line)
    tried = re.search(r"Errors: - (.*?) Given value type: .*? Given value: (.*)", line)
    if tried:
        errors = [error for error in tried[1].split(" - ") if error != "Expected a <class 'NoneType'>"]
        nested = ("Does not validate", "Import path")
        general = ("Expected a ", "Not a valid subclass", "a class path (str)", "a dict with", *nested)
        own = [error for error in errors if not error.startswith(general)]
        if own:  # the message of a class that refused a value
            return own[0] if key is None or key[1] in own[0] else f"{key[1]}: {own[0]}"
        types = [re.sub(r"^Expected an? (?:<class '(.*)'>|typing\.Literal)?", r"\1", error) for error in errors]
        return f"{key[1] if key else 'a value'} is {tried[2]}: write {' or '.join(types)}"
    if key and " - Problem with given class_path" in line:
        return f"{key[1]}: {line[line.rindex('Problem with') :]}"
    unknown = re.search(r"[Uu]nrecognized arguments?: --([\w.]+)", line) or re.search(
        r"(?:not accept|Option) (?:option )?'([\w.]+)'", line
    )
    meant = []
    if unknown:
        meant = [option for option in known if option.startswith(unknown[1])]
        meant = sorted(meant, key=len)[:1] or difflib.get_close_matches(unknown[1], known, n=1)
    if "arguments are required" in line:
        line += "; write --config FILE, such as configs/digits.yaml"
    return line + (f"; did you mean {meant[0]}?" if meant else "")


def _forget_settings(_: Any, old: Any, new: Any) -> None:
    """Drop the settings of a class that another class takes the place of, and say so.

    jsonargparse keeps those that the new class takes too: SGD would get the learning rate that was chosen for AdamW,
    and its weight decay, without a word. It has no setting for this, so its function is replaced; should the name
    change one day, the test of it fails, and all else works.
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
