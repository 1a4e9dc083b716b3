"""A metric whose value depends on how its examples are cut is named before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CSV, TWO, run_here, run_process
from small import Points, adamw, fit
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, RunningMean
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import MeanSquaredError, NormalizedRootMeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import BLEUScore, EditDistance, WordErrorRate
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, MultioutputWrapper, Running

from batchwise import DataModule, MicroBatch, Task
from batchwise.tasks.cut_metrics import depends_on
from batchwise.tasks.exchange import lists_whole


class Mean(Metric):
    """The mean of values.

    Args:
        reduce: what merges the states of devices.
        each: each update counts as one value.
    """

    def __init__(self, reduce: Any = "sum", each: bool = False) -> None:
        super().__init__()
        self.each = each
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx=reduce)
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx=reduce)

    def update(self, values: Tensor) -> None:
        self.total = self.total + (values.mean() if self.each else values.sum())
        self.count = self.count + (1 if self.each else len(values))

    def compute(self) -> Tensor:
        return self.total / self.count  # type: ignore[operator]


class Number(Mean):
    """Gives a number of Python."""

    def compute(self) -> Any:
        return float(super().compute())


class WithData(Mean):
    """A mean of means, which is not looked at because it takes long to copy."""

    def __init__(self, held: Any) -> None:
        super().__init__(each=True)
        self.held = held


class Plain(Mean):
    """The same with attributes, which devices do not exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        self.all.append(values)

    def compute(self) -> Tensor:
        return torch.cat(self.all).mean()

    def reset(self) -> None:
        self.all = []


class Apart(Metric):
    """The middle one of all values, each of which is an element of a list."""

    def __init__(self, reduce: Any = None) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx=reduce)

    def update(self, values: Tensor, *_: Tensor) -> None:
        self.values.extend(values.detach().unbind())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        values: Any = self.values
        return torch.stack(list(values)).median()


class Sums(Metric):
    """The largest sum of an update: a list of single numbers to be concatenated. It depends on the micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", [], dist_reduce_fx="cat")

    def update(self, values: Tensor, *_: Tensor) -> None:
        self.sums.append(values.detach().sum())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        sums: Any = self.sums
        return sum(sums) if isinstance(sums, list) else sums.sum()  # type: ignore[return-value]


class Halved(Apart):
    """A list whose reduction is wrong: it keeps the half."""

    def __init__(self) -> None:
        super().__init__(lambda values: values[: len(values) // 2])


generator = torch.Generator().manual_seed(0)
VALUES, OTHERS = torch.randn(6, generator=generator), torch.rand(6, generator=generator)
LOGITS, ROWS, CLASSES = torch.randn(6, 3, generator=generator), torch.rand(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
TEXTS = ["a b c", "d e", "f g", "a", "b c", "q r s"]
OTHER_TEXTS = ["a b d", "d e", "f h", "a b", "c c", "q r s"]

SOUND: dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]] = {
    "sums": (Mean, (VALUES,)),
    "a number of Python": (Number, (VALUES,)),
    "concatenated": (CatMetric, (VALUES,)),
    "a list": (Apart, (VALUES,)),
    "accuracy": (lambda: MulticlassAccuracy(3), (LOGITS, CLASSES)),
    "auroc": (lambda: MulticlassAUROC(3), (LOGITS.softmax(1), CLASSES)),
    "r2": (R2Score, (VALUES, OTHERS)),
    "states that compute merges": (PearsonCorrCoef, (VALUES, OTHERS)),
    "the same": (NormalizedRootMeanSquaredError, (VALUES, OTHERS)),
    "retrieval": (RetrievalMAP, (OTHERS, CLASSES.bool(), torch.tensor([0, 0, 0, 1, 1, 1]))),
    "by class": (lambda: ClasswiseWrapper(MulticlassAccuracy(3, average=None)), (LOGITS, CLASSES)),
    "by output": (lambda: MultioutputWrapper(MeanSquaredError(), 3), (LOGITS, ROWS)),
    "composed": (lambda: MulticlassAccuracy(3) + MulticlassAUROC(3), (LOGITS.softmax(1), CLASSES)),
    "smallest and largest": (lambda: MinMaxMetric(MulticlassAccuracy(3)), (LOGITS, CLASSES)),
    "words": (WordErrorRate, (TEXTS, OTHER_TEXTS)),
    "edits": (EditDistance, (TEXTS, OTHER_TEXTS)),
    "several references": (BLEUScore, (TEXTS, [[text] for text in OTHER_TEXTS])),
    "with a network": (lambda: WithData(nn.Linear(2, 2)), (VALUES,)),
    "with reference data": (lambda: WithData(torch.zeros(2**19)), (VALUES,)),
    "with a list of them": (lambda: WithData([0] * 20_000), (VALUES,)),
    "one number": (MeanMetric, (VALUES.mean(),)),
    "no data for it": (lambda: MeanSquaredError(num_outputs=2), (VALUES, OTHERS)),
}
UNSOUND: dict[str, tuple[Callable[[], Metric], tuple[Any, ...], str]] = {
    "no reduction": (lambda: Mean(None), (VALUES,), "devices"),
    "the mean of sums is the mean": (lambda: Mean("mean"), (VALUES,), ""),
    "the largest sum": (lambda: Mean("max"), (VALUES,), "devices"),
    "attributes": (Plain, (VALUES,), "devices"),
    "half a list": (Halved, (VALUES,), "devices"),
    "a mean of means": (lambda: Mean(each=True), (VALUES,), "micro-batches"),
    "a mean of means, as a number of Python": (lambda: Number(each=True), (VALUES,), "micro-batches"),
    "a mean of means, composed": (lambda: Mean(each=True) * 2, (VALUES,), "micro-batches"),
    "the last updates": (lambda: RunningMean(window=100), (VALUES,), "micro-batches"),
    "those of a metric": (lambda: Running(MeanSquaredError(), 9), (VALUES, OTHERS), "micro-batches"),
    "logits of which some look like probabilities": (lambda: MulticlassAUROC(3), (LOGITS, CLASSES), "micro-batches"),
    "at random": (lambda: BootStrapper(MeanSquaredError()), (VALUES, OTHERS), "micro-batches"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SOUND)
def test_sound_metrics_depend_on_their_examples_alone(case: str) -> None:
    make, values = SOUND[case]
    metric = make()
    before = [part._update_count for part in metric.modules() if isinstance(part, Metric)]
    assert depends_on(metric, values) is None
    assert [part._update_count for part in metric.modules() if isinstance(part, Metric)] == before


@pytest.mark.parametrize("case", UNSOUND)
def test_what_other_metrics_depend_on(case: str) -> None:
    make, values, cause = UNSOUND[case]
    assert depends_on(make(), values) == (cause or None)


class Groups(DataModule):
    """Eleven examples of three groups."""

    def __init__(self) -> None:
        super().__init__(batch_size=5, eval_batch_size=1)

    def load(self, split: str) -> Any:
        x = Points().x[:11]
        return x, torch.stack([x[:, 0] > 0, torch.arange(11) % 3], 1).long()


class Ranking(Task):
    """With metrics whose states are lists."""

    def losses(self, batch: MicroBatch) -> Tensor:
        scores = self(batch.inputs).squeeze(1)
        relevant, group = batch.targets.unbind(1)
        self.measure(scores.sigmoid(), relevant, group)
        return nn.functional.binary_cross_entropy_with_logits(scores, relevant.to(scores), reduction="none")

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"map": RetrievalMAP(), "apart": Apart(), "sums": Sums()})


class Unmerged(Ranking):
    """With a metric whose states are not merged."""

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        class First(Mean):
            def update(self, values: Tensor, *_: Tensor) -> None:
                super().update(values)

        return MetricCollection({"first": First(None)})


class Own(Mean):
    """Exchanges its sums itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sync_on_compute = False

    def update(self, values: Tensor, *_: Tensor) -> None:
        super().update(values.double())

    def compute(self) -> Tensor:
        both = torch.stack([self.total, self.count])  # type: ignore[list-item]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        return both[0] / both[1]


