"""Metrics do not depend on the cut or on chance: against numbers computed by hand, in any micro-batches."""

import csv
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CSV, TWO, run_here, run_process
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import f1_score
from small import Memory, Points, adamw, fit, trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix, MulticlassROC
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, MinMaxMetric, MultitaskWrapper

import batchwise
from batchwise import DataModule, MicroBatch, Task
from batchwise.errors import Mistake
from batchwise.tasks import measures
from batchwise.tasks.classification import Classification
from batchwise.tasks.measures import computed, stand_in
from batchwise.tasks.multilabel import MultiLabel
from batchwise.tasks.regression import Regression

SIZES = [1, 3, 64]


class Given(DataModule):
    """Inputs and targets of an evaluation."""

    def __init__(self, inputs: Tensor, targets: Tensor, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 10} | kwargs)
        self.tensors = inputs, targets

    def load(self, split: str) -> Any:
        return self.tensors


class Scaled(nn.Module):
    """The inputs, times 1: no sum whose rounding could depend on the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


def evaluated(task: Task, data: DataModule, precision: Any = "32-true") -> dict[str, float]:
    (values,) = trainer(precision=precision).test(task, datamodule=data, verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in values.items()}


class Weighty(Task):
    """Targets are weights, and inputs are losses."""

    def losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self(batch.inputs), batch.targets


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_added_up_beyond_single_precision(size: int) -> None:
    """After 2**24 targets, a sum in single precision stays where it is."""
    weights = torch.ones(64)
    weights[0] = 2**24
    data = Given((weights == 1).float(), weights, eval_batch_size=size)
    assert evaluated(Weighty(Scaled()), data)["loss"] == pytest.approx(63 / (2**24 + 63), rel=1e-12)


class Ranks(Classification):
    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({f"top{k}": MulticlassAccuracy(3, top_k=k, average="micro") for k in (1, 2)})


@pytest.mark.parametrize("size", SIZES)
def test_metrics_that_agree_by_chance_are_not_joined(size: int) -> None:
    logits = torch.tensor([[3.0, 2, 1]] * 6)
    targets = torch.tensor([0, 0, 0, 1, 1, 2])  # in the first three examples, top-1 and top-2 agree
    found = evaluated(Ranks(Scaled()), Given(logits, targets, eval_batch_size=size))
    assert (found["top1"], found["top2"]) == pytest.approx((3 / 6, 5 / 6))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_logits_that_look_like_probabilities_are_none(size: int, precision: str) -> None:
    logits = torch.tensor([[0.25, -1], [0.125, 0.75], [-2, 0.5], [0.5, -0.25], [0, 3]])
    targets = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1], [0, 1]])
    data = Given(logits, targets, eval_batch_size=size)
    task = MultiLabel(Scaled())
    found = evaluated(task, data, precision)
    decided = (logits > 0).long()
    hits, of = (decided * targets).sum(0), (decided + targets).sum(0)
    assert found["f1"] == pytest.approx(float((2 * hits / of).mean()), abs=1e-6)
    assert found["accuracy"] == pytest.approx(float((decided == targets).float().mean()), abs=1e-6)
    predictions = trainer(precision=precision).predict(task, datamodule=data)
    assert predictions is not None
    assert torch.equal(torch.cat([one["predictions"]["predicted"] for one in predictions]), decided)


class Ranked(Classification):
    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"auroc": MulticlassAUROC(2)})


@pytest.mark.parametrize("size", SIZES)
def test_metrics_of_probabilities_get_probabilities(size: int) -> None:
    logits, targets = torch.tensor([[0.1, 0.9], [0.0, 5.0], [0.2, 0.5], [0.8, 0.1]]), torch.tensor([0, 1, 1, 0])
    found = evaluated(Ranked(Scaled()), Given(logits, targets, eval_batch_size=size))
    assert found["auroc"] == pytest.approx(0.75)  # example 0 comes before example 2, by 0.8 to 0.3


@pytest.mark.parametrize("size", SIZES)
def test_sums_do_not_depend_on_the_micro_batches(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 1e3 + torch.randn(64, 2, generator=generator)
    outputs = targets + torch.randn(64, 2, generator=generator)
    found = evaluated(Regression(Scaled()), Given(outputs, targets, eval_batch_size=size))
    error = outputs.double() - targets.double()
    spread = (targets.double() - targets.double().mean(0)).square().sum(0)
    assert found["mse"] == pytest.approx(float(error.square().mean()), rel=1e-12)
    assert found["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-12)
    assert found["r2"] == pytest.approx(float((1 - error.square().sum(0) / spread).mean()), abs=1e-7)


class Means(Task):
    def losses(self, batch: MicroBatch) -> Tensor:
        self.measure(self(batch.inputs).squeeze(1))
        return batch.inputs.square().sum(1)

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"mean": MeanMetric()})


@pytest.mark.parametrize("size", SIZES)
def test_a_number_per_example_is_summed_in_double_precision(size: int) -> None:
    values = 1e3 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    found = evaluated(Means(Scaled()), Given(values, torch.zeros(64), eval_batch_size=size))
    assert found["mean"] == pytest.approx(float(values.double().mean()), rel=1e-12)


class Updates(Metric):
    """The number of examples of each update."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def update(self, values: Tensor) -> None:
        self.sizes.append(len(values) if values.ndim else 0)

    def compute(self) -> Tensor:
        UPDATES.append(self.sizes)
        self.sizes = []
        return torch.zeros(())


