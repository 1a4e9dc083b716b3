"""Weights of classes."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CSV, DIGITS, TWO, run_here
from small import Points, adamw, fit, furthest, network, trainer
from torch import nn

from batchwise.batching.fetch import DataError
from batchwise.batching.gradients import weighted_sum
from batchwise.batching.loader import MicroBatch
from batchwise.batching.sampling import Balanced
from batchwise.data.mixing import MixUp
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.tasks.regression import Regression


def prepared(weights: Any, **data: Any) -> Classification:
    torch.manual_seed(0)
    module = Digits(batch_size=64, **data)
    module.setup("fit")
    task = Classification(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), class_weights=weights)
    task.check(module, torch.zeros(2, 10))
    return task


@pytest.mark.parametrize(("task", "needed"), [(Classification, "logits [N, classes]"), (Regression, "numbers [N, K]")])
def test_outputs_of_another_kind_are_refused(task: Any, needed: str) -> None:
    """A model of Hugging Face gives a tuple if its configuration says `return_dict: false`."""
    for outputs, given in (((torch.zeros(2, 3),), "a tuple"), (torch.zeros(2, 3, 4), "the shape [2, 3, 4]")):
        with pytest.raises(ValueError, match=re.escape(f"model.network gives {given}: {needed} are needed")):
            task(nn.Linear(3, 3)).check(Digits(batch_size=4), outputs)


@pytest.mark.parametrize(("verb", "bad"), [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test")])
def test_a_label_that_is_no_class_and_is_read_late_is_named_in_each_command(verb: str, bad: str) -> None:
    """The metrics would fail first in an evaluation, and name no label."""

    class Late(Points):
        def load(self, split: str) -> Any:
            labels = self.y.clone()
            labels[60] = 7 if split == bad else labels[60]
            return list(zip(self.x, labels, strict=True))

    task = Classification(network(), optimizer=adamw)
    with pytest.raises(IndexError, match=r"^Target 7 is out of bounds"):
        getattr(trainer(max_epochs=1), verb)(task, datamodule=Late())


@pytest.mark.parametrize(("verb", "bad"), [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test")])
def test_a_label_that_is_a_fraction_and_is_read_late_is_named(verb: str, bad: str) -> None:
    class Late(Points):
        def load(self, split: str) -> Any:
            labels: list = self.y.tolist()
            labels[60] = 1.5 if split == bad else labels[60]
            return list(zip(self.x, labels, strict=True))

    with pytest.raises(DataError, match=r"^label 1.5 at example 60 is no class: write whole numbers"):
        getattr(trainer(max_epochs=1), verb)(Classification(network(), optimizer=adamw), datamodule=Late())


def test_a_label_that_is_a_float_is_named_before_training() -> None:
    class Early(Points):
        def load(self, split: str) -> Any:
            return list(zip(self.x, [1.0, *self.y.tolist()[1:]], strict=True))

    with pytest.raises(ValueError, match=r"on a few examples: a label of examples 0, 1, 2, \.\.\. is a float: write"):
        trainer(max_epochs=1).fit(Classification(network(), optimizer=adamw), datamodule=Early())


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0], "balanced"])
@pytest.mark.parametrize(
    "kind",
    [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32, torch.bool],
)
def test_labels_may_be_any_whole_numbers(kind: torch.dtype, weights: Any) -> None:
    """PyTorch takes 64 bits alone, and bytes for a mask."""

    class Labelled(Points):
        def __init__(self, kind: torch.dtype) -> None:
            super().__init__(augment=[MixUp(3)] if weights is None else [], order=Balanced())
            self.y = self.y.clamp(max=1).to(kind)

    ours, theirs = (
        fit(Classification(network(), optimizer=adamw, class_weights=weights), Labelled(one), max_epochs=1)[0]
        for one in (kind, torch.int64)
    )
    assert furthest(ours, theirs) == 0


def test_the_mean_is_by_weight_as_in_torch() -> None:
    weights = [0.5, 1.0, 2.0, 0.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.25]
    task = prepared(weights).double()
    inputs, targets = torch.randn(40, 1, 8, 8, dtype=torch.float64), torch.arange(40) % 10
    losses, count = 0.0, 0.0
    for part in MicroBatch(inputs, targets, torch.arange(40)).split(7):
        loss, number = weighted_sum(*(lambda found: (found[0], None, found[1]))(task.losses(part)))
        losses, count = losses + loss, count + number
    expected = F.cross_entropy(task(inputs), targets, weight=torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(losses / count, expected, rtol=0, atol=1e-14)


def test_balanced_gives_each_class_the_same_weight_in_all() -> None:
    task = prepared("balanced", order=None)
    counts = torch.bincount(Digits(batch_size=1).load("train")[1])  # type: ignore[index]
    assert len(counts.unique()) > 1
    torch.testing.assert_close(task.weights * counts, torch.full((10,), 125.9))


@pytest.mark.parametrize("weights", [[0.1, 0.7, 1.3], "balanced"])
@pytest.mark.parametrize(
    ("precision", "kind"),
    [("64-true", torch.float64), ("32-true", torch.float32), ("bf16-mixed", torch.float32)],
)
def test_weights_have_the_precision_of_the_losses(weights: Any, precision: Any, kind: torch.dtype) -> None:
    data, model = Points(), network().to(kind)
    task, _ = fit(Classification(model, optimizer=adamw, class_weights=weights), data, max_steps=1, precision=precision)
    balanced = [64 / (3 * count) for count in torch.bincount(data.y).tolist()]
    expected = balanced if weights == "balanced" else weights
    assert torch.equal(task.weights, torch.tensor(expected, dtype=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixture_of_one_class_alone_is_that_class(smoothing: float) -> None:
    """Also one whose weight is zero."""
    task = prepared([0.0, 0.5, *[1.0] * 7, 3.0])
    task.label_smoothing = smoothing
    logits, targets = torch.randn(20, 10), torch.arange(20) % 10
    for found, expected in zip(
        task._cross_entropy(logits, F.one_hot(targets, 10).float()), task._cross_entropy(logits, targets), strict=True
    ):
        torch.testing.assert_close(found[targets > 0], expected[targets > 0])
        assert found.isfinite().all()


@pytest.mark.slow
def test_an_evaluation_has_the_weights_of_the_checkpoint() -> None:
    """It does not read the training examples."""
    arguments = (*DIGITS, *CSV, "--model.network.hidden_features", "[]", "--model.class_weights", "balanced")
    fit = run_here("fit", *arguments, "--trainer.max_epochs", 1)
    assert fit.checkpoint()["state_dict"]["weights"].unique().numel() > 1
    measured = run_here("validate", *arguments, "--ckpt_path", "last")
    assert f"val/loss {fit.rows('val/loss')[20]:.4f}" in measured.out


@pytest.mark.slow
def test_wrong_weights_are_one_line() -> None:
    for weights, words in (
        ("[1, 2]", "model.class_weights has 2 numbers: write 10, one for each class"),
        ("[0, -1]", "model.class_weights is [0.0, -1.0]: write a number of at least 0 for each class"),
        ("[0, 0, 0]", "is [0.0, 0.0, 0.0]: write a number of at least 0 for each class, finite and not all of them 0"),
        ("[1, .inf, 1]", "is [1.0, inf, 1.0]: write a number of at least 0 for each class, finite and not all of them"),
        ("[1, .nan, 1]", "is [1.0, nan, 1.0]: write a number of at least 0 for each class, finite and not all of them"),
    ):
        result = run_here("fit", *DIGITS, *CSV, "--model.class_weights", weights)
        assert result.code == 2
        assert re.search(re.escape(words), result.err), result.err


def test_synchronised_batch_norm_needs_gpus() -> None:
    two = (*TWO, "--model.network.norm", "batch")
    result = run_here("fit", *DIGITS, *CSV, *two, "--trainer.sync_batchnorm", "true")
    assert result.code == 2
    assert "PyTorch synchronises batch norm on GPUs alone: leave it out, and write model.ghost_batch_size" in result.err
