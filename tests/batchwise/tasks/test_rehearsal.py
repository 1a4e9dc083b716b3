"""The losses of a few examples are computed before training: planted faults are named, right tasks are left alone."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import shapes
import torch
import torch.nn.functional as F
from small import Classify, Points, adamw, fit, furthest, network, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchwise import DataModule, MicroBatch, Task
from batchwise.batching.ragged import Ragged


def torch_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return F.dropout(self.layer(inputs), 0.3, self.training)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(5, 3).double(), 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs) * (1 + self.state)
        self.state = float(outputs.detach().mean())
        return outputs


def numpy_noise(task: Task, batch: MicroBatch) -> Tensor:
    return each(task, batch) * np.random.uniform()


def made(losses: Callable[[Task, MicroBatch], Any], net: Callable[[], nn.Module] = network, **settings: Any) -> Task:
    """A task with these losses."""
    return type("Own", (Classify,), {"losses": losses})(net(), optimizer=adamw, **settings)


def each(task: Task, batch: MicroBatch) -> Tensor:
    return F.cross_entropy(task(batch.inputs), batch.targets, reduction="none")


def coupled(task: Task, batch: MicroBatch) -> Tensor:
    embedded = F.normalize(task(batch.inputs), dim=1)
    return F.cross_entropy(embedded @ embedded.T, torch.arange(len(batch)), reduction="none")


def broadcast(task: Task, batch: MicroBatch) -> Tensor:
    return (task(batch.inputs)[:, 0] - batch.targets.unsqueeze(1)).square()


def tokens(count: int) -> Callable[[Task, MicroBatch], Tensor]:
    return lambda task, batch: each(task, batch).unsqueeze(1).expand(-1, count)


def noisy(task: Task, batch: MicroBatch) -> Tensor:
    return F.cross_entropy(task(batch.inputs + torch.randn_like(batch.inputs)), batch.targets, reduction="none")


def unpacked(task: Task, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(task(inputs), targets, reduction="none")


def harder_than_the_mean(task: Task, batch: MicroBatch) -> Tensor:
    losses = each(task, batch)
    return losses * (losses > losses.mean())


def of_the_easier_nine_tenths(task: Task, batch: MicroBatch) -> Tensor:
    losses = each(task, batch)
    return losses * (losses < losses.quantile(0.9))


WRITE = r"write batch\.inputs and batch\.targets \(test_rehearsal\.py, line \d+\)$"
FAULTS = {
    "a tuple": (unpacked, network, r"Own\.losses fails on a few examples: cannot unpack .*" + WRITE),
    "a dict": (lambda task, batch: batch["label"], network, "object is not subscriptable: " + WRITE),
    "another shape": (
        lambda task, batch: F.binary_cross_entropy(task(batch.inputs).sigmoid(), batch.targets.double()),
        network,
        r"Own\.losses fails on a few examples: Using a target size .*test_rehearsal\.py, line \d+\)$",
    ),
    "coupled": (coupled, network, "another loss when other examples are in its micro-batch"),
    "the hardest": (harder_than_the_mean, network, "another loss when other examples are in its micro-batch"),
    "the easiest": (of_the_easier_nine_tenths, network, "another loss when other examples are in its micro-batch"),
    "pairs": (broadcast, network, r"Own\.losses gives losses \[N, N\] .* outputs \[N\] meet targets \[N, 1\]"),
    "a mean": (lambda task, batch: each(task, batch).mean(), network, r"the shape \[\] for 12 examples"),
    "a mean of one": (lambda task, batch: each(task, batch).mean()[None], network, r"the shape \[1\] for 12 examples"),
    "nothing": (lambda task, batch: None, network, "a NoneType for 12 examples"),
    "classes first": (lambda task, batch: task(batch.inputs).T, network, r"the shape \[3, 12\] for 12 examples"),
    "wrong targets": (
        lambda task, batch: F.cross_entropy(task(batch.inputs), batch.targets + 7, reduction="none"),
        network,
        r"losses fails on a few examples: Target . is out of bounds.*test_rehearsal.py, line \d+",
    ),
}
RANDOM = {
    "nn.Dropout": (each, torch_network, "layers such as network.1 draw.*model.exact_dropout true"),
    "F.dropout": (each, Functional, r"losses, or the network, draws.*batch\.rand"),
    "randn_like": (noisy, network, r"losses, or the network, draws.*batch\.rand"),
    "a state": (
        each,
        Recurrent,
        r"^Own\.losses, or the network, keeps something between micro-batches, such as the stat",
    ),
    "a generator of NumPy": (
        numpy_noise,
        network,
        r"keeps something between .* or a generator of its own.*batch\.rand",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    losses, net, message = FAULTS[fault]
    task = made(losses, net)
    with pytest.raises(ValueError, match=message):
        fit(task, Points(micro_batch_size=5))


def test_pairs_in_whole_batches_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"Own\.losses gives losses \[N, N\] .*write squeeze\(1\)"):
        fit(made(broadcast), Points(), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* one for each pair")
        for count in (6, 12):  # as many losses as there are examples tried, by chance
            fit(made(tokens(count)), Points(), max_steps=1)
            fit(made(tokens(count)), Points(micro_batch_size=5), max_steps=1)


@pytest.mark.parametrize("fault", RANDOM)
def test_random_numbers_without_a_key_are_named(fault: str) -> None:
    losses, net, message = RANDOM[fault]
    with pytest.warns(UserWarning, match=message):
        fit(made(losses, net), Points(), max_steps=1)


class Noisy(Points):
    """A transform that draws from PyTorch's generator, which in training is seeded for each micro-batch."""

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        return replace(batch, inputs=batch.inputs + torch.randn_like(batch.inputs))


