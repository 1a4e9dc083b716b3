"""Losses of several terms: against plain PyTorch on whole batches, each term divided by its own count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CSV, TWO, run_here, run_process
from lightning.pytorch.callbacks import ModelCheckpoint
from small import EXAMPLES, Classify, Fragile, Memory, Points, adamw, fit, furthest, trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from batchwise import MicroBatch, Task
from batchwise.callbacks.checkpoint import Last
from batchwise.choosing.speed import Stopwatch, Way
from batchwise.tasks import captured, step
from batchwise.tasks.adversarial import Adversarial
from batchwise.tasks.contrastive import Contrastive

PER_EPOCH, STEPS = 7, 21
COEFFICIENTS = {"kind": 2.0, "place": 0.25}


class Partial(Points):
    """Of 70% of the examples, and of all in the third batch, the class is not known: -1."""

    def __init__(
        self, batch_size: int = 10, micro_batch_size: int | None = None, eval_batch_size: int | None = None
    ) -> None:
        super().__init__(batch_size=batch_size, micro_batch_size=micro_batch_size, eval_batch_size=eval_batch_size)
        known = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(1)) < 0.3
        other = Points()
        other.setup("fit")
        assert other.plan is not None
        known[other.order.indices(0, *other.plan.bounds(2))] = False
        self.y = torch.where(known, self.y, -1)


class Net(nn.Module):
    """The same weights each time. It may run out of memory."""

    def __init__(self, most: int = 10**6, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.check = most, where

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layers(inputs)
        return Fragile.apply(outputs, *self.check) if self.training else outputs  # type: ignore[return-value]


def terms(outputs: Tensor, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    kind = F.cross_entropy(outputs, targets, ignore_index=-1, reduction="none")
    place = (outputs - inputs[:, :3]).square()
    return {"kind": (kind, (targets >= 0).to(kind)), "place": (place, inputs[:, 1:4].abs())}


class Two(Task):
    """A class that is often missing, and three weighted numbers per example."""

    def losses(self, batch: MicroBatch) -> dict[str, Any]:
        outputs = self(batch.inputs)
        self.measure(outputs, batch.targets)
        self.log("seen", outputs.sum(1).detach(), on_step=False, on_epoch=True)
        return terms(outputs, batch.inputs, batch.targets)

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro", ignore_index=-1)})


class Quiet(Task):
    """The same losses, and nothing that keeps the device waiting for the host."""

    def losses(self, batch: MicroBatch) -> dict[str, Any]:
        return terms(self(batch.inputs), batch.inputs, batch.targets)


class Counting(Two):
    """Says how many targets there are, and is asked for losses once for each micro-batch."""

    calls = 0

    def losses(self, batch: MicroBatch) -> dict[str, Any]:
        self.calls += 1
        return super().losses(batch)

    def counts(self, batch: MicroBatch) -> dict[str, float | Tensor]:
        return {"place": batch.inputs[:, 1:4].abs(), "kind": batch.targets >= 0}


class Whole(Two):
    """One loss per example, without weights, and one coefficient."""

    calls = 0

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        self.calls += 1
        outputs = self(batch.inputs)
        return {"near": outputs.square().mean(1), "place": (outputs - batch.inputs[:, :3]).square().sum(1)}


def sums(found: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: ((losses * weights).sum(), weights.sum()) for name, (losses, weights) in found.items()}


def mean_of(found: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """The mean of each term over all targets of some batches, and their weighted sum."""
    means: dict[str, float] = {}
    for name in COEFFICIENTS:
        loss, count = (sum(float(one[name][place]) for one in found) for place in (0, 1))
        means[name] = loss / count if count else float("nan")
    return means | {"loss": sum(COEFFICIENTS[name] * mean for name, mean in means.items() if mean == mean)}


def plain(
    data: Points, make: Callable = adamw
) -> tuple[nn.Module, list[dict[str, tuple[Tensor, Tensor]]], list[float]]:
    """Train on whole batches; return the network, the sums of each batch and its loss."""
    network, all_sums, losses = Net(), [], []
    optimizer = make(network.parameters())
    assert data.plan is not None
    for number in range(STEPS):
        index = data.order.indices(number // PER_EPOCH, *data.plan.bounds(number))
        found = sums(terms(network(data.x[index]), data.x[index], data.y[index]))
        loss = torch.stack([COEFFICIENTS[name] * s / n for name, (s, n) in found.items() if n > 0]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        all_sums.append({name: (s.detach(), n) for name, (s, n) in found.items()})
        losses.append(loss.item())
    assert float(all_sums[2]["kind"][1]) == 0
    return network, all_sums, losses


WAYS: dict[str, tuple[type[Task], int | None, tuple[Any, ...]]] = {
    "one micro-batch": (Two, None, ()),
    "micro-batches of 7": (Two, 7, ()),
    "micro-batches of 3": (Two, 3, ()),
    "micro-batches of 1": (Two, 1, ()),
    "counts are given": (Counting, 3, ()),
    "out of memory in the only pass": (Two, None, (3, "forward")),
    "out of memory in the first pass": (Two, 7, (3, "forward")),
    "out of memory in the second pass": (Two, 7, (3, "backward")),
    "out of memory, and counts are given": (Counting, 7, (3, "backward")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_training_is_that_of_whole_batches_in_plain_pytorch(way: str) -> None:
    make, size, check = WAYS[way]
    data, memory = Partial(micro_batch_size=size), Memory()
    task = make(Net(*check), optimizer=adamw, coefficients=COEFFICIENTS)
    task, made = fit(task, data, logger=memory, log_every_n_steps=3)
    assert (data.micro_batch_limit is not None) == bool(check)
    network, all_sums, losses = plain(data)
    assert furthest(task.network.layers, network.layers) < 1e-12  # type: ignore[arg-type]
    assert float(task._step.loss()) == pytest.approx(losses[-1], abs=1e-12)
    for end in range(3, STEPS + 1, 3):
        for name, mean in mean_of(all_sums[end - 3 : end]).items():
            assert memory.found(f"train/{name}")[end] == pytest.approx(mean, abs=1e-12, nan_ok=True), (name, end)
    for end in range(PER_EPOCH, STEPS + 1, PER_EPOCH):
        for name, mean in mean_of(all_sums[end - PER_EPOCH : end]).items():
            assert memory.found(f"train/{name}_epoch")[end] == pytest.approx(mean, abs=1e-12), (name, end)
    with torch.no_grad():
        right = mean_of([sums(terms(network(data.x), data.x, data.y))])
    for name, mean in right.items():
        assert float(made.callback_metrics[f"val/{name}"]) == pytest.approx(mean, abs=1e-12)
    if way == "counts are given":
        assert task.calls < 110  # type: ignore[operator] # of 75 in training


def test_a_first_pass_leaves_no_trace_in_what_is_measured_and_logged() -> None:
    found = []
    for size in (None, 3):
        memory = Memory()
        fit(Two(Net(), optimizer=adamw), Partial(micro_batch_size=size), logger=memory, log_every_n_steps=3)
        found.append((memory.found("train/accuracy"), memory.found("seen"), memory.found("val/accuracy")))
        assert all(map(len, found[-1]))
    for whole, parts in zip(*found, strict=True):
        assert parts == pytest.approx(whole, abs=1e-12)


class Held(Two):
    """Has a metric of its own, which is no metric of the engine."""

    def __init__(self) -> None:
        super().__init__(Net(), optimizer=adamw)
        self.own = MulticlassAccuracy(3, average="micro", ignore_index=-1)

    def losses(self, batch: MicroBatch) -> dict[str, Any]:
        outputs = self(batch.inputs)
        if self.training:
            self.own.update(outputs, batch.targets)
        return terms(outputs, batch.inputs, batch.targets)


def test_a_first_pass_leaves_no_trace_in_a_metric_of_the_task() -> None:
    data = Partial(micro_batch_size=3)
    task, _ = fit(Held(), data, max_epochs=2)
    known = int((data.y >= 0).sum())
    assert int(task.own.tp + task.own.fn) == 2 * known  # type: ignore[operator]


def test_one_loss_per_example_needs_no_first_pass() -> None:
    tasks = [fit(Whole(Net(), optimizer=adamw), Points(micro_batch_size=size), max_epochs=1)[0] for size in (None, 3)]
    assert furthest(*tasks) < 1e-12
    assert tasks[1].calls - tasks[0].calls < 30  # type: ignore[operator] # of 26 micro-batches


@pytest.mark.parametrize("make", [Two, Counting, Whole, Classify])
@pytest.mark.slow
def test_terms_that_are_not_known_before_training(make: Any) -> None:
    """As where the losses before training run out of memory."""

    class Late(make):
        def losses(self, batch: MicroBatch) -> Any:
            if self._own_data is not None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().losses(batch)

    data = Partial if issubclass(make, Two) else Points
    early = fit(make(Net(), optimizer=adamw), data())[0]
    for size in (None, 3):
        assert furthest(fit(Late(Net(), optimizer=adamw), data(micro_batch_size=size))[0], early) < 1e-12


def test_an_evaluation_may_weigh_examples_where_training_does_not() -> None:
    class Own(Whole):
        def losses(self, batch: MicroBatch) -> Any:
            found = super().losses(batch)
            return found if self.training else {name: (one, batch.inputs[:, 0].abs()) for name, one in found.items()}

    data = Points(micro_batch_size=3)
    task, made = fit(Own(Net(), optimizer=adamw), data)
    with torch.no_grad():
        each, weights = task.network(data.x).square().mean(1), data.x[:, 0].abs()
    right = float((each * weights).sum() / weights.sum())
    assert float(made.callback_metrics["val/near"]) == pytest.approx(right, abs=1e-12)


def test_one_term_is_the_same_as_one_tensor() -> None:
    class One(Classify):
        def losses(self, batch: MicroBatch) -> Any:
            return {"kind": super().losses(batch)}

    task, other = fit(One(Net(), optimizer=adamw)), fit(Classify(Net(), optimizer=adamw))
    assert furthest(task[0], other[0]) < 1e-12
    for name, value in other[1].callback_metrics.items():
        assert float(task[1].callback_metrics[name]) == pytest.approx(float(value), abs=1e-12), name


def test_a_resume_goes_on_with_the_sums(tmp_path: Path) -> None:
    memory, settings = Memory(), {"enable_checkpointing": True, "log_every_n_steps": 4}
    whole, _ = fit(Two(Net(), optimizer=adamw), Partial(), logger=memory, **settings)
    fit(Two(Net(), optimizer=adamw), Partial(), max_steps=10, callbacks=[Last()], **settings)
    last, again = str(tmp_path / "checkpoints" / "last.ckpt"), Memory()
    state = torch.load(last, weights_only=True)["batchwise"]["sums"]["terms"]
    assert set(state["epoch"]) == {"kind", "place"}
    data = Partial(micro_batch_size=4)
    task, _ = fit(Two(Net(), optimizer=adamw), data, ckpt_path=last, logger=again, **settings)
    assert furthest(task, whole) < 1e-12
    for name in ("train/kind", "train/place", "train/loss", "train/loss_epoch", "train/kind_epoch", "val/kind"):
        before, after = memory.found(name), again.found(name)
        assert len(after) >= 2
        # The row of step 10, the last one of the first training, has begun another.
        rows = {at: value for at, value in before.items() if at in after and at != 12}
        assert {at: after[at] for at in rows} == pytest.approx(rows, abs=1e-12), name


def test_a_term_may_decide_which_checkpoint_is_best(tmp_path: Path) -> None:
    bests = [
        ModelCheckpoint(monitor=monitor, mode="min", dirpath=tmp_path, filename=f"best{number}")
        for number, monitor in enumerate(("val/place", "train/place_epoch"))
    ]
    task, made = fit(Two(Net(), optimizer=adamw), Partial(), callbacks=bests, enable_checkpointing=True)
    assert {"val/kind", "val/place", "train/kind_epoch", "train/place_epoch"} < set(task.metric_names())
    for best in bests:
        assert best.best_model_score is not None
        assert float(best.best_model_score) <= float(made.callback_metrics[str(best.monitor)])
    (tested,) = made.test(task, datamodule=Partial(), verbose=False)
    assert {"test/kind", "test/place", "test/loss"} < set(tested)
    (alone,) = trainer().test(Two(task.network, coefficients=COEFFICIENTS), datamodule=Partial(), verbose=False)
    assert alone["test/place"] == pytest.approx(tested["test/place"], abs=1e-12)


def each(task: Task, batch: MicroBatch) -> Tensor:
    return F.cross_entropy(task(batch.inputs), batch.targets, reduction="none")


def coupled(task: Task, batch: MicroBatch) -> Any:
    outputs = task(batch.inputs)
    return {"kind": each(task, batch), "far": (outputs - outputs.mean(0)).square().sum(1)}


def sometimes(task: Task, batch: MicroBatch) -> Any:
    return {"kind": each(task, batch)} | ({"late": each(task, batch)} if task.global_step > 2 else {})


def sometimes_weighted(task: Task, batch: MicroBatch) -> Any:
    losses = each(task, batch)
    return {"kind": losses if task.global_step < 3 else (losses, torch.ones_like(losses))}


def wrong_counts(task: Task, batch: MicroBatch) -> Any:
    return {"kind": 2}


FAULTS: dict[str, tuple[Callable, dict[str, Any], str]] = {
    "coupled": (coupled, {}, r"losses\['far'\] gives an example another loss when other examples"),
    "the name of the sum": (lambda t, b: {"loss": each(t, b)}, {}, r"dict of \['loss'\]: its keys are the names"),
    "the name of an epoch's mean": (
        lambda t, b: {"far": each(t, b), "far_epoch": each(t, b)},
        {},
        r"the terms far, far_epoch: rename far_epoch, which is the mean of far over an epoch",
    ),
    "no name": (lambda t, b: {1: each(t, b)}, {}, r"dict of \[1\]: its keys are the names"),
    "empty": (lambda t, b: {}, {}, r"a dict of \[\]"),
    "a mean": (lambda t, b: {"kind": each(t, b).mean()}, {}, r"losses\['kind'\] gave the shape \[\] for 12 examples"),
    "a weight for all": (lambda t, b: (each(t, b), 1.0), {}, r"^Own\.losses gave a float as weights: return a tensor"),
    "a weight of a term": (
        lambda t, b: {"kind": (each(t, b), 2)},
        {},
        r"losses\['kind'\] gave a int as weights: return",
    ),
    "three values": (lambda t, b: (each(t, b), None, 3), {}, r"^Own\.losses gave 3 values: return the losses, or the"),
    "a metric": (lambda t, b: {"accuracy": each(t, b)}, {}, "accuracy is the name of a term of the loss and of a"),
    "other terms": (sometimes, {}, "gives the terms kind, late now, and gave the terms kind before"),
    "other weights": (sometimes_weighted, {}, "has weights, or several targets per example, only in some batches"),
    "no such term": (
        lambda t, b: {"kind": each(t, b), "far": each(t, b)},
        {"coefficients": {"fat": 2.0}},
        "model.coefficients has fat, but Own.losses gives the terms kind, far",
    ),
    "one tensor": (each, {"coefficients": {"kind": 2.0}}, "has kind, but Own.losses gives one tensor"),
    "not finite": (each, {"coefficients": {"kind": float("nan")}}, "model.coefficients.kind is nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(fault: str) -> None:
    losses, settings, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as caught:
        fit(
            type("Own", (Classify,), {"losses": losses})(Net(), optimizer=adamw, **settings), Points(micro_batch_size=5)
        )
    assert "\n" not in str(caught.value)


COUNTS: dict[str, tuple[Callable, str]] = {
    "another number": (lambda t, b: {"kind": 2}, "counts gives 24 for the term kind in a few examples.* sum to 12"),
    "another term": (lambda t, b: {"kin": 1}, "counts gives the terms kin, but losses gives the terms kind"),
    "another length": (lambda t, b: {"kind": torch.ones(2)}, r"counts\['kind'\] has the shape \[2\] for 12 examples"),
}


@pytest.mark.parametrize("fault", COUNTS)
def test_counts_that_are_not_those_of_the_losses_are_refused(fault: str) -> None:
    counts, message = COUNTS[fault]
    own = {"losses": lambda task, batch: {"kind": each(task, batch)}, "counts": counts}
    with pytest.raises(ValueError, match=message):
        fit(type("Own", (Classify,), own)(Net(), optimizer=adamw))


def test_a_loss_of_the_whole_batch_is_one_tensor() -> None:
    class Own(Contrastive):
        def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Any:
            return {"one": embeddings[0].sum(1)}

    with pytest.raises(ValueError, match=r"Own\.pair_losses gives a dict: add its terms up"):
        fit(Own(Net(), optimizer=adamw))


def test_the_losses_of_several_optimizers_are_one_tensor_each() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.one(inputs) + self.other(inputs)

    class Own(Adversarial):
        def losses(self, batch: MicroBatch, player: str = "") -> Any:
            return {"kind": each(self, batch)}

    with pytest.raises(ValueError, match="gives the terms kind, but the loss of several optimizers is one tensor"):
        fit(Own(Parts(), {"one": adamw, "other": adamw}))


def test_steps_with_terms_are_not_captured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))

    def fused(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=2**-4, fused=True)  # on the device, the rate is a float32

    data = Partial(micro_batch_size=3)
    task = Quiet(Net(), optimizer=fused, coefficients=COEFFICIENTS)
    fit(task, data, capture="auto", log_every_n_steps=10)
    assert capsys.readouterr().out.count("steps are not captured, because losses gives several terms") == 1
    assert furthest(task.network.layers, plain(data, fused)[0].layers) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_skipped_is_not_in_the_log(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DEVICES", ("cpu",))  # so that fused kernels decide it, and the host learns of it later

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0, fused=fused)

    data, memory = Partial(), Memory()
    data.setup("fit")
    assert data.plan is not None
    bounds = [data.order.indices(0, *data.plan.bounds(number)) for number in range(3)]
    right = [sums(terms(Net()(data.x[index]), data.x[index], data.y[index])) for index in (bounds[0], bounds[2])]
    data.x[bounds[1]] = float("nan")
    settings: dict[str, Any] = {"max_steps": 3, "limit_val_batches": 0, "logger": memory, "log_every_n_steps": 3}
    task, _ = fit(Quiet(Net(), optimizer=optimizer, coefficients=COEFFICIENTS), data, **settings)
    assert (task._step.finite.ledger is not None) == fused
    for name, mean in mean_of(right).items():
        assert memory.found(f"train/{name}")[3] == pytest.approx(mean, abs=1e-12), name


def test_the_speed_of_terms_can_be_measured() -> None:
    data = Partial()
    data.setup("fit")
    (seconds,) = Stopwatch(Two(Net(), optimizer=adamw), data, 8, torch.device("cpu"), rounds=1).compare([Way(8)])
    assert 0 < seconds < 1


@pytest.mark.slow
def test_two_devices_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{here.parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("own.yaml").write_text(
        """
