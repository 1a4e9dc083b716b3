import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from batchwise.batching import sampling
from batchwise.batching.order import Order, Shuffled
from batchwise.batching.sampling import Balanced, Bucketed, Stratified, Weighted

LONG_TAIL = torch.arange(10).repeat_interleave((2000 * 0.5 ** torch.arange(1.0, 11)).round().long())


def epoch_of(order: Order, epoch: int = 0) -> Tensor:
    return order.indices(epoch, 0, len(order))


def counts_per_batch(labels: Tensor, batch_size: int) -> Tensor:
    """Class counts of each batch, the short one included, [batches, classes]."""
    return torch.stack([one_hot(batch, int(labels.max()) + 1).sum(0) for batch in labels.split(batch_size)])


def name(order: Order) -> str:
    return type(order).__name__


@pytest.mark.parametrize("order", [Stratified(), Balanced()], ids=name)
def test_labels_are_asked_for(order):
    with pytest.raises(ValueError, match=f"{name(order)} looks at classes: give labels"):
        order.prepare(10, 2, 0)


@pytest.mark.parametrize("given", [[0, 1] * 5, np.arange(10) % 2], ids=["list", "array"])
def test_what_is_no_tensor_is_refused(given):
    line = rf"are of type {type(given).__name__}: give a tensor of integers, torch.as_tensor\("
    for arguments in ({"labels": given}, {"lengths": given}, {"shards": given}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} {line}"):
            Balanced().prepare(10, 2, 0, **arguments)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=200, deadline=None)