def test_random_numbers_of_a_transform_are_named() -> None:
    with pytest.warns(UserWarning, match=r"draws random numbers .*batch\.randn, also in transform"):
        fit(made(each), Noisy(), max_steps=1)


def test_a_whole_batch_on_one_device_may_couple() -> None:
    fit(made(coupled), Points(), max_steps=1)


@pytest.mark.parametrize(
    "losses",
    [
        each,
        lambda task, batch: (each(task, batch), torch.ones(len(batch))),
        lambda task, batch: task(batch.inputs + batch.randn("noise", 5)).square(),
    ],
)
def test_right_tasks_are_left_alone(losses: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "losses|layers")
        fit(made(losses), Points(micro_batch_size=4), max_steps=1)


class Sentences(Points):
    """Sequences of unequal length with a label each; sorted by length, so that the first ones are equally long."""

    def load(self, split: str) -> Any:
        lengths = torch.arange(64).div(8, rounding_mode="floor") + 1
        values = torch.randn(int(lengths.sum()), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return Ragged(values, F.pad(lengths.cumsum(0), (1, 0)), self.y)


class Collated(Points):
    """The same as a map-style data set, padded by a `collate`."""

    def load(self, split: str) -> Any:
        values, offsets = torch.ones(288, 5, dtype=torch.float64), [4 * n * (n + 1) for n in range(9)]
        starts = [offsets[n // 8] + n % 8 * (n // 8 + 1) for n in range(64)]
        return [(values[start : start + n // 8 + 1], self.y[n]) for n, start in enumerate(starts)]

    def collate(self, examples: list) -> Any:
        sequences, labels = zip(*examples, strict=True)
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True), torch.stack(labels)


class Pooled(nn.Module):
    """A mean over all places, or over those that hold something."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks, self.layer = masks, nn.Linear(5, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.masks:
            return self.layer(inputs).mean(1)
        there = (inputs != 0).any(2, keepdim=True)
        return (self.layer(inputs) * there).sum(1) / there.sum(1)


@pytest.mark.parametrize("data", [Sentences, Collated])
def test_padding_that_changes_a_loss_is_named(data: type[Points]) -> None:
    with pytest.raises(ValueError, match=r"another loss when other examples are in its micro-batch.*mask the padding"):
        fit(made(each, lambda: Pooled(False)), data(micro_batch_size=4))
    fit(made(each, lambda: Pooled(True)), data(micro_batch_size=4), max_steps=1)
    fit(made(each, lambda: Pooled(False)), data(), max_steps=1)  # whole batches


def test_a_transform_may_work_in_place() -> None:
    class Halved(Points):
        def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
            batch.inputs.mul_(0.5)
            return batch

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "losses|layers")
        fit(made(each), Halved(micro_batch_size=4), max_steps=1)


SHAPES: dict[type[DataModule], Callable[[], nn.Module]] = {
    shapes.Dicts: shapes.Images,
    shapes.Tuples: shapes.Images,
    shapes.Lists: shapes.Images,
    shapes.Collated: shapes.Images,
    shapes.Series: shapes.Lengths,
}


class Logs(shapes.Both):
    """Logs the loss of each example."""

    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        self.log("each", losses, on_step=self.training, on_epoch=True)
        self.log("examples", len(batch), reduce_fx="sum", on_step=False, on_epoch=True)
        return losses


class Coupled(shapes.Both):
    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        return losses - losses.mean()


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.slow
def test_data_of_any_shape_is_rehearsed_and_logged(data: type[DataModule]) -> None:
    ways = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "losses|layers")
        for size in (None, 7, 1):
            torch.manual_seed(1)
            task = Logs(SHAPES[data](), optimizer=adamw)
            _, made = fit(task, data(batch_size=20, micro_batch_size=size), max_epochs=2)
            assert task._measures.rehearsed
            ways.append((task, {name: float(value) for name, value in made.callback_metrics.items()}))
    whole, logged = ways[0]
    assert logged["examples"] == shapes.EXAMPLES
    assert logged["each_epoch"] == pytest.approx(logged["train/loss_epoch"], abs=1e-12)
    for task, others in ways[1:]:
        assert furthest(whole, task) < 1e-12
        assert others == pytest.approx(logged, abs=1e-12)
    with pytest.raises(ValueError, match="another loss when other examples are in its micro-batch"):
        fit(Coupled(SHAPES[data](), optimizer=adamw), data(batch_size=20, micro_batch_size=7))


def test_it_changes_nothing() -> None:
    """The same training with and without it, with batch norm and a generator of the user's."""

    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()

    class Waits(Classify):
        def losses(self, batch: MicroBatch) -> Tensor:
            if self._own_data is not None and waits:
                raise AttributeError
            return super().losses(batch)

    waits = False
    first, _ = fit(Waits(net(), optimizer=adamw))
    waits = True
    second, _ = fit(Waits(net(), optimizer=adamw))
    assert furthest(first, second) == 0


def test_a_parameter_without_a_gradient_is_named_before_processes_wait_for_it() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    def prepare(strategy: str) -> None:
        data = Points()
        data.attach(trainer(strategy=strategy, devices=1), 1)
        data.setup("fit")
        made(each, Spare).prepare(data, "train")

    prepare("auto")
    prepare("ddp_find_unused_parameters_true")
    with pytest.raises(ValueError, match=r"2 parameter\(s\) had no gradient.*network\.spare\.weight.*find_unused"):
        prepare("ddp")


def test_exact_dropout() -> None:
    whole = fit(made(each, torch_network, exact_dropout=True))[0]
    parts = fit(made(each, torch_network, exact_dropout=True), Points(micro_batch_size=3))[0]
    assert furthest(whole, parts) < 1e-12
    assert furthest(whole, fit(made(each, torch_network))[0]) > 1e-3
    with pytest.raises(ValueError, match="exact_dropout is true, but the network has no dropout layer"):
        made(each, lambda: nn.Linear(5, 3), exact_dropout=True)


def test_a_dropout_layer_with_two_names_is_exact() -> None:
    layer = nn.Dropout(0.3)
    tasks = []
    for size in (None, 3):
        net = nn.Sequential(nn.Linear(5, 8), layer, nn.Tanh(), layer, nn.Linear(8, 3)).double()
        net.load_state_dict({name: torch.full_like(value, 0.1) for name, value in net.state_dict().items()})
        tasks.append(fit(made(each, lambda net=net: net, exact_dropout=True), Points(micro_batch_size=size))[0])
    assert furthest(*tasks) < 1e-12


def test_layers_that_cannot_be_exact_are_not_told_to_be() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.AlphaDropout(0.3), nn.Linear(8, 3)).double()
    with pytest.warns(match=r"^losses, or the network, draws random numbers.*batchwise\.models\.dropout\.Dropout$"):
        fit(made(each, lambda: net), max_steps=1)


def test_channels_are_dropped_whole() -> None:
    layer = nn.Sequential(nn.Dropout2d(0.5))
    from batchwise.models.dropout import convert_dropout

    assert convert_dropout(layer) == 1
    torch.manual_seed(0)
    dropped = layer(torch.ones(64, 8, 3, 3))
    assert set(dropped.flatten(2).unique(dim=2).shape[2:]) <= {1, 2}
    per_channel = dropped.flatten(2)
    assert (per_channel == per_channel[..., :1]).all()
    assert 0.4 < (per_channel[..., 0] == 2).float().mean() < 0.6


def test_it_costs_five_passes_of_a_few_examples() -> None:
    """Counted, not timed: examples that go through the network."""
    seen = []

    def counting(task: Task, batch: MicroBatch) -> Tensor:
        seen.append(len(batch) if task._own_data is not None else 0)
        return each(task, batch)

    fit(made(counting), Points(micro_batch_size=5), max_steps=1)
    # With two more of each class: whole, whole again, in parts. Without: with a gradient, in evaluation.
    assert sum(seen) == 3 * 12 + 2 * 6


class Attention(nn.Module):
    """Dropout within a function, in layers whose effect on a loss is small at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()
        nn.init.normal_(self.layer.weight, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.layer(inputs).view(-1, 1, 4, 2)
        mixed = F.scaled_dot_product_attention(values, values, values, dropout_p=0.1 if self.training else 0.0)
        return self.head(1e-3 * mixed.flatten(1))


def test_small_random_effects_are_named() -> None:
    with pytest.warns(UserWarning, match="draws random numbers that depend"):
        fit(made(each, Attention), Points(), max_steps=1)


def learnt_weights(task: Task, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    logits = task(batch.inputs)
    return F.cross_entropy(logits, batch.targets, reduction="none"), logits[:, 0].sigmoid()


def test_weights_that_learn_are_refused() -> None:
    """Their sum, by which the sum of losses is divided, would have a gradient too."""
    with pytest.raises(ValueError, match=r"^Own\.losses gives weights that have a gradient.*weights\.detach\(\)"):
        fit(made(learnt_weights))
    fit(
        made(lambda task, batch: tuple(one.detach() if n else one for n, one in enumerate(learnt_weights(task, batch))))
    )


@pytest.mark.parametrize(
    "losses",
    [lambda task, batch: each(task, batch).detach(), lambda task, batch: task(batch.inputs).argmax(1) - batch.targets],
)
def test_losses_without_a_gradient_are_refused(losses: Any) -> None:
    with pytest.raises(ValueError, match=r"^Own\.losses gives losses without a gradient"):
        fit(made(losses))


def test_a_gradient_that_is_not_a_number_is_named() -> None:
    """A weight of zero leaves a loss out, but 0 times the gradient of NaN is NaN."""

    def losses(task: Task, batch: MicroBatch, fill: bool) -> tuple[Tensor, Tensor]:
        missing = batch.index == 1
        targets = torch.where(missing, torch.nan, batch.targets.double())
        error = task(batch.inputs)[:, 0] - (targets.nan_to_num() if fill else targets)
        return error.square(), (~missing).double()

    with pytest.warns(UserWarning, match=r"gradient of a few examples is not a number.*nan_to_num"):
        fit(made(lambda task, batch: losses(task, batch, False)), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the gradient")
        fit(made(lambda task, batch: losses(task, batch, True)), max_steps=1)


class Running(nn.Module):
    """Keeps a running mean of its inputs, and uses it or not."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.layer, self.uses = nn.Linear(5, 3).double(), uses
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(inputs.mean(0), 0.1)
        return self.layer(inputs - self.mean if self.uses else inputs)


@pytest.mark.parametrize("net", [lambda: Running(False), lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), Instance())])
def test_a_buffer_that_depends_on_the_micro_batches_is_named(net: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match=r"the buffer network\.\S*mean is updated in each forward pass"):
        fit(made(each, net), Points(micro_batch_size=5), max_steps=1)


class Instance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True).double()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.norm(inputs).flatten(1))


