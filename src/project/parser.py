"""The argument parser: one line for a mistake, and a new class does not inherit the settings of the old one."""

import difflib
import inspect
import re
import sys
from typing import Any, NoReturn

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
        own = [error for error in errors if not error.startswith("Expected a ")]
        if own:  # the message of a class that refused a value
            return own[-1]
        types = [re.sub(r"^Expected an? (?:<class '(.*)'>|typing\.Literal)?", r"\1", error) for error in errors]
        return f"{key[1] if key else 'a value'} is {tried[2]}: write {' or '.join(types)}"
    if key and " - Problem with given class_path" in line:
        return f"{key[1]}: {line[line.rindex('Problem with') :]}"
    unknown = re.search(r"[Uu]nrecognized arguments?: --([\w.]+)", line) or re.search(
        r"(?:not accept|Option) (?:option )?'([\w.]+)'", line
    )
    meant = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
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
        f"{name}={value}"
        for name, value in vars(old.init_args).items()
        if not isinstance(value, Namespace) and name in own and own[name].default != value
    ]
    old.init_args = Namespace()
    note = f"note: {new['class_path']} takes the place of {old['class_path']}; forgotten: {', '.join(chosen)}"
    if chosen and note not in _said:
        _said.add(note)
        print(note, file=sys.stderr)


_said: set[str] = set()
_typehints.discard_init_args_on_class_path_change = _forget_settings