UPDATES: list[list[int]] = []


@pytest.mark.parametrize(
    ("what", "most", "expected"),
    [("losses", 12, [10]), ("losses", 11, [7, 3]), ("mean", 12, [0] * 4), ("both", 12, [2, 0, 3, 0, 2, 0, 3, 0])],
)
def test_a_row_measures_the_whole_batch_at_once(
    what: str, most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Task):
        def losses(self, batch: MicroBatch) -> Tensor:
            losses = self(batch.inputs).square().sum(1)
            if what != "mean":
                self.measure(losses)
            if what != "losses":
                self.measure(losses.mean())
            return losses

        def make_metrics(self, outputs: Tensor) -> MetricCollection:
            return MetricCollection({"updates": Updates()})

    monkeypatch.setattr(measures, "MOST_HELD", most)
    UPDATES.clear()
    memory = Memory()
    data = Points(micro_batch_size=3)
    fit(Counted(nn.Linear(5, 3).double(), optimizer=adamw), data, max_steps=2, log_every_n_steps=1, logger=memory)
    assert expected in UPDATES, UPDATES


def test_what_needs_two_examples_is_left_out_where_there_is_one(tmp_path: Path) -> None:
    memory = Memory()

    class Few(Points):
        def load(self, split: str) -> Any:
            count = 21 if split == "train" else 1
            return self.x[:count], self.x[:count, :1] * 3

    best = ModelCheckpoint(dirpath=tmp_path, monitor="val/mse")
    task = Regression(nn.Sequential(nn.Linear(5, 1)).double(), optimizer=adamw)
    settings: dict[str, Any] = {"logger": memory, "log_every_n_steps": 1, "callbacks": [best]}
    _, made = fit(task, Few(), max_epochs=2, enable_checkpointing=True, **settings)
    assert sorted(memory.found("train/mse")) == [1, 2, 3, 4, 5, 6]
    assert sorted(memory.found("train/r2")) == [1, 2, 4, 5]  # step 3 of an epoch has one example
    assert memory.found("val/mse")
    assert not memory.found("val/r2")
    assert best.best_model_path
    (values,) = made.test(task, datamodule=Few(), verbose=False)
    assert set(values) == {"test/loss", "test/mse", "test/mae"}


def metrics() -> MetricCollection:
    """Of which some know the shape of their states only after an update, and some keep all values."""
    single: dict[str, Any] = {
        "r2": R2Score(),
        "mse": MeanSquaredError(num_outputs=2),
        "auroc": ClasswiseWrapper(MulticlassAUROC(2, average=None)),
        "pearson": PearsonCorrCoef(num_outputs=2),
    }
    return MetricCollection(single, compute_groups=False)


