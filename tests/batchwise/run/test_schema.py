"""The schema for editors takes the files that the command line takes, and finds mistakes in them."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import DIGITS

from batchwise.run.main import main

pytestmark = pytest.mark.slow

OVERLAYS = {
    "arguments of a class that another file names": {
        "data": {"batch_size": 256},
        "model": {"reference_batch_size": None},
    },
    "a class by its name": {"model": {"optimizer": "SGD"}, "trainer": {"logger": {"class_path": "CSVLogger"}}},
    "a class of somebody else": {"model": {"optimizer": {"class_path": "elsewhere.Lion", "init_args": {"any": 1}}}},
    "several": {"trainer": {"callbacks": [{"class_path": "batchwise.callbacks.ema.EMA"}]}},
}
MISTAKES = {
    "a type": {"trainer": {"max_epochs": "twenty"}},
    "a range": {"data": {"init_args": {"batch_size": 0}}},
    "a choice": {"model": {"init_args": {"schedule": {"shape": "square"}}}},
    "a class of ours that is not there": {"model": {"class_path": "batchwise.tasks.classification.Classifier"}},
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("schema")
    (folder / "configs").mkdir()
    with contextlib.chdir(folder):
        assert main(None, ["schema"]) == 0
    return jsonschema.Draft202012Validator(json.loads((folder / "configs" / "schema.json").read_text()))


def keys(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """All keys of a configuration, each with the place where it stands."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                yield path, key
            yield from keys(item, (*path, key))


def test_a_misspelt_key_is_found_wherever_it_is(schema: Any) -> None:
    config = yaml.safe_load(Path(DIGITS[1]).read_text())
    assert list(schema.iter_errors(config)) == []
    places = list(keys(config))
    assert len(places) > 30
    for path, key in places:
        changed = inner = copy.deepcopy(config)
        for step in path:
            inner = inner[step]
        inner[f"{key}x"] = inner.pop(key)
        assert not schema.is_valid(changed), (*path, key)


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_right(name: str, schema: Any) -> None:
    assert list(schema.iter_errors(OVERLAYS[name])) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong(name: str, schema: Any) -> None:
    assert not schema.is_valid(MISTAKES[name])


def test_descriptions_are_those_of_the_docstrings(schema: Any) -> None:
    described = schema.schema["$defs"]["batchwise.tasks.classification.Classification.arguments"]["properties"]
    assert all(described[name].get("description") for name in ("network", "optimizer", "reference_batch_size"))


@pytest.mark.parametrize("arguments", [["a.txt"], ["nowhere/a.json"], ["a.json", "b.json"], []])
def test_where_it_cannot_be_written(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["schema", *arguments]) == 2
    assert "write the name of a .json file, in a folder that exists" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