name: own
seed_everything: 0
trainer: {max_epochs: 3, precision: 64-true, accelerator: cpu}
data: {class_path: test_terms.Partial}
model:
  class_path: test_terms.Two
  init_args:
    network: test_terms.Net
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.05}}
    coefficients: {kind: 2.0, place: 0.25}
"""
    )
    command = ("fit", "--config", "own.yaml", *CSV)
    whole = run_here(*command, "--name", "whole")
    assert whole.code == 0, whole.err
    # Of ten examples one device has three and then two, and of the last four each has two; of one there is none.
    two = run_process(*command, *TWO, "--name", "two", "--data.micro_batch_size", 3, "--data.eval_batch_size", 5)
    assert two.code == 0, two.err
    data = Partial()
    data.setup("fit")
    network, all_sums, _ = plain(data)
    for result in (whole, two):
        state = result.checkpoint()["state_dict"]
        theirs = network.state_dict()
        assert max(float((state[f"network.{name}"] - value).abs().max()) for name, value in theirs.items()) < 1e-12
        for at, found in enumerate(all_sums):
            for name, mean in mean_of([found]).items():
                row = result.rows(f"train/{name}").get(at + 1, float("nan"))
                assert row == pytest.approx(mean, abs=1e-12, nan_ok=True), (name, at)
    for name in ("val/kind", "val/place", "val/loss", "train/loss_epoch", "train/accuracy"):
        assert two.rows(name) == pytest.approx(whole.rows(name), abs=1e-12)
        assert len(two.rows(name)) >= 3
    refused = run_here(*command, "--model.coefficients", "{kin: 2.0}")
    assert refused.code == 2
    assert "model.coefficients has kin, but Two.losses gives the terms kind, place" in refused.err
    assert "Traceback" not in refused.err
