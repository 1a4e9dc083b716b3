"""`export`: the file gives what the task gives, for any number of new examples, and without this project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import small
import torch
from helpers import CSV, DIGITS, Result, run_here
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import batchwise
from batchwise.batching.loader import MicroBatch
from batchwise.batching.ragged import Ragged
from batchwise.run.exporting import NOTES
from batchwise.run.loading import Trained

pytestmark = pytest.mark.slow

CLASSIFY = ("--model", "batchwise.tasks.classification.Classification", "--model.network", "batchwise.models.mlp.MLP")
SHORT = ("--data.batch_size", 8, "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", *CSV)
TRANSFORMER = ("--model.network", "batchwise.models.transformer.Transformer", "--model.network.depth", 1)


def pixels(trained: Any) -> Any:
    return trained.data.load("test")[0]


def new_texts(_: Any) -> list[torch.Tensor]:
    return [torch.arange(length, dtype=torch.int32) % 90 + 30 for length in (1, 9, 4, 30)]


def ragged(texts: list[torch.Tensor]) -> Ragged:
    return Ragged(torch.cat(texts), np.cumsum([0, *map(len, texts)]))


def folder() -> tuple:
    for label, level in (("cat", 60), ("dog", 200)):
        Path("photos", label).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((4, 4, 3), level + number, np.uint8)).save(f"photos/{label}/{number}.png")
    return (
        *("--data", "batchwise.sources.folder.Folder", "--data.path", "photos", "--data.size", 4),
        *(*CLASSIFY, "--model.network.in_features", 48, "--model.network.num_classes", 2),
    )


def table() -> tuple:
    rows = [f"{n},{'red' if n % 3 else 'blue'},{n * 2.5}" for n in range(60)]
    Path("prices.csv").write_text("\n".join(["size,colour,price", *rows]))
    return (
        *("--data", "batchwise.sources.table.Table", "--data.path", "prices.csv", "--data.target", "price"),
        *("--model", "batchwise.tasks.regression.Regression", "--model.network", "batchwise.models.mlp.MLP"),
        *("--model.network.in_features", 3, "--model.network.num_classes", 1),
    )


def text() -> tuple:
    Path("stories").mkdir()
    for number in range(20):
        Path(f"stories/{number}.txt").write_text(f"{number} bottles hung on the wall" * (1 + number % 3))
    return (
        *("--data", "batchwise.sources.text.Text", "--data.files", "stories/*.txt"),
        *("--model", "batchwise.tasks.language.Language", *TRANSFORMER),
    )


def labelled() -> tuple:
    rows = [f"{'good ' * (n % 7 + 1)},yes" if n % 2 else f"{'bad ' * (n % 5 + 1)},no" for n in range(80)]
    Path("said.csv").write_text("\n".join(["text,label", *rows]))
    return (
        *("--data", "batchwise.sources.text.Text", "--data.files", "said.csv", "--data.label_column", "label"),
        *("--model", "batchwise.tasks.classification.Classification", *TRANSFORMER, "--model.network.num_classes", 2),
    )


KINDS: dict[str, tuple[Any, Any]] = {
    "digits": (lambda: DIGITS, pixels),
    "folder": (folder, lambda _: torch.randint(0, 256, (37, 3, 4, 4), dtype=torch.uint8)),
    "table": (table, lambda _: torch.randn(37, 3)),
    "text": (text, new_texts),
    "labelled": (labelled, new_texts),
}


def by_torch(path: str) -> Any:
    return torch.export.load(path).module()


def by_onnx(path: str) -> Any:
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_outputs()]

    def run(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        found = session.run(names, {session.get_inputs()[0].name: inputs.numpy()})
        return dict(zip(names, map(torch.as_tensor, found), strict=True))

    return run


def agrees(trained: Trained, run: Any, inputs: Any) -> None:
    """One example, all of them, and all but one give what `predict` gives."""
    for chosen in (inputs[:1], inputs, inputs[1:]):
        texts = isinstance(chosen, list)
        expected = trained.predict(ragged(chosen) if texts else chosen)
        found = run(pad_sequence(chosen, batch_first=True, padding_value=-1) if texts else chosen)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.weekly] * (kind in ("folder", "labelled", "text"))) for kind in KINDS],
)
@pytest.mark.weekly
def test_the_file_gives_what_the_task_gives(kind: str) -> None:
    make, new = KINDS[kind]
    settings = make()
    assert run_here("fit", *settings, *SHORT).code == 0
    for form in ("torch", "onnx"):
        result = run_here(
            "export", *settings, *SHORT[:2], *CSV, "--ckpt_path", "last", "--format", form, "--path", f"m.{form}"
        )
        assert result.code == 0, result.err
        assert "the largest difference of an output is" in result.out
    trained = batchwise.load(next(Path("runs").glob("*/*/checkpoints/last.ckpt")))
    notes: dict[str, str] = {NOTES: ""}
    torch.export.load("m.torch", extra_files=notes)
    stored = {entry.key: entry.value for entry in onnx.load("m.onnx").metadata_props}[NOTES]
    assert stored == notes[NOTES]
    assert json.loads(stored)["class_names"] == trained.data.class_names
    assert json.loads(stored)["learnt"] == json.loads(json.dumps(trained.data.learnt))
    torch.manual_seed(0)
    inputs = new(trained)
    agrees(trained, by_torch("m.torch"), inputs)
    agrees(trained, by_onnx("m.onnx"), inputs)


FOREIGN = """
import sys, torch, onnxruntime, numpy
pixels, expected = torch.load("new.pt")
found = torch.export.load("model.pt2").module()(pixels)["probability"]
session = onnxruntime.InferenceSession("model.onnx")
again = session.run(["probability"], {"inputs": pixels.numpy()})[0]
assert not {"batchwise", "project", "lightning"} & {name.split(".")[0] for name in sys.modules}
print(float((found - expected).abs().max()), float(numpy.abs(again - expected.numpy()).max()))
"""


@pytest.mark.weekly  # the plain run has the commands of docs/lightning.md
def test_the_file_runs_without_this_project(trained: Result) -> None:
    loaded = batchwise.load(trained.folder / "checkpoints" / "best.ckpt")
    inputs, _ = loaded.data.load("test")  # type: ignore[misc]
    for name in ("model.pt2", "model.onnx"):
        assert loaded.export(name, inputs[:50]) < 1e-5
    torch.save((inputs[50:], loaded.predict(inputs[50:])["probability"]), "new.pt")
    found = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert all(float(difference) < 1e-5 for difference in found.stdout.split())


# What is nested, and what cannot be exported


class Pairs(small.Points):
    def load(self, split: str) -> Any:
        return {"a": self.x[:, :3].float(), "b": (self.x[:, 3:].float(), self.y.float())}, self.y


class Sums(small.Classify):
    def forward(self, inputs: Any) -> torch.Tensor:
        return super().forward(torch.cat([inputs["a"], inputs["b"][0]], 1) + inputs["b"][1][:, None])


def made(task: Any, data: Any) -> Trained:
    return Trained(task.eval(), data)


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_nested_inputs(name: str) -> None:
    data = Pairs()
    trained = made(Sums(small.network().float()), data)
    assert trained.export(name, data.load("test")[0]) < 1e-5
    if name == "m.onnx":
        session = onnxruntime.InferenceSession(name)
        assert [one.name for one in session.get_inputs()] == ["inputs_a", "inputs_b_0", "inputs_b_1"]


class Looks(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": self(batch.inputs) * (2 if batch.inputs.sum() > 0 else 1)}


class Generates(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        made = [self(batch.inputs).argmax(1)]
        while len(made) < 5 and int(made[-1].sum()):
            made.append((made[-1] - 1).clamp(min=0))
        return {"output": torch.stack(made, 1)}


class LeavesTensors(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": torch.from_numpy(self(batch.inputs).numpy())}


class Counts(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": self(batch.inputs) + torch.zeros(len(batch), 1)}


class Loops(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": torch.stack([self(one[None])[0] for one in batch.inputs])}


class Truths(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": self(batch.inputs) * float(batch.inputs.sum().item() > 0)}


class Remembers(small.Classify):
    seen = 0.0

    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        self.seen += 1
        return {"output": self(batch.inputs) + self.seen}


class Draws(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"output": torch.rand(batch.inputs.shape[0])}


class NeedsTargets(small.Classify):
    def predictions(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"hit": self(batch.inputs).argmax(1) == batch.targets.long()}


class InDouble(small.Classify):
    def __init__(self, network: Any) -> None:
        super().__init__(torch.nn.Sequential(torch.nn.Unflatten(1, (1, -1)), torch.nn.Conv1d(1, 1, 2)))
        self.double()


@pytest.mark.parametrize(
    ("task", "name", "inputs", "words"),
    [
        (Loops, "m.onnx", None, "Loops cannot be exported: it works only with the number .* a loop over examples"),
        (Truths, "m.pt2", None, r"Truths .* leaves the tensors at test_exporting.py:\d+, .*, such as torch.where$"),
        (Draws, "m.onnx", None, "nothing was written; the task itself gives another one each time: draw no random"),
        (
            Remembers,
            "m.pt2",
            None,
            "another 'output' than the task: nothing was written; the task itself gives another",
        ),
        (Looks, "m.pt2", None, "Looks cannot be exported: .*: write tensor code, such as torch.where$"),
        (Generates, "m.onnx", None, "Generates cannot be exported: .*: write tensor code, such as torch.where$"),
        (LeavesTensors, "m.pt2", None, "LeavesTensors cannot be exported: .*: write tensor code, such as torch.where$"),
        (Draws, "m.pt2", None, "the exported network gives another 'output' than the task: nothing was written"),
        (Counts, "m.pt2", None, r"Counts cannot be exported: .*: write tensor\.shape\[0\] in place of len\(tensor\)"),
        (NeedsTargets, "m.onnx", None, "NeedsTargets cannot be exported: AttributeError: 'NoneType' object .* 'long'"),
        (NeedsTargets, "m.pt2", None, r"'long' at test_exporting.py:\d+; .* batch\.targets is None in `transform` and"),
        (InDouble, "m.onnx", None, "the runtime has few layers in bfloat16 and float64: write the format torch"),
        (small.Classify, "m.bin", None, r"m\.bin ends in none of \.pt2, \.onnx: write one of them"),
        (
            small.Classify,
            "m.pt2",
            [torch.ones(5), torch.ones(5)],
            "inputs is a list with one value per example, .*collate",
        ),
    ],
)
def test_what_cannot_be_exported(task: Any, name: str, inputs: Any, words: str, capfd: pytest.CaptureFixture) -> None:
    Path(name).write_text("mine")
    data = small.Points()
    with pytest.raises(ValueError, match=words) as error:
        made(task(small.network()), data).export(name, data.x if inputs is None else inputs)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert Path(name).read_text() == "mine"
    assert os.listdir() == [name]


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is not installed: pip install -e '\.\[onnx\]'"):
        made(small.Classify(small.network()), small.Points()).export("m.onnx", small.Points().x)


def test_no_other_file_is_replaced(trained: Result) -> None:
    Path("m.pt2").write_text("mine")
    settings = ("export", *DIGITS, "--ckpt_path", trained.folder / "checkpoints" / "best.ckpt", "--path", "m.pt2")
    result = run_here(*settings)
    assert result.code == 2
    assert "m.pt2 exists: write another, or --force true to replace it" in result.err
    assert Path("m.pt2").read_text() == "mine"
