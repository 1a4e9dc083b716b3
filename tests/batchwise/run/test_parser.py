"""A value out of range is one line that names key, value and what to write, however deep the class stands."""

import contextlib
import io
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from helpers import CSV, DIGITS, run_here
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)
from lightning.pytorch.loggers import Logger
from torch.optim import SGD, Optimizer

from batchwise.optim.schedule import Schedule
from batchwise.run.explain import A_PATH
from batchwise.run.parser import Parser


class Layer:
    def __init__(self, width: PositiveInt, dropout: ClosedUnitInterval | None = None) -> None:
        self.values = width, dropout


class Things:
    def __init__(
        self,
        size: PositiveInt,
        workers: NonNegativeInt = 0,
        share: ClosedUnitInterval = 0.5,
        inside: OpenUnitInterval = 0.5,
        rate: PositiveFloat = 1.0,
        decay: NonNegativeFloat = 0.0,
        most: PositiveInt | None = None,
        shares: list[OpenUnitInterval] | None = None,
        widths: list[PositiveInt] = [1],  # noqa: B006
        count: int = 1,
        bits: Literal[16, 32] | Literal["full"] | None = None,
        either: int | float = 1,
        text: str | None = None,
        layer: Layer | None = None,
        layers: list[Layer] | None = None,
        optimizer: Callable[[Iterable], Optimizer] = SGD,
        anything: Logger | list[Logger] | bool = False,
        needed: Layer = Layer(1),  # noqa: B008
    ) -> None:
        pass


def said(
    *arguments: str, subclass: bool = True, kind: type = Things, given: tuple[str, ...] = ("--data.size=1",)
) -> str:
    """The one line that the parser writes, without its first word."""
    parser = Parser()
    parser.add_argument("--config", action="config")
    if subclass:
        parser.add_subclass_arguments(kind, "data")
    else:
        parser.add_class_arguments(kind, "data")
    own = [f"--data={__name__}.Things"] if subclass and kind is Things else []
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stop:
        parser.parse_args([*own, *given, *arguments])
    assert stop.value.code == 2
    (line,) = error.getvalue().splitlines()
    return line.removeprefix("error: ")