class Exchanging(Ranking):
    """With a metric that exchanges its sums itself."""

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"own": Own()})


class Line(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 1))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, str]]:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{here.parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(task: str) -> tuple[str, str]:
        Path("own.yaml").write_text(
            f"""
name: own
seed_everything: 0
trainer: {{max_epochs: 2, precision: 64-true, accelerator: cpu}}
data: {{class_path: test_cut_metrics.Groups}}
model:
  class_path: test_cut_metrics.{task}
  init_args:
    network: test_cut_metrics.Line
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.05}}}}
"""
        )
        return ("--config", "own.yaml")

    return write


@pytest.mark.weekly
def test_devices_may_hold_unequal_numbers_of_elements(config: Callable[[str], tuple[str, str]]) -> None:
    one = run_here("fit", *config("Ranking"), *CSV, "--name", "one")
    assert one.code == 0, one.err
    several = run_process("fit", *config("Ranking"), *CSV, *TWO, "--name", "several")
    assert several.code == 0, several.err
    for column in ("train/map", "train/apart", "train/sums", "val/map", "val/apart", "val/sums"):
        mine, theirs = several.rows(column), one.rows(column)
        assert len(theirs) >= 2
        assert mine == pytest.approx(theirs, abs=1e-12), column


@pytest.mark.slow
def test_a_metric_that_is_wrong_over_several_devices_is_refused(config: Callable[[str], tuple[str, str]]) -> None:
    assert run_here("fit", *config("Unmerged"), *CSV, "--name", "one").code == 0
    several = run_process("fit", *config("Unmerged"), *CSV, *TWO, "--name", "several")
    assert several.code == 2
    assert "the metric 'first' gives another value when its examples are on several devices: give each" in several.err
    assert "Traceback" not in several.err


@pytest.mark.weekly
def test_a_metric_that_exchanges_its_states_itself_is_left_alone(config: Callable[[str], tuple[str, str]]) -> None:
    one = run_here("fit", *config("Exchanging"), *CSV, "--name", "one")
    several = run_process("fit", *config("Exchanging"), *CSV, *TWO, "--name", "several")
    assert (one.code, several.code) == (0, 0), several.err
    assert several.rows("val/own") == pytest.approx(one.rows("val/own"), abs=1e-6)


def test_a_metric_that_depends_on_the_updates_is_named() -> None:
    class Means(Task):
        def losses(self, batch: MicroBatch) -> Tensor:
            losses = self(batch.inputs).square().sum(1)
            self.measure(losses)
            return losses

        def make_metrics(self, outputs: Tensor) -> Metric:
            return Mean(each=True)

    with pytest.warns(UserWarning, match="the metric 'Mean' gives another value when its examples come in several"):
        fit(Means(nn.Linear(5, 3).double(), optimizer=adamw), max_epochs=1)


def test_metrics_are_left_as_they_were() -> None:
    metrics = MetricCollection({"map": RetrievalMAP(), "auroc": MulticlassAUROC(3)})
    before = [dict(vars(part)) for part in metrics.modules()]
    with lists_whole(metrics):
        pass
    assert [vars(part).keys() for part in metrics.modules()] == [one.keys() for one in before]
