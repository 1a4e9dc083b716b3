"""Configuration files: whether they are YAML that says each thing once, and the texts in them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class _Once(yaml.SafeLoader):
    """Reads YAML, and refuses a key that stands twice in one place, because the last one would silently win.

    It also refuses an alias inside of what it stands for, in which jsonargparse would look for ever.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node."""
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node is not None and node.end_mark is None:  # it is not over yet
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} is in itself", problem_mark=event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def check_files(arguments: list[str]) -> None:
    """Read the configuration files on a command line as YAML, because jsonargparse does not say which one is wrong.

    Raises:
        ValueError: a file is missing, is not YAML, or holds no keys.
    """
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    paths = [value if name in ("--config", "-c") else name.partition("=")[2] for name, value in pairs if _names(name)]
    for path in paths:
        if Path(path).is_fifo():
            raise ValueError(f"--config {path} is a pipe, but is read more than once: write it to a file")
        try:
            content = yaml.load(Path(path).read_text(), _Once)
        except OSError as error:
            raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--config {path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise ValueError(f"--config {path} is not YAML{where}: {getattr(error, 'problem', error)}") from error
        except (ValueError, RecursionError) as error:  # of a date such as 2026-02-30, or of a thousand brackets
            raise ValueError(f"--config {path} holds a value that is none in YAML: {error}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"--config {path} holds no keys: write at least one, such as `trainer: {{max_epochs: 5}}`")


def _names(argument: str) -> bool:
    return argument in ("--config", "-c") or argument.startswith("--config=")


def texts(settings: object) -> Iterator[str]:
    """Yield all texts in a configuration."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from texts(value)
