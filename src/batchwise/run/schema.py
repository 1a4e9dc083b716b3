"""A JSON Schema of the configurations, from which editors complete keys and mark mistakes."""

import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema
from jsonargparse._util import get_import_path

from batchwise.host import write_whole
from batchwise.run import program
from batchwise.run.cli import CLI

FILE = Path("configs/schema.json")
LIBRARIES = (
    *("torch.nn", "torch.optim"),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "strategies")),
)
"""Modules whose own classes are shown. Any other class can be named, but its arguments are not known."""


class Unstarted(CLI):
    """The command line with its parsers, which runs nothing."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse nothing."""
        self.config = Namespace({"subcommand": "fit", "fit": Namespace()})

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None:
        """Do nothing."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


class Schema(ParserJsonschema):
    """The generator of jsonargparse, which by itself shows each class that is imported, and forbids all others."""

    def subclass_def(self, class_type: Any, action: Any) -> dict:
        """Describe the three ways to write a class.

        They are its name, its `class_path` with arguments, and the arguments alone.
        """
        paths = sorted(known(class_type))
        other = self.unknown_class_path_schema()
        other["properties"]["class_path"] = {
            "type": "string",
            "not": {"anyOf": [{"enum": paths}, {"pattern": r"^batchwise\."}]},
        }
        other["dependentRequired"] = {"init_args": ["class_path"]}
        whole = [self.class_path_schema(path, action) for path in paths]
        short = [self.class_parser_schema(path, action) for path in paths]  # the class is that of another file
        return anyof_schema([{"type": "string"}, *whole, *short, other])

    def class_parser_schema(self, class_type: Any, action: Any, description: str | None = None) -> dict:
        """Describe the arguments of a class, once for all places."""
        if not isinstance(class_type, str):
            return super().class_parser_schema(class_type, action, description)
        name = f"{class_type}.arguments"
        if name not in self.defs:
            self.defs[name] = {}  # which ends the recursion
            self.defs[name].update(super().class_parser_schema(class_type, action, description))
        return {"$ref": f"#/$defs/{name}"}


def known(kind: type) -> set[str]:
    """Return the paths of the class and its subclasses that can be made, and that belong to us or to `LIBRARIES`."""
    found, waiting = set(), [kind]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, type) or issubclass(one, type):
            continue
        waiting += one.__subclasses__()
        try:
            path = str(get_import_path(one))
        except (ImportError, AttributeError):
            continue
        module = path.rpartition(".")[0]
        ours = path.split(".")[0] in (program.name, "batchwise") and "._" not in path
        if (ours or module in LIBRARIES) and not inspect.isabstract(one) and "<locals>" not in path:
            found.add(path)
    return found


def write(arguments: list[str]) -> int:
    """Write the schema to a file, by default `configs/schema.json`. Return the exit code."""
    path = Path(arguments[0]) if arguments else FILE
    if len(arguments) > 1 or path.suffix != ".json" or not path.parent.is_dir():
        given = " ".join(arguments) or path
        print(f"error: schema {given}: write the name of a .json file, in a folder that exists", file=sys.stderr)
        return 2
    for name in {program.name, "batchwise"}:
        _import_all(name)
    parser = Unstarted(["fit"])._parser("fit")
    write_whole(path, json.dumps(_partial(Schema().generate(parser)), indent=1) + "\n")
    print(f"{path}: editors complete from it the files that name it in a comment")
    return 0


def _import_all(name: str) -> None:
    """Import the modules of a package, because only classes that are imported are known."""
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                print(f"{module.name} is left out: {error}", file=sys.stderr)


def _partial(schema: Any) -> Any:
    """Return the schema without required keys: a file may be laid over another, and has a part of them."""
    if isinstance(schema, dict):
        return {key: _partial(value) for key, value in schema.items() if key != "required" or isinstance(value, dict)}
    return [_partial(value) for value in schema] if isinstance(schema, list) else schema