def test_states_of_a_device_without_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(9, 2, generator=generator), torch.randn(9, 2, generator=generator)
    real, other = metrics(), metrics()
    for one, apply in ((real, MetricCollection.update), (other, lambda c, *v: stand_in(c, v))):
        for name, metric in one.items():
            values = (outputs, targets.argmax(1)) if name == "auroc" else (outputs, targets)
            apply(MetricCollection({str(name): metric}, compute_groups=False), *values)  # type: ignore[dict-item]
    for name, metric in real.items():
        right = metric.compute()  # type: ignore[operator]
        for mine, theirs in zip(metric.modules(), other[name].modules(), strict=True):
            if not isinstance(mine, Metric) or not isinstance(theirs, Metric):
                continue
            for state, value in mine.metric_state.items():
                empty, how = theirs.metric_state[state], mine._reductions[state]
                if isinstance(value, list):
                    assert all(len(one) == 0 for one in empty)
                elif how is torch.sum or getattr(how, "__name__", "") == "dim_zero_sum":
                    assert empty.shape == value.shape
                    assert torch.equal(empty + value, value)
                else:
                    assert empty.shape == value.shape
                    assert empty.dtype == value.dtype
        again = metric.compute()  # type: ignore[operator]
        torch.testing.assert_close(again, right)


def test_a_stand_in_leaves_what_was_measured_alone() -> None:
    both = metrics()
    del both["auroc"]
    outputs, targets = torch.eye(2), torch.ones(2, 2)
    both.update(outputs, targets)
    before = {name: {k: v.clone() for k, v in metric.metric_state.items()} for name, metric in both.items()}  # type: ignore[union-attr,operator]
    stand_in(both, (outputs + 1, targets))
    for name, metric in both.items():
        for state, value in metric.metric_state.items():  # type: ignore[union-attr,operator]
            torch.testing.assert_close(value, before[str(name)][state])
    assert set(computed(both, 1)) >= {"r2", "mse"}


class Single(Points):
    """Two targets; batches of three examples, of which one is over at the end."""

    def __init__(self, batch_size: int = 3) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=2)

    def load(self, split: str) -> Any:
        return self.x[:10], self.x[:10, :2] * 2 + 1


class Sorted(Regression):
    """With a metric that keeps all values."""

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        more: Any = {"pearson": PearsonCorrCoef(num_outputs=2), "kept": Kept()}
        return MetricCollection([super().make_metrics(outputs), MetricCollection(more)])


class Kept(Metric):
    """The largest of all outputs, which are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs.append(outputs)  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        kept = self.outputs
        return (torch.cat(kept) if isinstance(kept, list) else kept).max()


class Line(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 2))


OWN = """
name: own
seed_everything: 0
trainer: {max_epochs: 2, precision: 64-true, accelerator: cpu}
data: {class_path: test_measures.Single}
model:
  class_path: test_measures.Sorted
  init_args:
    network: test_measures.Line
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.05}}
"""


@pytest.mark.parametrize("more", [TWO, pytest.param((*TWO[:3], 3, *TWO[4:]), marks=pytest.mark.weekly)])
@pytest.mark.slow
def test_rows_of_batches_smaller_than_the_devices(more: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{here.parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("own.yaml").write_text(OWN)
    one = run_here("fit", "--config", "own.yaml", *CSV, "--name", "one")
    assert one.code == 0, one.err
    several = run_process("fit", "--config", "own.yaml", *CSV, *more, "--name", "several")
    assert several.code == 0, several.err
    for column in ("train/mse", "train/mae", "train/r2", "train/kept", "val/mse", "val/r2", "val/kept"):
        mine, theirs = several.rows(column), one.rows(column)
        assert len(theirs) >= 2
        assert mine == pytest.approx(theirs, abs=1e-11), column


BY_HAND = {"class": Classification, "label": MultiLabel, "number": Regression}


class ByKind(DataModule):
    """41 examples, with targets of a kind."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.x, self.y = kind, Points().x, Points().y

    def load(self, split: str) -> Any:
        inputs = self.x[:41].to(torch.get_default_dtype())
        return inputs, self.targets()[:41]

    def targets(self) -> Tensor:
        labels = (self.x[:, :3] > 0.3).long()
        return {"class": self.y, "label": labels, "number": (1e3 + 50 * self.x[:, :3].square()).float()}[self.kind]