RANGES = {
    "--data.size=0": "data.size is 0: write a whole number of at least 1",
    "--data.size=-3": "data.size is -3: write a whole number of at least 1",
    "--data.size=2.5": "data.size is 2.5: write a whole number of at least 1",
    "--data.size=many": "data.size is many: write a whole number of at least 1",
    "--data.workers=-1": "data.workers is -1: write a whole number of at least 0",
    "--data.share=1.5": "data.share is 1.5: write a number from 0 to 1",
    "--data.share=half": "data.share is half: write a number from 0 to 1",
    "--data.inside=1": "data.inside is 1: write a number above 0 and below 1",
    "--data.rate=0": "data.rate is 0: write a number above 0",
    "--data.decay=-1e-3": "data.decay is -1e-3: write a number of at least 0",
    "--data.most=0": "data.most is 0: write a whole number of at least 1",
    "--data.shares=[0.5, 1]": "data.shares is [0.5, 1]: write a number above 0 and below 1 for each",
    "--data.widths=[4, 0]": "data.widths holds 0: write a whole number of at least 1 for each",
    "--data.widths=3": "data.widths is 3: write a list",
    "--data.count=x": "data.count is x: write a whole number",
    "--data.layer={class_path: LAYER, init_args: {width: 0}}": (
        "data.layer.width is 0: write a whole number of at least 1"
    ),
    "--data.layer={class_path: LAYER, init_args: {width: 1, dropout: 2}}": (
        "data.layer.dropout is 2: write a number from 0 to 1"
    ),
    "--data.layers=[{class_path: LAYER, init_args: {width: 0}}]": (
        "data.layers.width is 0: write a whole number of at least 1"
    ),
    "--data.layer={class_path: LAYER, init_args: {widht: 2}}": (
        "Option 'data.layer.widht' is not accepted; did you mean data.layer.width?"
    ),
    "--data.layer={class_path: LAYER, init_args: {dropout: 0}}": "data.layer.width is not set: write it",
    "--data.layer={class_path: LAYER, width: 1}": (
        "data.layer.class_path has other keys beside it: write those under data.layer.init_args"
    ),
    "--data.anything={class_path: lightning.pytorch.loggers.CSVLogger, save_dir: a}": (
        "data.anything has save_dir beside its class: write data.anything.init_args.save_dir"
    ),
    "--data.layer={init_args: {width: 1}, dropout: 0}": (
        "data.layer has dropout beside its class: write data.layer.init_args.dropout"
    ),
    "--data.layer=[1]": "data.layer is [1]: write class_path and init_args",
    "--data.layer={class_path: torch.optim.SGD}": (
        "data.layer torch.optim.SGD gives no Layer: write a class of that kind, or a function whose return type is "
        "written (`-> Layer`)"
    ),
    "--data.needed=": f"data.needed is '': write {A_PATH}",
    "--data.needed=[1]": "data.needed is [1]: write class_path and init_args",
    "--data.anything={a: 1}": "data.anything is {'a': 1}: write a list or true or false",
    "--data.layer={class_path: LAYER, init_args: {width: 1, t: 2}}": (
        "Option 'data.layer.t' is not accepted; the class takes width, dropout"
    ),
    "--data.most=": "data.most is '': write a whole number of at least 1",
    "--data.most=true": "data.most is true: write a whole number of at least 1",
    "--data.most=[3]": "data.most is [3]: write a whole number of at least 1",
    "--data.bits=8": "data.bits is 8: write 16, 32 or full",
    "--data.bits=x": "data.bits is x: write 16, 32 or full",
    "--data.either=x": "data.either is x: write a number",
    "--data.layers=Layer": "data.layers is Layer: write a list, such as [Layer]",
    "--data.anything=Layr": f"data.anything is Layr: write a list or true or false or {A_PATH}",
    "--data.layer=LAYERs": (
        f"data.layer is {__name__}.Layers, but {__name__} has no Layers: did you mean {__name__}.Layer?"
    ),
    "--data.layer=batchwise.models.dropouts.Dropout": (
        "data.layer is batchwise.models.dropouts.Dropout, but batchwise.models has no dropouts: "
        "did you mean batchwise.models.dropout.Dropout?"
    ),
    "--data.optimizer=torch.optim.Adamw": (
        "data.optimizer is torch.optim.Adamw, but torch.optim has no Adamw: did you mean torch.optim.AdamW?"
    ),
    "--data.optimizer=torch.optim.Zebra": (
        f"data.optimizer is torch.optim.Zebra, but torch.optim has no Zebra: write {A_PATH}"
    ),
    "--data.optimizer=torch.nn.Linear": (
        "data.optimizer torch.nn.Linear gives no Optimizer: write a class of that kind, or a function whose return "
        "type is written (`-> Optimizer`)"
    ),
    "--data.layer={class_path: LAYER, init_args: {width: 1, colour: 2}}": (
        "Option 'data.layer.colour' is not accepted; the class takes width, dropout"
    ),
}


@pytest.mark.parametrize("subclass", [True, False], ids=["a class of the user's choice", "a fixed class"])
@pytest.mark.parametrize(("argument", "line"), RANGES.items(), ids=RANGES.keys())
def test_out_of_range(argument: str, line: str, subclass: bool) -> None:
    assert said(argument.replace("LAYER", f"{__name__}.Layer"), subclass=subclass) == line