def test_a_spectral_norm_that_hardly_moves_at_first_is_named() -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        layer = nn.Linear(5, 3).double()
        with torch.no_grad():
            layer.weight.copy_(torch.eye(3, 5) * torch.tensor([1.0, 0.5, 0.25])[:, None])
        return nn.utils.parametrizations.spectral_norm(layer)

    with pytest.warns(UserWarning, match=r"the buffer network\.\S*_u is updated in each forward pass"):
        fit(made(each, net), Points(micro_batch_size=5), max_steps=1)


class Total(nn.Module):
    """Adds up its inputs, as a mean over all examples needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("total", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        self.total += inputs.detach().sum(0).float()
        return self.layer(inputs)


def test_sums_that_differ_by_rounding_alone_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the buffer")
        fit(made(each, Total), Points(micro_batch_size=5), max_steps=1)


@pytest.mark.parametrize("size", [None, 5])
def test_a_loss_that_reads_a_running_mean_draws_no_random_numbers(size: int | None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "losses, or the network, draws")
        fit(made(each, lambda: Running(True)), Points(), max_steps=1)
    if size:
        line = "the buffer network.mean is updated in each forward pass, so it, and with it the losses, depends on how"
        with pytest.raises(ValueError, match=line):
            fit(made(each, lambda: Running(True)), Points(micro_batch_size=size), max_steps=1)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_weights_that_cannot_be_are_named(weight: float) -> None:
    def losses(task: Task, batch: MicroBatch) -> Any:
        return each(task, batch), torch.full_like(batch.inputs[:, 0], weight)

    if weight < 0:
        with pytest.raises(ValueError, match="weights below 0, but the sum of losses is divided by the sum of weights"):
            fit(made(losses), max_steps=1)
    else:
        with pytest.warns(UserWarning, match="no target of this epoch had a weight above 0"):
            fit(made(losses), max_epochs=1)


def test_an_embedding_that_gets_the_padding_is_told_so() -> None:
    class Sequences(Points):
        def load(self, split: str) -> Any:
            lengths = torch.arange(64) % 4 + 1
            return Ragged(torch.arange(int(lengths.sum())) % 5, torch.cat([torch.zeros(1), lengths.cumsum(0)]), self.y)

    task = made(each, lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.LazyLinear(3)))
    with pytest.raises(
        ValueError, match="an embedding got a number that it does not have; the padding of sequences is -1"
    ):
        fit(task, Sequences(), max_steps=1)


class Rare(Points):
    """With a class that neither end of the examples has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.y = torch.zeros(len(self.x), dtype=torch.int64)
        self.y[[20, 30, 33, 50]] = 2


