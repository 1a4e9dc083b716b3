"""Numbers to predict: metrics and predictions in the units of the targets, on any number of devices."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Result, run_here, run_process
from torch import nn

from batchwise.data.module import DataModule
from batchwise.tasks.multilabel import MultiLabel
from batchwise.tasks.regression import Regression

MODULE = """
import torch
from batchwise.data.module import DataModule


class Lines(DataModule):
    "Two targets of very different sizes, which are linear functions of the inputs."

    def load(self, split):
        x = torch.randn(60, 3, generator=torch.Generator().manual_seed(len(split)), dtype=torch.float64)
        y = torch.stack([1e6 + 1e4 * x[:, 0], 0.01 * (x[:, 1] - x[:, 2])], 1)
        return x.to(torch.get_default_dtype()), y.to(torch.get_default_dtype())
"""


class Given(DataModule):
    """Tensors as they are given."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__(batch_size=4)
        self.tensors = inputs, targets

    def load(self, split: str) -> Any:
        return self.tensors


def prepared(task: Any, targets: torch.Tensor, outputs: int) -> tuple[Any, DataModule]:
    data = Given(torch.randn(len(targets), 3), targets)
    model = task(nn.Linear(3, outputs))
    data.split("train")
    model.prepare(data, "train")
    return model, data