def test_out_of_range_in_a_file() -> None:
    def of(layer: dict) -> str:
        settings = {"data": {"class_path": f"{__name__}.Things", "init_args": {"layer": layer}}}
        Path("c.yaml").write_text(yaml.safe_dump(settings))
        return said("--config=c.yaml")

    layer = f"{__name__}.Layer"
    assert (
        of({"class_path": layer, "init_args": {"width": 0}})
        == "data.layer.width is 0: write a whole number of at least 1"
    )
    assert of({"class_path": f"{layer}s"}).endswith(f"{__name__} has no Layers: did you mean {layer}?")


def test_null_where_a_number_must_be() -> None:
    assert said("--data.size=null", subclass=False) == "data.size is null: write a whole number of at least 1"
    assert said("--data.size=null") == "data.size is not set: write it"


@pytest.mark.parametrize("text", ["#", "## ", "\n# ", "a #b", "~b"])
def test_a_text_is_no_comment(text: str) -> None:
    """YAML takes `#` for the beginning of a comment, so that a delimiter of documents was null."""
    parser = Parser()
    parser.add_class_arguments(Things, "data")
    assert parser.parse_args(["--data.size=1", f"--data.text={text}"]).data.text == text


USUAL = {
    "--lr=0.1": "unrecognized arguments: --lr=0.1; did you mean model.optimizer.lr?",
    "--batch_size=3": "unrecognized arguments: --batch_size=3; did you mean data.batch_size?",
    "--data.lr=0.1": "Option 'data.lr' is not accepted; did you mean model.optimizer.lr?",
    "--data.layer={class_path: LAYER, init_args: {width: 1, seed: 2}}": (
        "Option 'data.layer.seed' is not accepted; did you mean seed_everything?"
    ),
    "--batch-size=3": "unrecognized arguments: --batch-size=3; did you mean data.batch_size?",
    "digits.yaml": "unrecognized arguments: digits.yaml; did you mean --config digits.yaml?",
    "--resume": "unrecognized arguments: --resume",  # because this parser has no ckpt_path
    "--model.data.share=1": "unrecognized arguments: --model.data.share=1; did you mean data.share?",
}


@pytest.mark.parametrize(("argument", "line"), USUAL.items(), ids=USUAL.keys())
def test_keys_that_others_have_elsewhere_are_named(argument: str, line: str) -> None:
    subclass = not argument.startswith("--model")
    assert said(argument.replace("LAYER", f"{__name__}.Layer"), subclass=subclass) == line


def test_the_ends_of_ranges_are_in_them() -> None:
    parser = Parser()
    parser.add_class_arguments(Things, "data")
    ends = parser.parse_args(
        ["--data.size=1", "--data.workers=0", "--data.share=1", "--data.decay=0", "--data.most=null"]
    )
    assert (ends.data.size, ends.data.share, ends.data.most) == (1, 1.0, None)


class Group:
    def __init__(self, size: int = 1, schedule: Schedule = Schedule(), things: dict[str, int] | None = None) -> None:  # noqa: B008
        pass


@pytest.mark.parametrize("value", ["cosine", "3", "null", "[1]"])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_value_in_the_place_of_a_group(value: str, in_a_file: bool) -> None:
    for subclass, key in ((True, "data.schedule"), (False, "data.schedule"), (False, "data")):
        first = "data.schedule.shape" if key != "data" else "data.size"
        settings = {"schedule": yaml.safe_load(value)}
        whole = {"class_path": f"{__name__}.Group", "init_args": settings} if subclass else settings
        Path("c.yaml").write_text(yaml.safe_dump({"data": whole if key != "data" else yaml.safe_load(value)}))
        own = [f"--data={__name__}.Group"] if subclass else []
        arguments = ["--config=c.yaml"] if in_a_file else [*own, f"--{key}={value}"]
        line = f"{key} is {value}, but it is a group of keys: write them, such as --{first}"
        assert said(*arguments, subclass=subclass, kind=Group, given=()) == line


