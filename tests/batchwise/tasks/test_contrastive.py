"""Losses that couple the examples of a batch: exact in any micro-batches, on any devices, after any resume."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
import yaml
from helpers import CSV, TWO, Result, run_here, run_process
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchwise import DataModule, MicroBatch
from batchwise.batching.fetch import InMemory, Read, Request, gather
from batchwise.batching.random import mix
from batchwise.batching.schedule import Milestones
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.choosing import speed
from batchwise.data.augment import Affine, ShiftCrop
from batchwise.data.mixing import MixUp
from batchwise.data.views import Views
from batchwise.errors import TrainingStopped
from batchwise.models import place
from batchwise.models.convnet import ConvNet
from batchwise.models.dropout import Dropout
from batchwise.sources.digits import Digits
from batchwise.tasks.contrastive import Contrastive
from batchwise.tasks.coupled import CoupledLoss, InfoNCE, SupCon, Triplet
from batchwise.tasks.groups import join
from batchwise.tasks.step import DRAWS

SIZE = 9
"""Of a batch; so the last one of an epoch of 64 has one example."""


class Net(nn.Module):
    """The same weights each time, and dropout."""

    def __init__(self, most: int = 10**6, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Dropout(0.2), nn.Linear(8, 4, bias=False))
        self.check = most, where

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layers(inputs)
        return small.Fragile.apply(outputs, *self.check) if self.training else outputs  # type: ignore[return-value]


class Data(small.Points):
    """With arguments that the command line can see."""

    def __init__(
        self, batch_size: int = SIZE, micro_batch_size: int | None = None, eval_batch_size: int | None = None
    ) -> None:
        super().__init__(batch_size=batch_size, micro_batch_size=micro_batch_size, eval_batch_size=eval_batch_size)


class Noisy(Contrastive):
    """Two embeddings of each point: as it is, and with noise."""

    def embed(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        return self(batch.inputs), self(batch.inputs + 0.3 * batch.randn("noise", 5))


class Logging(Noisy):
    """Logs values of its own."""

    def embed(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        first, second = super().embed(batch)
        self.log("norm", first.norm(dim=1).sum(), on_step=self.training, on_epoch=True, reduce_fx="sum")
        return first, second

    def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Any:
        spread = embeddings[0].var(0, correction=0).sum()
        self.log("spread", spread, on_step=self.training, on_epoch=True)
        self.log("total", spread, on_step=self.training, on_epoch=True, reduce_fx="sum")
        return super().pair_losses(embeddings, targets)


# The losses in plain PyTorch, as their papers write them, one anchor at a time


def plain_info_nce(first: Tensor, second: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    logits = scale.exp() * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def plain_sup_con(first: Tensor, second: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    rows, classes = F.normalize(torch.cat([first, second]), dim=1), torch.cat([labels, labels])
    losses = []
    for anchor in range(len(rows)):
        scores = rows @ rows[anchor] / 0.1
        others = [i for i in range(len(rows)) if i != anchor]
        positive = [i for i in others if classes[i] == classes[anchor]]
        losses.append(-torch.stack([scores[i] - scores[others].logsumexp(0) for i in positive]).mean())
    return torch.stack(losses).view(2, -1).mean(0)


def plain_triplet(first: Tensor, second: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    rows, classes = torch.cat([first, second]), torch.cat([labels, labels])
    losses = []
    for anchor in range(len(rows)):
        distances = {i: (rows[i] - rows[anchor]).square().sum().sqrt() for i in range(len(rows)) if i != anchor}
        positive = torch.stack([distance for i, distance in distances.items() if classes[i] == classes[anchor]])
        negative = [distance for i, distance in distances.items() if classes[i] != classes[anchor]]
        if negative:
            losses.append(F.relu(0.5 + positive.max() - torch.stack(negative).min()))
    if len(losses) < len(rows):  # the batch of one example
        return rows[:0, 0]
    return torch.stack(losses).view(2, -1).mean(0)


LOSSES: dict[str, tuple[Callable[[], CoupledLoss], Callable[..., Tensor]]] = {
    "InfoNCE": (lambda: InfoNCE(learn_temperature=True), plain_info_nce),
    "SupCon": (lambda: SupCon(), plain_sup_con),
    "Triplet": (lambda: Triplet(0.5), plain_triplet),
}


def plain(loss: Callable[..., Tensor], points: small.Points, epochs: int = 3) -> tuple[nn.Module, Tensor, list[float]]:
    """Train on whole batches in plain PyTorch; only what is drawn is keyed as ours. Return network, scale, losses."""
    network, scale = Net().double(), nn.Parameter(torch.tensor(-math.log(0.07)).double())
    optimizer = small.adamw([*network.parameters(), scale])
    losses = []
    assert points.plan is not None
    for step in range(epochs * 8):
        index = points.order.indices(step // 8, *points.plan.bounds(step))
        key = mix(3, DRAWS, step)
        batch = MicroBatch(points.x[index], points.y[index], index, key=key)
        torch.set_default_dtype(torch.float64)  # in which Lightning's 64-true lets numbers be drawn
        noise = batch.randn("noise", 5)
        torch.set_default_dtype(torch.float32)
        place.current = place.Place(key, 0)
        first, second = network(batch.inputs), network(batch.inputs + 0.3 * noise)
        place.current = None
        each = loss(first, second, batch.targets, scale)
        optimizer.zero_grad()
        mean = each.mean() if len(each) else (first.sum() + second.sum()) * 0
        (mean + 0 * scale if loss is plain_info_nce else mean).backward()
        optimizer.step()
        losses.append(float(mean.detach()))
    return network, scale, losses


class Losses(Callback):
    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.all.append(float(outputs["loss"]))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def fit(
    loss: CoupledLoss, network: nn.Module | None = None, data: small.Points | None = None, **settings: Any
) -> tuple[Any, list[float], small.Points]:
    losses = Losses()
    callbacks = [losses, *settings.pop("callbacks", [])]
    data = data or small.Points(batch_size=SIZE)
    task = Noisy((network or Net()).double(), loss, optimizer=small.adamw)
    task, _ = small.fit(task, data, callbacks=callbacks, **settings)
    return task, losses.all, data


WAYS: dict[str, tuple[int | None, tuple[Any, ...]]] = {
    "one micro-batch": (None, ()),
    "micro-batches of 7": (7, ()),
    "micro-batches of 2": (2, ()),
    "out of memory in the only pass": (None, (3, "forward")),
    "out of memory in the first pass": (7, (3, "forward")),
    "out of memory in the second pass": (7, (3, "backward")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.slow
def test_weights_and_losses_are_those_of_whole_batches_in_plain_pytorch(name: str, way: str) -> None:
    make, reference = LOSSES[name]
    size, check = WAYS[way]
    task, losses, data = fit(make(), Net(*check), small.Points(batch_size=SIZE, micro_batch_size=size))
    assert (data.micro_batch_limit is not None) == bool(check)
    network, scale, expected = plain(reference, data)
    assert small.furthest(task.network, network) < 1e-12
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True)) < 1e-12
    if name == "InfoNCE":
        assert abs(float(task.loss.log_scale - scale)) < 1e-12
        assert abs(float(scale) + math.log(0.07)) > 0.1  # it has learnt


def test_what_a_resume_goes_on_with(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [Last()]}
    _, before, _ = fit(InfoNCE(learn_temperature=True), max_steps=10, **settings)
    data = small.Points(batch_size=SIZE, micro_batch_size=4)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    task, after, _ = fit(InfoNCE(learn_temperature=True), None, data, ckpt_path=last, **settings)
    network, scale, expected = plain(plain_info_nce, data)
    assert small.furthest(task.network, network) < 1e-12
    assert abs(float(task.loss.log_scale - scale)) < 1e-12
    assert max(abs(a - b) for a, b in zip([*before, *after], expected, strict=True)) < 1e-12


@pytest.mark.parametrize("size", [None, 4])
def test_rows_of_training_have_the_metrics_of_the_batch(size: int | None) -> None:
    memory = small.Memory()
    data = small.Points(batch_size=SIZE, micro_batch_size=size)
    fit(InfoNCE(), None, data, logger=memory, log_every_n_steps=1, max_steps=5)
    assert len(memory.found("train/top1")) == 5


class Parts(small.Points):
    """The points in two parts, by their names, and targets too."""

    def load(self, split: str) -> Any:
        return {"left": self.x[:, :2], "right": self.x[:, 2:]}, {
            "class": self.y,
            "half": (self.x, {"of": self.x[:, 0]}),
        }


class OfParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().double()

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([left, right], 1)
        return self.net(whole), self.net(whole.flip(1))


class ByName(Contrastive):
    """Takes dicts as the network does."""

    def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Any:
        assert torch.equal(targets["half"][0][:, 0], targets["half"][1]["of"])
        return super().pair_losses(embeddings, targets["class"])


@pytest.mark.parametrize("size", [None, 7, 2])
@pytest.mark.slow
def test_inputs_and_targets_may_be_nested(size: int | None) -> None:
    class Plain(Contrastive):
        def embed(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return self(batch.inputs), self(batch.inputs.flip(1))

    first = Plain(Net().double(), SupCon(), optimizer=small.adamw)
    second = ByName(OfParts(), SupCon(), optimizer=small.adamw)
    _, one = small.fit(first, small.Points(batch_size=SIZE))
    _, other = small.fit(second, Parts(batch_size=SIZE, micro_batch_size=size))
    assert small.furthest(first.network, second.network.net) < 1e-12  # type: ignore[arg-type]
    assert abs(float(one.callback_metrics["val/loss"] - other.callback_metrics["val/loss"])) < 1e-12


# On two devices


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{here.parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("own.yaml").write_text(
        f"""
