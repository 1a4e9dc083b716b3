"""`batchwise.load`: a checkpoint predicts in Python what the command `predict` writes."""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CSV, DIGITS, Result, run_here
from PIL import Image

import batchwise

NETWORK = "batchwise.models.mlp.MLP"
CLASSIFY = ("--model", "batchwise.tasks.classification.Classification", "--model.network", NETWORK)


def written(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def agrees(found: dict[str, torch.Tensor], rows: list[dict[str, str]]) -> None:
    assert [int(row["predicted"]) for row in rows] == found["predicted"].tolist()
    columns = [name for name in rows[0] if name.startswith("probability")]
    right = torch.tensor([[float(row[name]) for name in columns] for row in rows])
    torch.testing.assert_close(found["probability"], right, rtol=0, atol=1e-6)


def test_digits(trained: Result) -> None:
    path = trained.folder / "checkpoints" / "best.ckpt"
    assert run_here("predict", *DIGITS, "--ckpt_path", path, "--predictions", "./predictions.csv").code == 0
    loaded = batchwise.load(path)
    inputs, _ = loaded.data.load("test")  # type: ignore[misc]
    agrees(loaded.predict(inputs), written("predictions.csv"))
    agrees(loaded.predict(np.asarray(inputs), batch_size=7), written("predictions.csv"))
    assert not loaded.task.training
    assert not any(parameter.is_inference() for parameter in loaded.task.parameters())


@pytest.mark.slow
def test_images_whose_training_set_is_gone() -> None:
    for label, level in (("cat", 60), ("dog", 200)):
        Path("photos", label).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((4, 4, 3), level + number, np.uint8)).save(f"photos/{label}/{number}.png")
    shutil.copytree("photos/cat", "new")
    folder = (
        *("--data", "batchwise.sources.folder.Folder", "--data.path", "photos", "--data.size", 4),
        *("--data.batch_size", 8, *CLASSIFY, "--model.network.in_features", 48, "--model.network.num_classes", 2),
        *("--trainer.accelerator", "cpu", "--name", "pets"),
    )
    assert run_here("fit", *folder, *CSV, "--trainer.max_epochs", 2).code == 0
    shutil.rmtree("photos")
    result = run_here(
        "predict", *folder, "--ckpt_path", "last", "--data.predict_path", "new", "--predictions", "./predictions.csv"
    )
    assert result.code == 0, result.err
    (path,) = Path("runs/pets").glob("*/checkpoints/last.ckpt")
    loaded = batchwise.load(str(path))
    pixels = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in sorted(Path("new").glob("*.png"))])
    agrees(loaded.predict(pixels), written("predictions.csv"))
    assert loaded.data.class_names == ["cat", "dog"]


@pytest.mark.slow
def test_double_precision_and_what_is_left_out() -> None:
    run = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.precision", "64-true", "--name", "first")
    first = run.folder / "checkpoints" / "last.ckpt"
    thin = run_here(
        *("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--model.init_from", first, "--model.freeze", "[layers.1]"),
        *("--model.save_frozen", "false", "--name", "thin"),
    )
    assert thin.code == 0, thin.err
    whole, part = batchwise.load(first), batchwise.load(thin.folder / "checkpoints" / "last.ckpt")
    assert {one.dtype for one in whole.task.parameters()} == {torch.float64}
    inputs, _ = part.data.load("test")  # type: ignore[misc]
    assert part.predict(inputs[:3])["probability"].shape == (3, 10)
    weights = dict(part.task.named_parameters())
    frozen = [name for name, one in weights.items() if not one.requires_grad]
    assert frozen
    for name in frozen:
        assert torch.equal(weights[name].double(), dict(whole.task.named_parameters())[name].float().double())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "evil.ckpt does not exist: write a checkpoint"),
        (lambda: Path("evil.ckpt").write_bytes(b"PK"), "evil.ckpt cannot be read"),
        (lambda: torch.save({"a": 1}, "evil.ckpt"), "evil.ckpt cannot be read"),
    ],
)
def test_what_cannot_be_loaded(make: Any, words: str) -> None:
    make()
    with pytest.raises(ValueError, match=words) as error:
        batchwise.load("evil.ckpt")
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_here(trained: Result) -> None:
    checkpoint = trained.checkpoint("best")
    checkpoint["config"]["model"]["class_path"] = "elsewhere.Mine"
    torch.save(checkpoint, "moved.ckpt")
    with pytest.raises(ValueError, match=r"the model of moved\.ckpt cannot be made here: .*elsewhere") as error:
        batchwise.load("moved.ckpt")
    assert "\n" not in str(error.value)


def test_a_file_of_a_network_that_fails_is_an_error_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It ended the notebook, or the service, with exit code 2."""
    mine = Path("breaks.py")
    mine.write_text("from batchwise.models.mlp import MLP as Net\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    network = ("--model.network", "breaks.Net", "--model.network.in_features", 64, "--model.network.num_classes", 10)
    trained = run_here("fit", *DIGITS, *CSV, *network, "--trainer.max_steps", 1)
    assert trained.code == 0, trained.err
    mine.write_text("1 / 0\n")
    monkeypatch.delitem(sys.modules, "breaks")
    path = trained.folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"cannot be made here: model\.network: ZeroDivisionError: .* at breaks\.py:1"):
        batchwise.load(path)
    assert capsys.readouterr().err == ""