def test_a_value_in_the_place_of_a_dict_or_a_list() -> None:
    assert said("--data.things=3", subclass=False, kind=Group, given=()) == "data.things is 3: write a dict"
    line = said("--data.things={a:1,b:2}", subclass=False, kind=Group, given=())
    assert line == "data.things is {a:1,b:2}: write a dict, such as {a: 1,b: 2}"


@pytest.mark.parametrize("key", ["layer", "layers", "optimizer", "anything"])
def test_a_module_that_is_not_there(key: str) -> None:
    line = said(f"--data.{key}={'[not_there.Net]' if key == 'layers' else 'not_there.Net'}")
    module, remedy = "No module named 'not_there'", f"write {A_PATH}, of this folder or of what is installed"
    assert line == f"data.{key} is not_there.Net ({module}): {remedy}"


class Several:
    def __init__(self, optimizer: dict[str, Callable[[Iterable], Optimizer]]) -> None:
        pass


def test_a_class_in_the_place_of_several() -> None:
    """There was `- Expected a path but torch.optim.Adam either not accessible or invalid` before it."""
    line = said("--data.optimizer=torch.optim.Adam", subclass=False, kind=Several, given=())
    assert line == "data.optimizer is torch.optim.Adam: write a dict"


@pytest.mark.parametrize(("written", "name"), [("0.5", "0.5"), ("true", "True"), ("a b", '"a b"')])
def test_a_name_that_cannot_be_one(written: str, name: str) -> None:
    """There was no key: `Key must be a string, got: 0.5`."""
    line = f"has a key {name}: write the name of an argument"
    assert said(f"--data.layer={{{written}: 1}}") == f"data.layer {line}"
    Path("c.yaml").write_text(f"data: {{class_path: {__name__}.Things, init_args: {{{written}: 1}}}}")
    assert said("--config=c.yaml", subclass=True, given=()) == f"data {line}"
    Path("c.yaml").write_text(f"{written}: 1")
    assert said("--config=c.yaml") == f"the configuration {line}"


@pytest.mark.slow
def test_help_lists_the_classes_of_the_engine_and_not_those_of_pytorch() -> None:
    helped = "".join(run_here("fit", "--data.help", "batchwise.sources.digits.Digits").out.split())
    for name in (
        "order.Sequential",
        "sampling.Stratified",
        "sampling.Balanced",
        "mixture.Mixture",
        "shards.BlockShuffled",
    ):
        assert f"batchwise.batching.{name}" in helped
    assert "batchwise.data.mixing.MixUp" in helped
    helped = "".join(run_here("fit", "--model.help", "batchwise.tasks.regression.Regression").out.split())
    networks = helped.rpartition("anymodulethattakes")[2].partition("--model.optimizer")[0]
    assert "batchwise.models.resnet.ResNet" in networks
    assert "torch.nn" not in networks
    assert "torch.optim.SGD" in helped


class Kept:
    def __init__(
        self, size: PositiveInt, rate: PositiveFloat, sizes: list[PositiveInt], inner: Layer, kind: str = "a"
    ) -> None:
        self.values = size, rate, sizes[0], sizes[1]
        self.inner, self.kind = inner, kind


def test_a_class_gets_ordinary_numbers() -> None:
    """Others could not be loaded from a checkpoint with `weights_only`."""
    parser = Parser()
    parser.add_subclass_arguments(Kept, "data")
    settings = (
        "size=3",
        "rate=2",
        "sizes=[1, 2]",
        f"inner={__name__}.Layer",
        "inner.width=4",
        "inner.dropout=0",
        "kind=b",
    )
    config = parser.parse_args([f"--data={__name__}.Kept", *(f"--data.{setting}" for setting in settings)])
    kept = parser.instantiate(config).data
    assert kept.values == (3, 2.0, 1, 2)
    assert kept.kind == "b"
    assert [type(value) for value in (*kept.values, *kept.inner.values)] == [int, float, int, int, int, float]