@pytest.mark.parametrize("weighs", [False, True])
def test_a_loss_divided_by_the_number_of_a_rare_class_is_refused(weighs: bool) -> None:
    def losses(task: Task, batch: MicroBatch) -> Any:
        each = nn.functional.cross_entropy(task(batch.inputs), batch.targets, reduction="none")
        positive = (batch.targets == 2).double()
        return (each, positive) if weighs else each * positive / positive.sum().clamp(min=1) + 0.1 * each

    if weighs:
        fit(made(losses), Rare(micro_batch_size=4), max_steps=1)
        return
    with pytest.raises(ValueError, match="return weights in place of dividing by their sum"):
        fit(made(losses), Rare(micro_batch_size=4), max_steps=1)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 3, sparse=True).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.table((inputs[:, 0] > 0).long())


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, inputs: Tensor) -> Any:
        return checkpoint(self.last, self.first(inputs), use_reentrant=True)


class InPlace(Recomputed):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).exp()
        return self.last(hidden.mul_(2))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Sparse, r"^network\.table\.weight has a sparse gradient, and here they are dense: write sparse=False$"),
        (Recomputed, r"^the backward pass of Own\.losses fails on .*: .*you can either set use_reentrant=False"),
        (InPlace, r"^the backward pass of Own\.losses fails on a few examples: .*modified by an inplace operation"),
    ],
)
def test_a_backward_pass_that_cannot_be_is_named(net: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        fit(made(each, net), Points())
    assert "\n" not in str(raised.value)


class Normed(Classify):
    """The batch norm is not in the network."""

    def __init__(self) -> None:
        super().__init__(network(), optimizer=adamw)
        self.norm = nn.BatchNorm1d(5).double()

    def losses(self, batch: MicroBatch) -> Tensor:
        return F.cross_entropy(self(self.norm(batch.inputs)), batch.targets, reduction="none")


def test_a_batch_norm_outside_the_network_is_one() -> None:
    with pytest.warns(UserWarning, match=r"the task has batch norm: its .*; write batchwise\.models\.norm\.Ghost"):
        fit(Normed(), Points(micro_batch_size=4), max_steps=1)


def test_a_batch_norm_in_evaluation_mode_depends_on_nothing() -> None:
    task = Normed()
    task.network = nn.Sequential(nn.BatchNorm1d(5), network()).double()
    task.norm.eval()
    task.network[0].eval()  # pyright: ignore[reportIndexIssue]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*batch norm")
        fit(task, Points(micro_batch_size=4), max_steps=1)


class Head(Classify):
    """The task has a batch norm, beside those of the network."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = nn.BatchNorm1d(3).double()

    def losses(self, batch: MicroBatch) -> Tensor:
        return F.cross_entropy(self.head(self(batch.inputs)), batch.targets, reduction="none")


def test_a_batch_norm_of_the_task_over_one_example_is_named() -> None:
    message = "^the task has batch norm, and a micro-batch has one example, .*: write data.drop_last true, or a larger"
    with pytest.raises(ValueError, match=message):
        fit(Head(network(), optimizer=adamw), Points(batch_size=9))  # the last batch has one example
    task = Head(network(), optimizer=adamw)
    before = task.head.state_dict()["num_batches_tracked"].clone()
    with pytest.raises(ValueError, match="one example"):
        fit(task, Points(micro_batch_size=1))
    assert task.head.training
    assert task.head.num_batches_tracked == before
    fit(Head(network(), optimizer=adamw), Points(batch_size=9, drop_last=True), max_steps=1)


@pytest.mark.parametrize("terms", [False, True])
def test_a_loss_may_take_a_gradient_of_its_own(terms: bool) -> None:
    """A gradient penalty, written as for a plain loop. As a term with weights, it is also counted before training."""

    def penalised(task: Task, batch: MicroBatch) -> Any:
        if not task.training:
            return {"error": each(task, batch), "penalty": each(task, batch)} if terms else each(task, batch)
        points = batch.inputs.detach().requires_grad_()
        logits = task(points)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        (slopes,) = torch.autograd.grad(logits.logsumexp(1).sum(), points, create_graph=True)
        penalty = slopes.square().sum(1)
        return {"error": losses, "penalty": (penalty, (batch.targets > 0).to(penalty))} if terms else losses + penalty

    whole, cut = (fit(made(penalised), Points(micro_batch_size=size), max_steps=4)[0] for size in (None, 3))
    assert furthest(whole, cut) < 1e-12
