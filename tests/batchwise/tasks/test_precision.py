"""Training in the precision of the trainer."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from batchwise.batching.loader import MicroBatch
from batchwise.data.module import DataModule
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer


class Points(DataModule):
    """Floats that no `transform` touches."""

    seen: torch.dtype

    def load(self, split: str):
        return torch.randn(12, 3), torch.arange(12) % 2

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        self.seen = batch.inputs.dtype
        return batch


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_floats_come_in_the_precision_of_the_trainer(precision, dtype, tmp_path) -> None:
    data = Points(batch_size=4)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classification(nn.Linear(3, 2)), datamodule=data)
    assert data.seen == dtype
    assert trainer.global_step == 3


# The exact gradient, in each precision's tolerance


def trained(way: str, steps: int = 1, **settings) -> tuple[dict[str, torch.Tensor], Trainer]:
    """Weights after some steps of SGD on the digits; after one step at rate 1 they tell the gradient."""
    settings = {"gradient_clip_val": None, "micro_batch_size": None, "lr": 1.0, "fused": None} | settings
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=settings["lr"], fused=settings["fused"])
    task = Classification(MLP(64, 10, [32]), optimizer=sgd)
    fp16 = [MixedPrecision("16-mixed", device="cpu")] if way == "16-mixed" else None
    trainer = Trainer(
        accelerator="cpu",
        precision=None if fp16 else way.removesuffix(" compiled"),
        plugins=fp16,
        compile=way.endswith("compiled"),
        max_steps=steps,
        gradient_clip_val=settings["gradient_clip_val"],
        logger=CSVLogger("."),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    # With this seed no value is so near zero that rounding takes it to the other side of a ReLU.
    trainer.fit(task, datamodule=Digits(batch_size=100, micro_batch_size=settings["micro_batch_size"], seed=2))
    return {name: weight.double() for name, weight in task.network.state_dict().items()}, trainer


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, against the largest change that SGD made to the same tensor."""
    torch.manual_seed(0)
    start = MLP(64, 10, [32]).state_dict()
    return max(
        float((ours[name] - theirs[name]).abs().max() / (theirs[name] - start[name]).abs().max()) for name in start
    )


@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        ("32-true", 1e-5),
        pytest.param("32-true compiled", 1e-5, marks=pytest.mark.weekly),
        ("bf16-mixed", 0.1),
        ("bf16-true", 0.2),
        ("16-mixed", 3e-3),
    ],
)
def test_micro_batches_give_the_gradient_of_the_batch_up_to_rounding(way: str, tolerance: float) -> None:
    exact = trained("64-true")[0]
    cut = trained(way, micro_batch_size=25 if "compiled" in way else 15)[0]  # to compile for one size is enough
    assert 0 < furthest(cut, exact) < tolerance
    if "compiled" not in way:
        assert 0 < furthest(trained(way)[0], exact) < tolerance
    if way == "16-mixed":
        assert furthest(cut, exact) < 0.5 * furthest(trained("bf16-mixed")[0], exact)  # it was fp16, and not bf16


@pytest.mark.parametrize("fused", [None, True])
def test_the_scaler_is_taken_out_before_clipping_and_the_log(fused: bool | None) -> None:
    """The scale is 65,536: clipped before, or left in, it would show."""
    exact, reference = trained("64-true", steps=3, gradient_clip_val=0.5)
    scaled, trainer = trained("16-mixed", steps=3, gradient_clip_val=0.5, micro_batch_size=40, fused=fused)
    assert trainer.precision_plugin.scaler.get_scale() == 65536
    assert furthest(scaled, exact) < 3e-3
    ours, theirs = (
        [float(row["gradient_norm"]) for row in csv.DictReader(file.open()) if row["gradient_norm"]]
        for file in (Path(run.logger.log_dir) / "metrics.csv" for run in (trainer, reference))
    )
    assert min(theirs) > 0.5  # so that it was clipped
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=3e-3)


def test_matmul_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for value in ("medium", "high", "highest"):
            Trainer(accelerator="cpu", matmul_precision=value, logger=False)
            assert torch.get_float32_matmul_precision() == value
        Trainer(accelerator="cpu", logger=False)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_training_is_as_good_as_in_float32() -> None:
    def accuracy(way: str) -> float:
        return trained(way, steps=78, lr=0.1)[1].callback_metrics["val/accuracy"].item()  # six epochs

    single = accuracy("32-true")
    assert single > 0.85
    for way in ("bf16-mixed", "16-mixed", "bf16-true"):
        assert accuracy(way) > single - 0.02, way


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true"])
def test_metrics_sum_in_double_precision(precision) -> None:
    class Averages(Classification):
        def losses(self, batch: MicroBatch) -> torch.Tensor:
            losses = F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")
            self.measure(losses)
            return losses

        def make_metrics(self, outputs: torch.Tensor) -> MetricCollection:
            return MetricCollection({"mean": MeanMetric()})

    task = Averages(nn.Linear(3, 2))
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(task, datamodule=Points(batch_size=4))
    for metrics in (task._measures.metrics, task._measures.step_metrics):
        assert metrics is not None
        assert metrics["mean"].mean_value.dtype == metrics["mean"].dtype == torch.float64


def test_a_number_that_an_embedding_does_not_know_is_one_line() -> None:
    class Unknown(Points):
        def load(self, split: str):
            return torch.full((12, 3), -1), torch.arange(12) % 2

    task = Classification(nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 2)))
    data = Unknown(batch_size=4)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"model\.network Sequential cannot take the data.*: an embedding got"):
        task.prepare(data, "train")