DATA = """
from jsonargparse.typing import PositiveInt
from batchwise.sources.digits import Digits

class Own(Digits):
    def __init__(self, most: PositiveInt, many: list[PositiveInt], **kwargs):
        super().__init__(**kwargs)
        self.kept = {"most": most, "many": many}

    def state_dict(self):
        return super().state_dict() | self.kept
"""


@pytest.mark.slow
def test_a_run_with_such_numbers_in_its_checkpoint_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_numbers.py").write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("--data", "own_numbers.Own", "--data.batch_size", 64, "--data.most", 3, "--data.many", "[1, 2]")
    first = run_here("fit", *DIGITS, *CSV, *own, "--trainer.max_steps", 2)
    assert first.code == 0, first.err
    assert first.checkpoint()["Own"]["many"] == [1, 2]
    second = run_here("fit", *DIGITS, *CSV, *own, "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert second.code == 0, second.err
    assert second.checkpoint()["global_step"] == 3
    wrong = run_here("fit", *DIGITS, *CSV, *own, "--data.most", 0)
    assert (wrong.code, wrong.err) == (2, "error: data.most is 0: write a whole number of at least 1\n")


class Abstract(Layer, ABC):
    @abstractmethod
    def forward(self) -> None: ...

    @abstractmethod
    def backward(self) -> None: ...


def test_an_abstract_class_names_its_methods() -> None:
    assert said("--data.layer", f"{__name__}.Abstract") == (
        f"data.layer {__name__}.Abstract lacks backward and forward: define them in the class"
    )
    own = ("--model", "batchwise.tasks.task.Task", "--model.network", "batchwise.models.mlp.MLP")
    result = run_here("fit", *DIGITS, *own)
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: model batchwise.tasks.task.Task lacks losses: define it in the class"


def test_what_is_no_path() -> None:
    assert said("--data.layer", "5") == (
        "data.layer is 5: write the path of a class or function, such as package.module.Name"
    )


def made_without_a_type(width: int = 1):
    return Layer(width)


def test_a_function_needs_its_return_type() -> None:
    function = f"{__name__}.made_without_a_type"
    assert said("--data.layer", function) == (
        f"data.layer {function} gives no Layer: write a class of that kind, or a function whose return type is written "
        "(`-> Layer`)"
    )


def test_an_argument_before_its_class() -> None:
    result = run_here("fit", "--data.batch_size", 64, "--data", "batchwise.sources.digits.Digits")
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: data.batch_size comes before data: write --data CLASS first"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            b"trainer: {max_epochs: 1}\nname: a\ntrainer: {devices: 1}\n",
            "is not YAML at line 3: trainer stands there twice",
        ),
        (b"data:\n  init_args:\n    a: 1\n    a: 2\n", "is not YAML at line 4: a stands there twice"),
        (b"name: a\n? [a, b]\n: 1\n", "is not YAML at line 2: found unhashable key"),
        (b"trainer: &t\n  callbacks: [*t]\n", "is not YAML at line 2: *t is in itself"),
        (b"name: 2026-02-30\n", "holds a value that is none in YAML: day is out of range for month"),
        (b"name: " + b"[" * 3000, "holds a value that is none in YAML: maximum recursion depth exceeded"),
        (b"name: d\xefgits\n", "is not text in UTF-8: invalid continuation byte at byte 7"),
    ],
)
def test_a_file_that_does_not_say_what_it_seems_to(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    result = run_here("fit", *DIGITS, *CSV, "--config", path)
    assert (result.code, result.err) == (2, f"error: --config {path} {line}\n")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run_here("fit", "--config", tmp_path / "pipe")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "is a pipe, but is read more than once: write it to a file" in result.err


def test_anchors_and_merged_keys_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "trainer: &one {max_epochs: &n 0}\nmodel: {init_args: {schedule: {<<: {warmup: 0.1}, warmup: 0.2}}}\n"
    )
    result = run_here("fit", *DIGITS, *CSV, "--config", path)
    assert result.code == 0, result.err