name: own
seed_everything: 0
trainer: {{max_epochs: 3, precision: 64-true, accelerator: cpu}}
data: {{class_path: test_contrastive.Data, init_args: {{batch_size: {SIZE}}}}}
model:
  class_path: test_contrastive.Logging
  init_args:
    network: test_contrastive.Net
    loss: {{class_path: batchwise.tasks.coupled.InfoNCE, init_args: {{learn_temperature: true}}}}
    group_size: 10
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.05}}}}
"""
    )
    return "fit", "--config", "own.yaml", *CSV


def apart(result: Result, network: nn.Module, scale: Tensor) -> float:
    state = result.checkpoint()["state_dict"]
    theirs = network.state_dict()
    weights = max(float((state[f"network.{name}"] - value).abs().max()) for name, value in theirs.items())
    return max(weights, abs(float(state["loss.log_scale"] - scale)))


@pytest.mark.weekly
def test_two_devices_are_exact(command: tuple[object, ...]) -> None:
    whole = run_here(*command, "--name", "whole")
    assert whole.code == 0, whole.err
    data = small.Points(batch_size=SIZE)
    data.setup("fit")
    network, scale, expected = plain(plain_info_nce, data)
    assert apart(whole, network, scale) < 1e-12
    # One by one: of nine examples, the first device has four, and another stands in for its fifth.
    two = run_process(*command, *TWO, "--name", "two", "--data.micro_batch_size", 1, "--data.eval_batch_size", 5)
    assert two.code == 0, two.err
    assert apart(two, network, scale) < 1e-12
    first = run_here(*command, "--name", "on", "--trainer.max_steps", 10, "--data.micro_batch_size", 7)
    assert first.code == 0, first.err
    on = run_process(*command, *TWO, "--name", "on", "--ckpt_path", "last")
    assert on.code == 0, on.err
    assert "resuming after step 10" in on.out
    assert apart(on, network, scale) < 1e-12
    for result in (whole, two, on):
        rows = result.rows("train/loss")
        assert max(abs(rows[step + 1] - loss) for step, loss in enumerate(expected) if step + 1 in rows) < 1e-12
    logged = ("norm_step", "norm_epoch", "spread_step", "spread_epoch", "total_step", "total_epoch")
    for column in ("val/loss", "val/top1", "train/top1", "gradient_norm", *logged):
        ours, theirs = whole.rows(column), two.rows(column)
        assert ours.keys() == theirs.keys()
        assert len(ours) >= 3
        assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-12, column


def test_a_part_that_stands_in_is_at_no_place_of_the_whole() -> None:
    def part(first: int, count: int, counts: bool) -> MicroBatch:
        rows = torch.arange(first, first + count)
        return MicroBatch((rows[:, None] + 1.0,), rows > 0, rows, None if counts else torch.zeros(1), first, 0, counts)

    whole = join(5, [part(0, 1, False), part(1, 2, True), part(3, 1, True), part(0, 1, False)])
    assert whole.inputs[0].tolist() == [[0], [2], [3], [4], [0]]
    assert whole.targets.tolist() == [False, True, True, True, False]
    assert whole.weights is not None
    assert whole.weights.tolist() == [0, 1, 1, 1, 0]


# Evaluation


@pytest.mark.parametrize("eval_batch_size", [None, 1, 5, 64])
@pytest.mark.parametrize("group_size", [10, 64, None])
@pytest.mark.slow
def test_groups_do_not_depend_on_the_size_of_evaluation_batches(
    eval_batch_size: int | None, group_size: int | None
) -> None:
    data = small.Points(batch_size=SIZE, eval_batch_size=eval_batch_size)
    task = Noisy(Net().double(), SupCon(), group_size, optimizer=small.adamw)
    trainer = small.trainer()
    trainer.validate(task, datamodule=data, verbose=False)
    figures = dict(trainer.callback_metrics)
    trainer.validate(task, datamodule=data, verbose=False)
    assert figures == trainer.callback_metrics
    task.eval()
    count = math.ceil(64 / (group_size or SIZE))
    borders = [64 * i // count for i in range(count + 1)]
    loss = right = asked = 0.0
    for start, stop in pairwise(borders):
        index = torch.arange(start, stop)
        batch = MicroBatch(data.x[index], data.y[index], index)
        first, second = task.embed(batch)
        loss += float(plain_sup_con(first, second, batch.targets, torch.zeros(())).sum())
        for one in range(len(index)):
            scores = F.cosine_similarity(first, first[one], dim=1)
            others = [i for i in range(len(index)) if i != one]
            if any(batch.targets[i] == batch.targets[one] for i in others):
                nearest = max(others, key=lambda i: float(scores[i]))
                right, asked = right + float(batch.targets[nearest] == batch.targets[one]), asked + 1
    assert abs(figures["val/loss"] - loss / 64) < 1e-6  # which the callbacks get in single precision
    assert abs(figures["val/top1"] - right / asked) < 1e-6


# Examples that do not count


class Holes(small.Points):
    """Some training examples cannot be read, some count half."""

    def load(self, split: str) -> Any:
        return Weighted(self.x, self.y) if split == "train" else super().load(split)


class Weighted(InMemory):
    def __init__(self, *fields: Tensor) -> None:
        super().__init__(fields)

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        for request in requests:
            for index in request.index.split_with_sizes(request.sizes):
                yield tuple(gather(field, index) for field in self.fields), weight(index)


def weight(index: Tensor) -> Tensor:
    return torch.where(index % 5 == 0, 0.0, torch.where(index % 3 == 0, 0.5, 1.0))


@pytest.mark.parametrize("micro_batch_size", [None, 4, 1])
@pytest.mark.slow
def test_an_example_without_weight_is_none(micro_batch_size: int | None) -> None:
    data = Holes(batch_size=SIZE, micro_batch_size=micro_batch_size)
    task = Contrastive(small.network(), SupCon(), optimizer=small.adamw)
    losses = Losses()
    small.fit(task, data, callbacks=[losses], max_epochs=2)
    network = small.network()
    optimizer = small.adamw(network.parameters())
    assert data.plan is not None
    expected = []
    for step in range(16):
        index = data.order.indices(step // 8, *data.plan.bounds(step))
        place.current = place.Place(mix(3, DRAWS, step), 0)
        rows = network(data.x[index])
        place.current = None
        there = weight(index) > 0
        rows, labels, weights = F.normalize(rows[there], dim=1), data.y[index][there], weight(index)[there].double()
        total, count = rows.sum() * 0, 0.0
        for anchor in range(len(rows)):
            others = [i for i in range(len(rows)) if i != anchor]
            positive = [i for i in others if labels[i] == labels[anchor]]
            if positive:
                scores = rows @ rows[anchor] / 0.1
                each = -torch.stack([scores[i] - scores[others].logsumexp(0) for i in positive]).mean()
                total, count = total + weights[anchor] * each, count + float(weights[anchor])
        optimizer.zero_grad()
        (total / max(count, 1e-300)).backward()
        optimizer.step()
        expected.append(float(total.detach()) / max(count, 1e-300))
    assert small.furthest(task.network, network) < 1e-12
    assert max(abs(a - b) for a, b in zip(losses.all, expected, strict=True)) < 1e-12


# What it works with


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def test_ghost_batch_norm_is_exact_and_its_statistics_move_once() -> None:
    tasks = []
    for size in (None, 4):
        data = small.Points(batch_size=16, micro_batch_size=size)
        task = Noisy(Normed().double(), InfoNCE(), optimizer=small.adamw, ghost_batch_size=4)
        tasks.append(small.fit(task, data)[0])
    assert small.furthest(*tasks) < 1e-12


@pytest.mark.filterwarnings("ignore:the network has batch norm")
def test_running_statistics_of_batch_norm_move_once_per_micro_batch() -> None:
    data = small.Points(batch_size=64, micro_batch_size=32)
    task = Contrastive(Normed().double(), SupCon(), optimizer=small.adamw)
    small.fit(task, data, max_epochs=1)
    linear, norm, *_ = (layer for layer in Normed().double().layers)
    index = data.order.indices(0, 0, 64)
    for part in index.split(32):
        norm(linear(data.x[part]))
    for ours, theirs in zip(task.network.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_clipping_growing_batches_and_a_whole_batch_agree() -> None:
    tasks = []
    for size in (None, 3):
        schedule = Milestones([16], shares=[0.5])
        data = small.Points(batch_size=8, micro_batch_size=size, batch_size_schedule=schedule)
        tasks.append(fit(Triplet(), None, data, gradient_clip_val=0.05)[0])
        assert data.plan is not None
        assert data.plan.changes
    assert small.furthest(*tasks) < 1e-12


def test_half_precision_is_near() -> None:
    tasks = []
    for size in (None, 3):
        data = small.Points(batch_size=16, micro_batch_size=size)
        data.x = data.x.float()
        task = Noisy(Net(), InfoNCE(), optimizer=sgd)
        tasks.append(small.fit(task, data, precision="bf16-mixed", max_steps=2)[0])
    assert 0 < small.furthest(*tasks) < 0.02 * small.furthest(tasks[0].network, Net())


def test_a_loss_of_ones_own_has_parameters_of_its_own() -> None:
    """A layer that only `pair_losses` uses."""

    class Own(Contrastive):
        def __init__(self, network: nn.Module, **kwargs: Any) -> None:
            super().__init__(network, **kwargs)
            torch.manual_seed(5)
            self.head = nn.Linear(3, 2, bias=False).double()

        def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Tensor:
            (rows,) = embeddings
            return (self.head(rows) - self.head(rows).mean(0)).square().sum(1) + self.head.weight.square().sum()

    tasks = []
    for size in (None, 3):
        task = Own(small.network(), optimizer=sgd)  # Adam divides the rounding of a zero gradient, of a bias, by 1e-8
        tasks.append(small.fit(task, small.Points(micro_batch_size=size))[0])
    assert small.furthest(*tasks) < 1e-12
    torch.manual_seed(5)
    assert small.furthest(tasks[0].head, nn.Linear(3, 2, bias=False).double()) > 0.1


def test_a_transform_may_work_in_place() -> None:
    class InPlace(small.Points):
        def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
            batch.inputs.mul_(2)
            return batch

    tasks = [
        small.fit(Contrastive(small.network(), SupCon(), optimizer=sgd), InPlace(micro_batch_size=size))[0]
        for size in (None, 3)
    ]
    assert small.furthest(*tasks) < 1e-12


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_loss_that_does_not_fit_at_all_says_so(micro_batch_size: int | None) -> None:
    class Huge(Contrastive):
        def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Tensor:
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embeddings[0].sum(1)

    with pytest.raises(TrainingStopped, match="the loss over 10 examples at once does not fit, whatever the micro-"):
        small.fit(Huge(small.network()), small.Points(micro_batch_size=micro_batch_size))


def test_embeddings_are_predicted() -> None:
    task = Noisy(Net().double(), InfoNCE(), optimizer=small.adamw)
    (batch,) = small.trainer().predict(task, datamodule=small.Points())  # type: ignore[misc]
    assert {name: list(values.shape) for name, values in batch["predictions"].items()} == {  # type: ignore[index]
        "embedding0": [64, 4],
        "embedding1": [64, 4],
    }


# What is refused


def refused(task: Contrastive, data: DataModule | None = None, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the test looks at the words)
        small.fit(task, data, **settings)
    return str(caught.value)


class WithNames(small.Points):
    def load(self, split: str) -> Any:
        return self.x, {"names": ["a"] * len(self.x)}


def test_what_cannot_be_is_refused_in_one_line() -> None:
    noisy = Noisy(Net().double(), InfoNCE())
    said = refused(noisy, callbacks=[NoiseScale()])
    assert said.startswith("trainer.callbacks has NoiseScale, but the loss of Noisy couples")
    said = refused(Contrastive(small.network(), InfoNCE()))
    assert said.startswith("InfoNCE compares 2 embeddings of each example, but Contrastive.embed gives 1")
    data = small.Points()
    data.y = data.y.double()
    assert "SupCon goes by class, but the targets are torch.float64 [6]" in refused(noisy_with(SupCon()), data)
    assert refused(noisy_with(InfoNCE()), WithNames()) == (
        "targets['names'] is a list, but the examples of a batch are compared over all devices by tensors: write a "
        "tensor, or leave it out in transform"
    )
    given: Any = type("Named", (Contrastive,), {"embed": lambda self, batch: {"image": self(batch.inputs)}})
    assert "Named.embed gave a dict for 2 examples: return one" in refused(given(small.network(), InfoNCE()))
    with pytest.raises(ValueError, match=r"model.loss is not set"):
        Contrastive(small.network())
    with pytest.raises(TypeError, match=r"Wrong.losses sees one micro-batch: write embed, and pair_losses"):
        type("Wrong", (Contrastive,), {"losses": lambda self, batch: batch})


def noisy_with(loss: CoupledLoss) -> Noisy:
    return Noisy(Net().double(), loss)


def test_a_loss_that_evaluation_cannot_have_is_not_measured() -> None:
    """Training has two views, evaluation has one."""

    class Twice(small.Points):
        def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
            if training:
                batch.inputs = (batch.inputs, batch.inputs + 0.3 * batch.randn("noise", 5))
            return batch

    task = Contrastive(small.network(), SupCon(supervised=False), optimizer=small.adamw)
    _, trainer = small.fit(task, Twice())
    assert "val/loss" not in trainer.callback_metrics
    assert "val/loss" not in task.metric_names()
    assert float(trainer.callback_metrics["val/top1"]) > 0.4


# Views of images


def test_views_are_drawn_for_each_example_and_not_for_micro_batches() -> None:
    tasks = []
    for size in (None, 30):
        views = Views([Affine(degrees=15, scale=(0.8, 1.2)), ShiftCrop(1)], count=3)
        data = Digits(classes=[3, 8], batch_size=100, micro_batch_size=size, augment=[views], seed=1)
        torch.manual_seed(1)
        task = Contrastive(ConvNet(num_classes=4, channels=[4]).double(), SupCon(supervised=False), optimizer=sgd)
        tasks.append(small.fit(task, data, max_epochs=1)[0])
        first = data.to_device(data.examples("train", 5), torch.device("cpu"), training=True).inputs
        later = data.to_device(data.examples("train", 9), torch.device("cpu"), training=True).inputs
        assert len(first) == 3
        assert all(torch.equal(few, many[:5]) for few, many in zip(first, later, strict=True))
        assert not any(torch.equal(first[0][one], first[1][one]) for one in range(5))
    assert small.furthest(*tasks) < 1e-12


class WithMasks(Digits):
    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        return replace(super().transform(batch, training), targets=batch.inputs[:, 0])


def test_views_of_what_is_no_image_or_of_mixtures_are_refused() -> None:
    data = small.Points(augment=[Views([ShiftCrop(1)])])
    assert refused(Contrastive(small.network(), SupCon()), data) == (
        "ShiftCrop takes images [N, C, H, W], but the inputs are [4, 5]"
    )
    masks = WithMasks(classes=[3, 8], batch_size=100, augment=[Views([ShiftCrop(1)])])
    assert refused(Contrastive(ConvNet(num_classes=4, channels=[4]).double(), SupCon(supervised=False)), masks) == (
        "Views moves each view in its own way, but targets [4, 8, 8] has places: leave it out"
    )
    with pytest.raises(ValueError, match=r"Views.steps has MixUp, which mixes examples: leave it out"):
        Views([MixUp()])


# On the command line


@pytest.mark.weekly
def test_tune_and_the_noise_scale_say_that_there_is_none(
    command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_TURN", 0.001)  # seconds
    tuned = run_here("tune", *command[1:])
    assert tuned.code == 0, tuned.err
    assert "no batch size is recommended (the loss couples the examples of a batch, " in tuned.out
    assert f"learning rate at batch_size {SIZE}: " in tuned.out
    overlay = tuned.folder / "tuned.yaml"  # of the rate alone, if the gain is 5%
    assert overlay.exists() is ("leave it as it is" not in tuned.out)
    if overlay.exists():
        assert set(yaml.safe_load(overlay.read_text())) == {"model"}
    noise = ("--trainer.callbacks", "batchwise.callbacks.noise_scale.NoiseScale")
    result = run_here(*command, *noise)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith(
        "error: trainer.callbacks has NoiseScale, but the loss of Logging couples the examples"
    )