class Outputs(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))


def by_hand(kind: str, found: np.ndarray) -> dict[str, float]:
    """Return the metrics from the columns `predicted` [N] or [N, 3] of `predict`."""
    target = ByKind(kind).targets()[:41].numpy()
    if kind == "number":
        error, spread = found - target, ((target - target.mean(0, dtype=np.float64)) ** 2).sum(0)
        r2 = (1 - (error**2).sum(0) / spread).mean()
        return {"mse": float((error**2).mean()), "mae": float(abs(error).mean()), "r2": float(r2)}
    f1 = f1_score(target, found, average="macro")
    return {"accuracy": float((found == target).mean()), "f1": float(f1)}


@pytest.mark.weekly
@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_metrics_are_those_of_the_predictions(kind: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{here.parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("hand.yaml").write_text(
        f"""
name: hand
seed_everything: 0
trainer: {{max_epochs: 2, accelerator: cpu}}
data:
  class_path: test_measures.ByKind
  init_args: {{kind: {kind}, batch_size: 10, eval_batch_size: 1, micro_batch_size: 1}}
model:
  class_path: {BY_HAND[kind].__module__}.{BY_HAND[kind].__name__}
  init_args: {{network: test_measures.Outputs}}
"""
    )
    several = () if devices == 1 else (*TWO[:3], devices, *TWO[4:])
    run = run_here if devices == 1 else run_process
    for command in (("fit",), ("test", "--ckpt_path", "last"), ("predict", "--ckpt_path", "last")):
        result = run(*command, "--config", "hand.yaml", *CSV, *several)
        assert result.code == 0, result.err
        if command[0] == "test":
            shown = dict(re.findall(r"test/(\w+) (-?[\d.]+)", result.out))
    with next(Path("runs").rglob("predictions.csv")).open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("predicted")]
    found = np.array([[float(row[name]) for name in names] for row in rows]).squeeze()
    for name, value in by_hand(kind, found).items():
        assert float(shown[name]) == pytest.approx(value, rel=1e-6, abs=5.1e-5), name  # it is printed so


def with_metrics(make: Any, feed: Any = None) -> Task:
    """A task with these metrics, fed with logits and targets unless `feed` says how."""

    class Own(Task):
        def losses(self, batch: MicroBatch) -> Tensor:
            logits = self(batch.inputs)
            losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            self.measure(logits, batch.targets) if feed is None else feed(self, logits, losses, batch)
            return losses

        def make_metrics(self, outputs: Tensor) -> Any:
            return make()

    torch.manual_seed(1)
    return Own(nn.Linear(5, 3).double(), optimizer=adamw)


WRONG = {
    "named loss": (lambda: MetricCollection({"loss": MulticlassAccuracy(3)}), None, "a metric 'loss', which is the na"),
    "classes": (
        lambda: MulticlassAccuracy(7),
        None,
        r"cannot take what self\.measure gives \(the shape \[6, 3\], the sh",
    ),
    "arguments": (lambda: MeanMetric(), lambda task, *_: task.measure(), r"cannot take what self\.measure gives \(\)"),
    "a mean of means": (
        lambda: MetricCollection({"ce": MeanMetric()}),
        lambda task, logits, losses, batch: task.measure(losses.mean()),
        "gives one number, and the metric 'ce' would count each micro-batch alike",
    ),
    "a dict": (
        lambda: MulticlassAccuracy(3),
        lambda task, logits, losses, batch: task.measure({"kind": logits}, {"kind": batch.targets}),
        r"cannot take what self\.measure gives \(a dict, a dict\)",
    ),
    "a wrapper gives loss": (
        lambda: MultitaskWrapper({"loss": MulticlassAccuracy(3)}),
        lambda task, logits, losses, batch: task.measure({"loss": logits}, {"loss": batch.targets}),
        "a metric 'loss', which is the name of the mean loss",
    ),
    "no metrics": (lambda: 3, None, "make_metrics gave a int: return torchmetrics.MetricCollection"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_metrics_are_tried_before_training(fault: str) -> None:
    make, feed, message = WRONG[fault]
    steps = []
    task = with_metrics(make, feed)
    task.on_train_batch_start = lambda *_: steps.append(1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        fit(task)
    assert steps == []


def test_one_metric_or_a_dict_of_them_will_do() -> None:
    for make in (lambda: MulticlassAccuracy(3), lambda: {"MulticlassAccuracy": MulticlassAccuracy(3)}):
        _, made = fit(with_metrics(make), max_epochs=1)
        assert 0 < made.callback_metrics["val/MulticlassAccuracy"] <= 1


def test_a_curve_is_not_logged() -> None:
    metrics = lambda: MetricCollection({"roc": MulticlassROC(3), "acc": MulticlassAccuracy(3)})  # noqa: E731
    memory = Memory()
    with pytest.warns(UserWarning, match="the metric 'roc' gives a tuple, and the log has single numbers: it is left"):
        _, made = fit(with_metrics(metrics), logger=memory, log_every_n_steps=1, max_epochs=1)
    assert {"val/acc", "val/loss"} <= set(made.callback_metrics)
    assert not any("roc" in name for _, row in memory.rows for name in row)


class Half(Metric):
    """Gives a number of Python, and has a metric within, which `reset` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.inner.update((logits.argmax(1) == targets).double())

    def compute(self) -> Any:
        return float(self.inner.compute()) / 2


def test_the_trial_leaves_the_metrics_as_they_were_and_numbers_of_python_are_logged() -> None:
    task = with_metrics(lambda: MetricCollection({"halved": Half(), "acc": MulticlassAccuracy(3, average="micro")}))
    (found,) = trainer().validate(task, datamodule=Points(), verbose=False)
    assert found["val/halved"] == pytest.approx(found["val/acc"] / 2, abs=1e-6)
    assert found["val/halved"] > 0


def test_several_values_are_named_and_what_wrappers_give_may_be_monitored(tmp_path: Path) -> None:
    def make() -> MetricCollection:
        several: dict[str, Any] = {"each": MulticlassAccuracy(3, average=None), "range": MinMaxMetric(MeanMetric())}
        return MetricCollection(several | {"confusion": MulticlassConfusionMatrix(3)})

    def feed(task: Any, logits: Tensor, losses: Tensor, batch: MicroBatch) -> None:
        task.measure(logits, batch.targets)

    class Mean(MinMaxMetric):
        def update(self, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
            super().update(logits.double().mean(1))

    def metrics() -> MetricCollection:
        return MetricCollection(dict(make().items()) | {"range": Mean(MeanMetric())})

    best = ModelCheckpoint(dirpath=tmp_path, monitor="val/max")
    with pytest.warns(UserWarning, match=r"the metric 'each' gives the shape \[3\], and the log has single") as warned:
        _, made = fit(with_metrics(metrics, feed), max_epochs=1, callbacks=[best], enable_checkpointing=True)
    assert not any("confusion" in str(one.message) for one in warned)
    assert best.best_model_path
    assert "val/max" in made.callback_metrics
    names = made.lightning_module.metric_names()  # type: ignore[union-attr]
    assert {"val/max", "val/min", "val/raw"} <= set(names)
    assert not {"val/each", "val/range", "val/confusion"} & set(names)


class Heads(Task):
    """Two outputs, with a loss and a metric each."""

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        outputs = self(batch.inputs)
        found, true = {"kind": outputs, "first": outputs[:, 0]}, {"kind": batch.targets, "first": batch.inputs[:, 0]}
        self.measure(found, true)  # type: ignore[arg-type]
        kind = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
        return {"kind": kind, "first": (found["first"] - true["first"]).square()}

    def make_metrics(self, outputs: Tensor) -> Any:
        return MultitaskWrapper({"kind": MulticlassAccuracy(3), "first": MeanSquaredError()}, postfix="_metric")


@pytest.mark.parametrize("size", SIZES)
def test_each_output_has_a_metric_of_its_own(size: int, tmp_path: Path) -> None:
    log = CSVLogger(tmp_path)
    torch.manual_seed(1)
    task, data = Heads(nn.Linear(5, 3).double(), optimizer=adamw), Points(micro_batch_size=size, eval_batch_size=size)
    fit(task, data, max_epochs=1, logger=log, log_every_n_steps=1)
    with (Path(log.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name.partition("/")[2] for name in rows[0] if name.startswith(("train/", "val/"))}
    assert names >= {"kind", "first", "kind_metric", "first_metric"}
    for split in ("train", "val"):  # the term of one is the mean square that the metric of the other measures
        each = [row for row in rows if row[f"{split}/first"]]
        assert each
        for row in each:
            assert float(row[f"{split}/first_metric"]) == pytest.approx(float(row[f"{split}/first"]), rel=1e-12)


class Late(Metric):
    """Gives nothing for a few examples, and keeps texts."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("texts", [], dist_reduce_fx=None)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.texts += [str(number) for number in targets.tolist()]  # type: ignore[operator]

    def compute(self) -> Any:
        texts: Any = self.texts
        return torch.tensor(len(texts)) if len(texts) > 10 else None


def test_a_metric_that_needs_more_examples_may_be_monitored(tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val/late", mode="max")
    task = with_metrics(lambda: MetricCollection({"late": Late()}))
    _, made = fit(task, max_epochs=2, callbacks=[best], enable_checkpointing=True)
    assert made.callback_metrics["val/late"] == 64
    assert best.best_model_path


class Unaided(Task):
    """Gives its metric what the network gives, as it is."""

    def losses(self, batch: MicroBatch) -> Tensor:
        outputs = self(batch.inputs)
        self.measure(outputs, batch.targets)
        return (outputs - batch.targets).square().mean(1)

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"r2": R2Score()})


@pytest.mark.parametrize("size", SIZES)
def test_a_few_numbers_per_example_are_summed_in_double_precision(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 290 + torch.randn(64, 2, generator=generator)
    outputs = targets + torch.randn(64, 2, generator=generator)
    found = evaluated(Unaided(Scaled()), Given(outputs, targets, eval_batch_size=size))
    error, spread = outputs.double() - targets.double(), (targets.double() - targets.double().mean(0)).square().sum(0)
    assert found["r2"] == pytest.approx(float((1 - error.square().sum(0) / spread).mean()), abs=1e-9)


def test_metrics_that_nobody_feeds_are_named() -> None:
    with pytest.warns(
        UserWarning, match=r"has metrics, but losses did not feed them in evaluation: call self\.measure"
    ):
        fit(with_metrics(lambda: MulticlassAccuracy(3), lambda *_: None), max_epochs=1)


@pytest.mark.filterwarnings("ignore:.*did not feed them")
def test_metrics_that_nobody_feeds_and_that_need_examples_are_left_out() -> None:
    _, made = fit(with_metrics(lambda: MulticlassAUROC(3), lambda *_: None), max_epochs=1)
    assert {name for name in made.callback_metrics if name.startswith("val/")} == {"val/loss"}


def test_metrics_of_evaluation_alone_have_no_rows_of_training() -> None:
    def feed(task: Task, logits: Tensor, losses: Tensor, batch: MicroBatch) -> None:
        if not task.training:
            task.measure(logits, batch.targets)

    memory = Memory()
    metrics = lambda: MetricCollection({"auroc": MulticlassAUROC(3), "acc": MulticlassAccuracy(3)})  # noqa: E731
    _, made = fit(with_metrics(metrics, feed), logger=memory, log_every_n_steps=1, max_epochs=1)
    assert made.callback_metrics["val/auroc"] > 0.5
    assert not any(name in ("train/acc", "train/auroc") for _, row in memory.rows for name in row)


def test_a_micro_batch_without_a_target_of_a_metric_adds_nothing() -> None:
    def feed(task: Task, logits: Tensor, losses: Tensor, batch: MicroBatch) -> None:
        some = batch.targets == 1
        task.measure(logits[some], batch.targets[some])

    values = []
    for size in (None, 1):
        memory = Memory()
        task = with_metrics(lambda: MetricCollection({"acc": MulticlassAccuracy(3, average="micro")}), feed)
        fit(task, Points(micro_batch_size=size), logger=memory, log_every_n_steps=1, max_epochs=1)
        values.append([row["train/acc"] for _, row in memory.rows if "train/acc" in row])
    assert len(values[0]) == 7
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_a_metric_that_gives_a_dict_is_logged_by_its_keys() -> None:
    _, made = fit(with_metrics(lambda: {"each": ClasswiseWrapper(MulticlassAccuracy(3, average=None))}), max_epochs=1)
    assert sum(name.startswith("val/multiclassaccuracy_") for name in made.callback_metrics) == 3


def test_predict_asks_for_no_targets() -> None:
    class Alone(Points):
        has_predict_split = True

        def load(self, split: str) -> Any:
            return (self.x,) if split == "predict" else super().load(split)

    class Own(Task):
        def losses(self, batch: MicroBatch) -> Tensor:
            self.measure(batch.targets)
            return self(batch.inputs).square().sum(1)

        def make_metrics(self, outputs: Tensor) -> MetricCollection:
            return MetricCollection({"mean": MeanMetric()})

    task = Own(nn.Linear(5, 3).double(), optimizer=adamw)
    assert len(trainer().predict(task, datamodule=Alone()) or []) > 0


class Groups(Metric):
    """The accuracy of each class that there is: a dict, whose keys depend on the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, 9), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        right = (logits.argmax(1) == targets).to(self.sums)
        self.sums.index_add_(1, 3 * targets, torch.stack([right, torch.ones_like(right)]))  # type: ignore[operator]

    def compute(self) -> Any:
        return {f"g{group}": right / count for group, (right, count) in enumerate(self.sums.T) if count}  # type: ignore[arg-type]


def test_groups_that_the_first_examples_do_not_have_may_be_monitored() -> None:
    class Sorted(Points):
        def load(self, split: str) -> Any:
            order = self.y.argsort()
            return self.x[order], self.y[order]

    task = with_metrics(lambda: {"each": Groups()})
    best = ModelCheckpoint(dirpath="kept", monitor="val/g6", mode="max", filename="own")
    settings: dict[str, Any] = {"accelerator": "cpu", "precision": "64-true", "logger": False}
    made = batchwise.Trainer(**settings, enable_progress_bar=False, max_epochs=1, callbacks=[best])
    made.fit(task, Sorted())
    assert task._measures.found == ["g0"]
    assert {"val/g0", "val/g3", "val/g6"} < set(made.callback_metrics)
    assert best.best_model_path


class Locked(MulticlassAccuracy):
    def __init__(self) -> None:
        super().__init__(3)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"acc": Locked()}, "cannot be copied for training (cannot pickle '_thread.lock' object): let it hold"),
        (lambda: {"acc": MetricTracker(MulticlassAccuracy(3))}, "Value MetricTracker( (0): MulticlassAccuracy() ) b"),
    ],
)
def test_what_is_no_metric_or_no_copy_is_one_line(make: Any, message: str) -> None:
    made = batchwise.Trainer(accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False)
    with pytest.raises(Mistake, match=re.escape(message)) as raised:
        made.fit(with_metrics(make), Points())
    assert "\n" not in str(raised.value)


class Squares(Task):
    def losses(self, batch: MicroBatch) -> Any:
        return (self(batch.inputs) - batch.targets).square()


class Terms(Task):
    """One term of all examples, and one of those whose target is not 7."""

    def losses(self, batch: MicroBatch) -> Any:
        losses = (self(batch.inputs) - batch.targets).square()
        return {"all": losses, "some": (losses.log(), (batch.targets != 7).double())}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Squares, Terms])
def test_examples_whose_loss_is_not_finite_are_named(kind: type[Task], size: int) -> None:
    inputs, targets = torch.arange(1.0, 31).unsqueeze(1), torch.zeros(30, 1)
    inputs[7] = targets[7] = 7  # of which the logarithm is infinite, and has the weight 0
    data = Given(inputs, targets, eval_batch_size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "test/loss")
        evaluated(kind(Scaled()), data)
    inputs[19], targets[5] = torch.inf, torch.nan
    line = "test/loss is nan: the loss of examples 5, 19 of the test split is not finite (2 in all): look there"
    with pytest.warns(UserWarning, match=re.escape(line)):
        evaluated(kind(Scaled()), data)