def test_a_file_of_the_user_that_is_not_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said that the class around it was not given yet."""
    Path("torn.py").write_text("class Net(:")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert said("--data.layer=torn.Net").removeprefix("data.layer: ") == "invalid syntax (torn.py, line 1)"
    result = run_here("fit", *DIGITS, *CSV, "--model.network", "torn.Net")
    assert result.err.splitlines()[-1] == "error: model.network: invalid syntax (torn.py, line 1)"


@pytest.mark.slow
def test_what_a_command_prints_is_taken_by_every_other() -> None:
    """What only some of them know is left out where it is as always, and kept where it was written."""
    path, before = DIGITS[1], None
    for verb in ("fit", "validate", "test", "predict", "export", "tune", "inspect", "fit"):
        printed = run_here(verb, "--config", path, "--print_config")
        assert printed.code == 0, printed.err
        assert before in (None, printed.out)
        path, before = "mine.yaml", printed.out
        Path(path).write_text(before)
    written = run_here("tune", *DIGITS, "--budget", 3, "--print_config")
    assert yaml.safe_load(written.out) == yaml.safe_load(before) | {"budget": 3}


def test_callbacks_whose_arguments_are_of_several_types_stay_readable() -> None:
    """A text where a function may be, and a device. In `config.yaml` stood "Unable to serialize instance ..."."""
    path = "lightning.pytorch.callbacks."
    pruning = ("ModelPruning", "--trainer.callbacks.pruning_fn", "l1_unstructured", "--trainer.callbacks.amount", 0.1)
    for callback, *arguments in (pruning, ("StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", 0.01)):
        printed = run_here("fit", *DIGITS, "--trainer.callbacks+", path + callback, *arguments, "--print_config")
        assert (printed.code, printed.err) == (0, "")
        Path("mine.yaml").write_text(printed.out)
        result = run_here("fit", "--config", "mine.yaml", "--trainer.fast_dev_run", "true")
        assert result.code == 0, result.err
        assert "Unable" not in printed.out + result.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n1 / 0", "ZeroDivisionError: division by zero at mine.py:2"),
        ("raise ValueError('x')", "ValueError: x at mine.py:1"),
        ("try:\n    import not_there\nexcept ImportError:\n    raise OSError('x')", "OSError: x at mine.py:4"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there' at mine.py:1"),
        ("def make():\n    return [][0]\n\n\nmake()", "IndexError: list index out of range at mine.py:2"),
        ("import json\njson.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes: "),
    ],
)
@pytest.mark.parametrize("path", ["mine.Net", "own.mine.Net"])
def test_an_error_in_the_file_of_a_class_is_named_with_its_place(
    text: str, words: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There were its words alone, and in a configuration the key of the class around it."""
    file = Path(*path.split(".")[:-1]).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for module in ("own", "own.mine", "mine"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("own.yaml").write_text(f"data: {{class_path: {__name__}.Things, init_args: {{size: 1, layer: {path}}}}}")
    told = [
        said(f"--data.layer={path}"),
        said("--config=own.yaml", subclass=True, given=()),
        said(f"--data={path}").replace("data: ", "data.layer: "),
    ]
    assert all(one.startswith(f"data.layer: {words}") and " at mine.py:" in one for one in told), told


class Failing(torch.nn.Module):
    """Has a mistake in its constructor."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.number = [1, 2][int(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "ValueError: invalid literal for int() with base 10: 'a' at test_parser.py:"),
        ("2", "IndexError: list index out of range at test_parser.py:"),
    ],
)
def test_an_error_in_a_class_of_the_user_is_named_with_its_place(text: str, words: str) -> None:
    """There were its words alone."""
    network = f"--model.network={__name__}.Failing"
    result = run_here("fit", *DIGITS, *CSV, network, "--model.network.text", text)
    assert (result.code, result.err.splitlines()[-1].startswith(f"error: {words}")) == (2, True), result.err
