"""The argument parser: one line for a mistake, and later files replace what they change the class of."""

import difflib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line, and in which a new class does not inherit settings of the old."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated flag would change its meaning on the day another flag is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {explain(message, list(option_names(parser)))}", file=sys.stderr)
        self.exit(2)

    def merge_config(self, cfg_from: Namespace, cfg_to: Namespace) -> Namespace:
        """Lay `cfg_from` over `cfg_to`. Where it names another class, the settings of the old class are dropped.

        Otherwise SGD would silently take the learning rate that was chosen for Adam, because both call it `lr`.
        """
        cfg_to = cfg_to.clone()
        for key, new in classes(cfg_from):
            old = cfg_to.get(key)
            if isinstance(old, Namespace) and old.get("class_path") not in (None, new.class_path):
                if old.get("init_args"):
                    settings = ", ".join(f"{name}={value}" for name, value in vars(old.init_args).items())
                    print(
                        f"note: {key} is now {new.class_path}; the settings of {old.class_path} no longer apply "
                        f"({settings})",
                        file=sys.stderr,
                    )
                old.init_args = Namespace()
        return super().merge_config(cfg_from, cfg_to)


def classes(config: Any, prefix: str = "") -> Iterator[tuple[str, Namespace]]:
    """Yield (key, namespace) for all parts of a configuration that name a class."""
    if not isinstance(config, Namespace):
        return
    if isinstance(config.get("class_path"), str) and prefix:
        yield prefix, config
    for name, value in vars(config).items():
        yield from classes(value, f"{prefix}.{name}" if prefix else name)


def option_names(parser: LightningArgumentParser) -> Iterator[str]:
    """Yield the keys that a parser takes."""
    for action in parser._actions:
        if action.dest not in ("help", "==SUPPRESS=="):
            yield action.dest


def explain(message: str, known: list[str]) -> str:
    """Return a parser's message as one line, with the key that was probably meant."""
    line = re.sub(r"\s+", " ", message).strip()
    unknown = re.search(r"unrecognized arguments?: --([\w.]+)", line, re.IGNORECASE) or re.search(
        r"(?:not accept|Option|[Kk]ey) (?:option |key )?['\"]([\w.]+)['\"]", line
    )
    if unknown:
        meant = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.6)
        if meant:
            line += f"; did you mean {meant[0]}?"
    return line