def test_stratified_is_less_than_one_off_in_every_batch(counts, batch_size, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    drawn = epoch_of(Stratified().prepare(len(labels), batch_size, seed, labels))
    assert torch.equal(drawn.sort().values, torch.arange(len(labels)))
    per_batch = counts_per_batch(labels[drawn], batch_size)
    # In whole numbers: |count - size * n / N| < 1, also the smallest excess is seen.
    off = per_batch * len(labels) - per_batch.sum(1, keepdim=True) * torch.tensor(counts)
    assert off.abs().max() < len(labels)


def test_stratified_batches_look_like_the_data():
    def distance(order: Order) -> float:
        drawn = epoch_of(order.prepare(len(LONG_TAIL), 64, 0, LONG_TAIL))
        batches = counts_per_batch(LONG_TAIL[drawn], 64)[:-1]
        return float((batches / 64 - LONG_TAIL.bincount() / len(LONG_TAIL)).abs().sum(1).mean() / 2)

    # The least for counts that are whole numbers of mean 64 p: sum f (1 - f) / 64, f the fractional part.
    fraction = 64 * LONG_TAIL.bincount() / len(LONG_TAIL) % 1
    assert distance(Stratified()) == pytest.approx(float((fraction * (1 - fraction)).sum()) / 64, abs=0.001)
    assert distance(Stratified()) < 0.03
    assert distance(Shuffled()) > 0.08


def test_stratified_spreads_a_class_over_the_epoch():
    drawn = epoch_of(Stratified().prepare(len(LONG_TAIL), 64, 0, LONG_TAIL))
    total = counts_per_batch(LONG_TAIL[drawn], 64).cumsum(0)
    ideal = total.sum(1, keepdim=True) * LONG_TAIL.bincount() / len(LONG_TAIL)
    assert (total - ideal).abs().max() < 2.5  # a plain shuffle: about 20


def test_stratified_gives_every_example_every_place():
    labels = torch.tensor([0] * 9 + [1] * 4)
    places = torch.zeros(13, 13)
    order = Stratified().prepare(13, 5, 0, labels)
    for epoch in range(1300):
        places[torch.arange(13), epoch_of(order, epoch)] += 1
    assert (places - 100).abs().max() < 45  # 4.5 std of 9.6
    assert places.sum(1).tolist() == [1300] * 13


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_balanced_counts_differ_by_at_most_one(counts, batch_size, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    drawn = epoch_of(Balanced().prepare(len(labels), batch_size, seed, labels))
    assert len(drawn) == len(labels)
    per_batch = counts_per_batch(labels[drawn], batch_size)
    spread = one_hot(labels[drawn], len(counts)).sum(0)
    assert (per_batch.amax(1) - per_batch.amin(1)).max() <= 1
    assert spread.max() - spread.min() <= 1
    # Within a class every example comes once before any comes twice: no two differ by more than one.
    times = drawn.bincount(minlength=len(labels))
    for label in range(len(counts)):
        assert times[labels == label].max() - times[labels == label].min() <= 1


def test_balanced_repeats_a_class_in_a_new_order():
    labels = torch.tensor([0] * 12 + [1] * 4)
    order = Balanced().prepare(16, 1, 0, labels)  # batches of one: what is drawn is in order
    passes = [[i for i in epoch_of(order, e).tolist() if i >= 12] for e in range(5)]
    passes = [part for drawn in passes for part in (drawn[:4], drawn[4:])]
    assert all(sorted(part) == [12, 13, 14, 15] for part in passes)
    assert len({tuple(part) for part in passes}) > 6
    frequent = [frozenset(i for i in epoch_of(order, e).tolist() if i < 12) for e in range(5)]
    assert len(set(frequent)) == 5


@pytest.mark.parametrize("order", [Stratified(), Balanced()], ids=name)
def test_places_in_a_batch_do_not_go_by_class(order):
    labels = torch.arange(4).repeat_interleave(4096)
    order.prepare(len(labels), 16, 0, labels)
    by_place = one_hot(labels[epoch_of(order)].view(-1, 16), 4).double().mean(0)  # [16 places, 4 classes]
    assert (by_place - 0.25).abs().max() < 0.06  # 4.4 std of 0.0135


@pytest.mark.parametrize(
    ("weights", "probability"),
    [([3.0, 0.0, 1.0, 0.0, 4.0, 0.0], [0.375, 0, 0.125, 0, 0.5, 0]), ([1.0, 2.0], [1 / 9, 1 / 9, 1 / 9] + [2 / 9] * 3)],
    ids=["per example", "per class"],
)
@pytest.mark.slow
def test_weighted_draws_in_proportion(weights, probability):
    order = Weighted(weights).prepare(6, 4, 0, torch.tensor([0, 0, 0, 1, 1, 1]))
    drawn = torch.cat([epoch_of(order, epoch) for epoch in range(5000)])
    expected = torch.tensor(probability, dtype=torch.float64)
    share = drawn.bincount(minlength=6) / len(drawn)
    assert share[expected == 0].sum() == 0
    assert (share - expected).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5


@pytest.mark.parametrize(("u", "example"), [(0.0, 1), (0.25, 3), (1 - 2.0**-53, 3)])
def test_weighted_never_draws_an_example_of_weight_zero(u, example, monkeypatch):
    # Not even where the uniform number falls exactly between two examples, or is the largest there is.
    monkeypatch.setattr(sampling, "uniform", lambda key, counters: torch.full(counters.shape, u, dtype=torch.float64))
    order = Weighted([0.0, 1.0, 0.0, 3.0, 0.0]).prepare(5, 1, 0)
    assert order.indices(0, 0, 2).tolist() == [example, example]


def test_weighted_refuses_what_does_not_fit():
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite, not negative, and not all zero"):
            Weighted(weights)
    with pytest.raises(ValueError, match=r"^data.order.weights has \[0, 0\]: .*write numbers from 0"):
        Weighted([0, 0])
    with pytest.raises(ValueError, match=r"^data.order.weights has \[-1.0\]: "):
        Weighted([1.0, -1.0])
    with pytest.raises(ValueError, match=r"^3 weights: give 6, one per example$"):
        Weighted([1.0] * 3).prepare(6, 2, 0)
    with pytest.raises(ValueError, match="3 weights: give 6, one per example, or 2, one per class"):
        Weighted([1.0] * 3).prepare(6, 2, 0, torch.tensor([0, 0, 0, 1, 1, 1]))


def test_bucketed_batches_have_sequences_of_like_length():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0))
    orders = [order.prepare(1000, 16, 0, None, lengths) for order in (Shuffled(), Bucketed(256))]
    drawn = [lengths[epoch_of(order)] for order in orders]
    spreads = [
        float((batches.amax(1) - batches.amin(1)).double().mean()) for batches in (x[:992].view(-1, 16) for x in drawn)
    ]
    assert spreads[1] < 0.15 * spreads[0]
    # Long and short ones come in turn, and the short last batch is of all lengths.
    means = drawn[1][:992].view(-1, 16).double().mean(1)
    assert abs(float(torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1])) < 0.3
    assert float(drawn[1][992:].max() - drawn[1][992:].min()) > 200
    for window in drawn[1][:768].split(256):
        batches = window.view(-1, 16)
        batches = batches[batches[:, 0].argsort()]
        assert bool((batches[1:, 0] >= batches[:-1, -1]).all())  # neighbours by length


def test_bucketed_asks_for_lengths():
    with pytest.raises(ValueError, match="Bucketed looks at the lengths of sequences"):
        Bucketed().prepare(5, 2, 0)
