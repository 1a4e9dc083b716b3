"""`inspect` shows the batches, trains nothing, and says each thing that is wrong in one line."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CSV, DIGITS, TWO, Result, absolute, run_here, wandb_records
from PIL import Image
from torch import Tensor

from batchwise.batching.fetch import InMemory, make_fetch
from batchwise.choosing.classes import Classes
from batchwise.choosing.look import BLOCK, Look, Values, hashes
from batchwise.choosing.sheet import draw
from batchwise.run.main import main

INSPECT = ("inspect", *CSV, "--seconds", 2, "--trainer.accelerator", "cpu")
MODEL = ("--model", "batchwise.tasks.classification.Classification", "--model.network")
MLP = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: %d, num_classes: 4}}"
PLANTED = """
from dataclasses import replace
import numpy as np
import torch
from batchwise.data.module import DataModule

class Planted(DataModule):
    def __init__(self, kind: str = "none", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def load(self, split):
        everything = torch.randn(460, 5, generator=torch.Generator().manual_seed(0))
        x = {"train": everything[:400], "val": everything[400:430], "test": everything[430:]}[split].clone()
        y = torch.arange(len(x)) % 4
        if self.kind == "shared" and split == "val":
            x[7] = everything[33]
        if self.kind == "nan" and split == "train":
            x[17, 2] = float("nan")
        if self.kind == "copy" and split == "train":
            x[90] = x[12]
        if self.kind == "column":
            x[:, 3] = 2.5
        if self.kind == "constant":
            x[:] = 1.5
        if self.kind == "sorted":
            y = y.sort().values
        if self.kind == "blank":
            x = x[:, None, None].repeat(1, 1, 5, 1)
            x[3] = 2
        if self.kind == "no test" and split == "test":
            return np.load("nosuch.npy")
        if self.kind == "no data":
            return np.load("nosuch.npy")
        return x, y

    def transform(self, batch, training):
        return replace(batch, inputs=batch.inputs / 0) if self.kind == "transform" else batch
"""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("planted_data.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    sys.modules.pop("planted_data", None)
    importlib.invalidate_caches()


def inspect_planted(kind: str, *arguments: object, batch_size: int = 40, width: int = 5) -> Result:
    data = f"{{class_path: planted_data.Planted, init_args: {{kind: {kind}, batch_size: {batch_size}}}}}"
    return run_here(*INSPECT, "--data", data, *MODEL, MLP % width, *arguments)


def found(result: Result) -> list[str]:
    assert result.code == 0, result.out + result.err
    return [line.removeprefix("found: ") for line in result.out.splitlines() if line.startswith("found: ")]


def table(result: Result) -> str:
    return re.sub(r"\s+", " ", result.out.split("found: ")[0])


@pytest.mark.slow
def test_digits() -> None:
    """In one process, though two devices are configured: the batches are whole, and the plan is that of two."""
    result = run_here(*INSPECT, *DIGITS, *TWO, *CSV)
    assert found(result) == ["nothing wrong"]
    text = table(result)
    assert "examples train 1,259, val 269, test 269 looked at all" in text
    assert "batch 64; devices 2, micro_batch_size 32, steps_per_epoch 20" in text
    assert "inputs uint8 [1, 8, 8]: 0 to 16, mean 4.88, std 6.01" in text
    assert re.search(r"to the network float32 \[1, 8, 8\]: -0.8111 to 1.85, mean \S+, std 1 ", text)
    assert (result.folder / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert "batch_size: 64" in (result.folder / "inspect.yaml").read_text()
    assert not (result.folder / "checkpoints").exists()


WRONG = {
    "none": ["nothing wrong"],
    "shared": ["1 of 30 val examples are in train too, such as 7, which is 33 there"],
    "nan": ["1 of 400 train examples hold a value that is not finite, such as example 17"],
    "copy": ["1 of 400 train examples are copies, such as 90 of 12"],
    "constant": [
        "all 400 train examples have the same inputs: nothing can be learnt from them",
        "30 of 30 val examples are in train too, such as 0, which is 0 there",
    ],
    "column": ["1 of 5 columns are the same in all 400 train examples: 3"],
    "transform": ["transform makes values that are not finite, such as of train example 0"],
    "no test": [
        "the test split cannot be loaded (FileNotFoundError: [Errno 2] No such file or directory: 'nosuch.npy'"
    ],
}


@pytest.mark.usefixtures("planted")
@pytest.mark.filterwarnings("ignore:the inputs of the first 32")
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.slow
def test_what_is_wrong_is_said(kind: str) -> None:
    result = inspect_planted(kind)
    lines = found(result)
    for words in WRONG[kind]:
        assert any(line.startswith(words) for line in lines), lines
    # Nothing else is said of the training split.
    assert sum("train examples" in line or "batch" in line for line in lines) == ("train examples" in str(WRONG[kind]))


@pytest.mark.usefixtures("planted")
@pytest.mark.slow
def test_blank_images_and_a_network_that_cannot_take_them() -> None:
    lines = found(inspect_planted("blank", width=6))
    assert lines[0] == "1 of 400 train examples are one value throughout, such as example 3"
    assert "model.network MLP cannot take the data, whose inputs are [1, 5, 5] per example" in lines[-1]


@pytest.mark.usefixtures("planted")
@pytest.mark.weekly
def test_batches_unlike_the_data_are_found() -> None:
    assert found(inspect_planted("sorted")) == ["nothing wrong"]  # as they are shuffled
    (line,) = found(inspect_planted("sorted", "--data.order", "batchwise.batching.order.Sequential"))
    # Half of the batches of 40 lie within one class of 100, and the others between two or within one: 0.75 at most.
    distance = float(re.search(r"are ([\d.]+) from", line)[1])  # type: ignore[index]
    assert distance == pytest.approx((8 * 0.75 + 2 * 0.5) / 10, abs=0.005)
    assert "data.order is Sequential" in line


@pytest.mark.usefixtures("planted")
@pytest.mark.slow
def test_repeats_within_a_batch() -> None:
    assert "1 of 1 batches repeat inputs within the batch, such as batch 0, in 1 examples" in found(
        inspect_planted("copy", batch_size=400)
    )


@pytest.mark.usefixtures("planted")
def test_mistakes_are_one_line_and_leave_nothing() -> None:
    for result, words in (
        (inspect_planted("none", "--seconds", 0), "seconds is 0: write a number above 0"),
        (inspect_planted("no data"), "nosuch.npy"),
        (inspect_planted("none", "--data.batch_size", 0), "data.batch_size is 0"),
        (inspect_planted("none", "--ckpt_path", "last"), "ckpt_path"),
    ):
        assert result.code == 2
        (line,) = result.err.splitlines()
        assert line.startswith("error: ")
        assert words in line
    assert not list(Path("runs").glob("*/*"))


@pytest.mark.usefixtures("planted")
def test_fit_warns_of_constant_inputs() -> None:
    data = "{class_path: planted_data.Planted, init_args: {kind: constant, batch_size: 40}}"
    with pytest.warns(UserWarning, match="inputs of the first 32 training examples are all the same"):
        result = run_here("fit", *CSV, "--data", data, *MODEL, MLP % 5, "--trainer.max_steps", 1)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_wandb_has_the_picture() -> None:
    result = run_here("inspect", *DIGITS, "--seconds", 2)
    assert "upload it:  wandb sync " in result.out
    (path,) = result.folder.glob("wandb/offline-run-*/run-*.wandb")
    keys = {item.nested_key[0] if item.nested_key else item.key for record in wandb_records(path)
            for item in record.history.item}  # fmt: skip
    assert "inspect/batch" in keys, result.out + result.err


@pytest.mark.slow
def test_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    with contextlib.redirect_stdout(Terminal()) as terminal:
        assert main("batchwise", absolute((*INSPECT, *DIGITS, *CSV))) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).split("\n")
    rows = [line for line in lines if line.startswith(" ")]
    assert len(rows) >= 6
    assert max(map(len, rows)) <= 80


# The parts


def test_distance_of_classes() -> None:
    mix = Classes([0, 0, 1, 1], [[0, 0], [0, 1], [7, 7]])
    assert mix.names.tolist() == [0, 1, 7]
    assert mix.data.tolist() == [0.5, 0.5, 0]
    assert mix.distances.tolist() == [0.5, 0, 1]


def test_random_batches_are_as_far_as_chance_makes_them() -> None:
    mix = Classes([0, 1] * 5000, [[0] * 100] * 32)
    assert mix.by_chance == pytest.approx((2 * np.pi * 100) ** -0.5, rel=0.3)  # E|share - 1/2|, for two classes


def test_looking_ends_in_time_and_is_everywhere() -> None:
    seen = Look("train", 100_000).read(InMemory([torch.arange(100_000)[:, None]]), seconds=0)
    assert len(seen.examples) == BLOCK
    assert max(seen.examples) > 50_000 > min(seen.examples)
    table = Look("train", 4).read(InMemory([torch.tensor([[1.0, 7.0], [3.0, 5.0]] * 2)]), seconds=100)
    assert str(table.values) == "1 to 7, mean 4, std 2.24"
    whole = Look("train", 1000).read(InMemory([torch.arange(1000)[:, None]]), seconds=100)
    assert sorted(whole.examples) == list(range(1000))


def test_what_stands_in_for_the_unreadable_is_no_copy() -> None:
    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index == 5:
                raise OSError("broken")
            return torch.full((3,), float(index)), index % 2

    seen = Look("train", 20).read(make_fetch(Files(), max_unreadable=1), seconds=100)
    assert sorted(seen.examples) == [index for index in range(20) if index != 5]
    assert seen.copies() == []


def test_hashes_are_of_the_content() -> None:
    inputs = {"a": torch.tensor([[1, 2], [1, 2], [2, 1]]), "b": (torch.tensor([0.0, 0.0, 0.0]),)}
    first, second, third = hashes(inputs)
    assert first == second != third
    # Where signs alone differ, in two places: sums of products would not tell.
    one, other = hashes(torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64))
    assert one != other


def test_values_of_columns_leave_out_what_is_not_finite() -> None:
    values = Values()
    wrong, _ = values.add(torch.tensor([[1.0, 10.0], [torch.nan, 30.0]]))
    assert wrong.tolist() == [False, True]
    values.add(torch.tensor([[3.0, torch.inf]]))
    assert values.low.tolist() == [1, 10]
    assert values.high.tolist() == [3, 30]
    assert (values.sum / values.count).tolist() == [2, 20]


def test_signals_are_not_drawn_as_images(tmp_path: Path) -> None:
    """An image of 2 x 400 pixels is a line that nobody sees."""
    heights = []
    for shape in ((8, 2, 400), (8, 2, 32)):
        draw(tmp_path / "sheet.png", torch.rand(shape), None, None, [])
        with Image.open(tmp_path / "sheet.png") as picture:
            heights.append(picture.height)
    assert heights[0] < heights[1]