def evaluated(model: Any, data: DataModule) -> dict[str, float]:
    model.eval()
    model.losses(data.examples("train", 100))
    return {name: float(value) for name, value in model._measures.metrics.compute().items()}


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 2)])
def test_metrics_are_in_the_units_of_the_targets(shape: tuple[int, ...]) -> None:
    targets = 2000 + 300 * torch.randn(shape)
    model, data = prepared(Regression, targets, shape[1] if len(shape) > 1 else 1)
    with torch.no_grad():
        batch = data.examples("train", 100)
        predicted = model.predictions(batch)["predicted"].reshape(50, -1).double()
        loss = model.losses(batch)
    wide = targets.reshape(50, -1).double()
    error = predicted - wide
    explained = 1 - error.square().sum(0) / (wide - wide.mean(0)).square().sum(0)
    found = evaluated(model, data)
    assert found["mse"] == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert found["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
    assert found["r2"] == pytest.approx(explained.mean().item(), abs=1e-4)
    torch.testing.assert_close(loss.double(), (error / wide.std(0, correction=0)).square(), rtol=1e-3, atol=1e-5)


def test_always_the_mean_has_a_loss_of_one() -> None:
    model, data = prepared(Regression, 5 + torch.randn(30, 2) * torch.tensor([1.0, 100.0]), 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert model.losses(data.examples("train", 30)).mean(0).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert evaluated(model, data)["r2"] == pytest.approx(0, abs=1e-5)


def test_a_constant_target() -> None:
    model, data = prepared(Regression, torch.full((30,), 7.0), 1)
    assert model.losses(data.examples("train", 30)).isfinite().all()
    assert (model.target_mean.item(), model.target_std.item()) == (7, 1)


@pytest.mark.parametrize(
    ("task", "targets", "outputs", "words"),
    [
        (Regression, torch.tensor([1, torch.nan, torch.inf]), 1, "2 targets of the train split are not finite, .* 1:"),
        (Regression, torch.ones(4) * 1j, 1, "the targets of the train split are complex: write one tensor of real"),
        (Regression, torch.ones(4, 2), 3, "network has 3 outputs, but the train split has 2 targets per example"),
        (MultiLabel, torch.ones(4, 2), 3, r"train split are \[4, 2\], but model.network gives \[2, 3\]"),
        (MultiLabel, torch.tensor([[0.0, 1], [1, 2]]), 2, r"example 1 of the train split has the targets \[1.0, 2.0\]"),
    ],
)  # fmt: skip
def test_what_does_not_suit_is_said(task: Any, targets: torch.Tensor, outputs: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepared(task, targets, outputs)


def test_several_labels() -> None:
    targets = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    model, data = prepared(MultiLabel, targets, 3)
    logits = model(data.examples("train", 4).inputs).detach().double()
    losses = model.losses(data.examples("train", 4))
    sign = 2 * targets.double() - 1
    torch.testing.assert_close(losses.double(), (1 + (-sign * logits).exp()).log(), rtol=1e-5, atol=1e-6)
    predicted = (logits >= 0).long()
    hits, of = (predicted * targets).sum(0).double(), (predicted + targets).sum(0)
    found = evaluated(model, data)
    assert found["f1"] == pytest.approx((2 * hits / of).mean().item(), abs=1e-6)
    assert found["accuracy"] == pytest.approx((predicted == targets).double().mean().item(), abs=1e-6)
    assert torch.equal(model.predictions(data.examples("train", 4))["predicted"], predicted)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    Path("linear_lines.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    network = "{class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 2}}"
    return (
        *("--data", "linear_lines.Lines", "--data.batch_size", 16, "--trainer.logger", "false"),
        *(
            "--model",
            "batchwise.tasks.regression.Regression",
            "--model.network",
            network,
            "--trainer.accelerator",
            "cpu",
        ),
        *("--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", 0.1, "--trainer.precision", "64-true"),
    )


def predictions(result: Result, file: str) -> list[dict[str, float]]:
    assert result.code == 0, result.err
    with Path(file).open() as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


@pytest.mark.weekly
def test_it_learns_and_predicts_on_any_devices(lines: tuple[object, ...]) -> None:
    fitted = run_here("fit", *lines, "--trainer.max_epochs", 60)
    assert fitted.code == 0, fitted.err
    weights = fitted.checkpoint()["state_dict"]
    assert weights["target_mean"].tolist() == pytest.approx([1e6, 0], rel=0.02, abs=0.02)
    assert weights["target_std"][0].item() == pytest.approx(1e4, rel=0.3)
    one = predictions(run_here("predict", *lines, "--ckpt_path", "last", "--predictions", "./one.csv"), "one.csv")
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(len("test")), dtype=torch.float64)
    for number, row in enumerate(one):
        assert row["example"] == number
        assert row["predicted_0"] == pytest.approx(1e6 + 1e4 * x[number, 0].item(), abs=50)
        assert row["predicted_1"] == pytest.approx(0.01 * (x[number, 1] - x[number, 2]).item(), abs=5e-4)
    two = run_process(
        *("predict", *lines, "--ckpt_path", "last", "--predictions", "two/two.parquet", "--data.eval_batch_size", 7),
        *("--trainer.devices", 2, "--trainer.strategy", "ddp"),
        PYTHONPATH=str(Path.cwd()),
    )
    assert two.code == 0, two.err
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table("two/two.parquet").to_pylist() == [
        {name: int(value) if name == "example" else pytest.approx(value, rel=1e-6) for name, value in row.items()}
        for row in one
    ]
    assert [path.name for path in Path("two").iterdir()] == ["two.parquet"]


@pytest.mark.parametrize("task", [Regression, MultiLabel])
def test_nested_targets_are_one_line(task: type) -> None:
    data = Given(torch.randn(8, 3), {"y": torch.randn(8, 1)})  # type: ignore[arg-type]
    data.setup("fit")
    with pytest.raises(ValueError, match="the targets of the train split are a dict: write one tensor"):
        task(nn.Linear(3, 1)).prepare(data, "train")


@pytest.mark.parametrize(
    ("targets", "precision", "warned"),
    [
        (1_700_000_000 + torch.arange(50, dtype=torch.float64), torch.float32, True),
        (1_700_000_000 + torch.arange(50, dtype=torch.float64), torch.float64, False),
        (1950 + torch.arange(50, dtype=torch.float32), torch.bfloat16, True),
        (torch.linspace(-3, 3, 50), torch.bfloat16, False),
    ],
)
def test_targets_that_the_precision_rounds_are_warned_of(
    targets: torch.Tensor, precision: torch.dtype, warned: bool
) -> None:
    data, model = Given(torch.randn(50, 3), targets), Regression(nn.Linear(3, 1))
    data.split("train")
    with warnings.catch_warnings(record=True, action="always") as found:
        model.check(data, torch.zeros(4, 1, dtype=precision))
    assert len(found) == warned
    assert all("are rounded by " in str(one.message) for one in found)
