import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from batchwise.batching import order as module
from batchwise.batching.order import Balanced, Bucketed, Order, Repeated, Sequential, Shuffled, Stratified, Weighted

LONG_TAIL = torch.arange(10).repeat_interleave((2000 * 0.5 ** torch.arange(1.0, 11)).round().long())
ORDERS = [
    *[Sequential(), Shuffled(), Stratified(), Balanced(), Bucketed(48)],
    *[Weighted([1.0, 2.0, 3.0, 0.5]), Repeated(4)],
]
RANDOM = ORDERS[1:]


def prepared(order: Order, examples: int = 101, batch_size: int = 12, seed: int = 0) -> Order:
    labels = torch.arange(examples) % 7 % 4
    return order.prepare(examples, batch_size, seed, labels, torch.arange(examples) * 37 % 50)


def epoch_of(order: Order, epoch: int = 0) -> Tensor:
    return order.indices(epoch, 0, len(order))


def counts_per_batch(labels: Tensor, batch_size: int) -> Tensor:
    """Class counts of each batch, the short one included, [batches, classes]."""
    return torch.stack([one_hot(batch, int(labels.max()) + 1).sum(0) for batch in labels.split(batch_size)])


def name(order: Order) -> str:
    return type(order).__name__


@pytest.mark.parametrize("order", ORDERS, ids=name)
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_slice_is_a_slice_of_the_whole(order, data):
    prepared(order)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(order))] * 2)))
    epoch = data.draw(st.integers(0, 3))
    drawn = order.indices(epoch, a, b)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, epoch_of(order, epoch)[a:b])


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_blocks_are_invisible(order, monkeypatch):
    whole = epoch_of(prepared(order), 3)
    monkeypatch.setattr(module, "_BLOCK", 40)  # three batches of 12
    assert torch.equal(epoch_of(prepared(order), 3), whole)
    for start in (0, 35, 36, 50, 91):
        assert torch.equal(order.indices(3, start, start + 10), whole[start : start + 10])


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_same_seed_and_epoch_same_order(order):
    first = epoch_of(prepared(order), 2)
    epoch_of(order, 5)
    assert torch.equal(epoch_of(order, 2), first)
    assert torch.equal(epoch_of(prepared(pickle.loads(pickle.dumps(order))), 2), first)


@pytest.mark.parametrize("order", RANDOM, ids=name)
def test_seeds_and_epochs_differ(order):
    orders = [epoch_of(prepared(order, seed=seed), epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    agreement = [float((a == b).double().mean()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.12  # the same example at the same place by chance: about 1 in 101


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_no_global_generator_is_touched(order):
    before = torch.get_rng_state()
    epoch_of(prepared(order))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_positions_outside_the_epoch_are_refused(order):
    prepared(order)
    for start, stop in ((-1, 3), (5, 4), (0, len(order) + 1)):
        with pytest.raises(ValueError, match=f"ask within 0 to {len(order)}"):
            order.indices(0, start, stop)


@pytest.mark.parametrize("order", [Sequential(), Shuffled(), Stratified(), Bucketed(40)], ids=name)
@given(examples=st.integers(1, 400), batch_size=st.integers(1, 500), seed=st.integers())
@settings(max_examples=25, deadline=None)
def test_every_example_once(order, examples, batch_size, seed):
    drawn = epoch_of(prepared(order, examples, batch_size, seed), 1)
    assert torch.equal(drawn.sort().values, torch.arange(examples))


def test_sequential_is_the_stored_order():
    assert Sequential().prepare(9, 4, 0).indices(3, 2, 7).tolist() == [2, 3, 4, 5, 6]


def test_a_billion_examples_take_no_memory():
    order = Shuffled().prepare(10**9, 64, 0)
    for epoch, start in ((0, 0), (0, 10**9 - 64), (7, 5 * 10**8)):
        assert len(order.indices(epoch, start, start + 64).unique()) == 64
    tensors = [item for value in vars(order).values() if isinstance(value, tuple) for item in value]
    assert sum(item.nbytes for item in tensors if isinstance(item, Tensor)) == 2**17


def test_no_tensor_grows_with_the_data(monkeypatch):
    sizes = []
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda *args: sizes.append(args[1].numel()) or where(*args))
    Shuffled().prepare(10**9, 64, 0).indices(0, 0, 64)
    assert set(sizes) == {2**14}


def test_a_users_order_is_one_method():
    class Reversed(Order):
        def indices(self, epoch: int, start: int, stop: int) -> Tensor:
            return self.examples - 1 - torch.arange(start, stop)

    assert Reversed().prepare(5, 2, 0).indices(0, 1, 3).tolist() == [3, 2]
    with pytest.raises(NotImplementedError, match="Order must define indices"):
        Order().prepare(5, 2, 0).indices(0, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "not 0 and 4"),
        ((4, 0, 0), "not 4 and 0"),
        ((4, 2, 0, torch.zeros(3, dtype=torch.long)), r"integers \[4\], not torch.int64 \[3\]"),
        ((4, 2, 0, torch.zeros(4)), r"integers \[4\], not torch.float32"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shuffled().prepare(*arguments)


@pytest.mark.parametrize("order", [Stratified(), Balanced()], ids=name)
def test_labels_are_asked_for(order):
    with pytest.raises(ValueError, match=f"{name(order)} looks at classes: give labels"):
        order.prepare(10, 2, 0)


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
    assert (places - 100).abs().max() < 45  # 4.5 deviations of 9.6
    assert places.sum(1).tolist() == [1300] * 13


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
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
    assert (by_place - 0.25).abs().max() < 0.06  # 4.4 deviations of 0.0135


@pytest.mark.parametrize(
    ("weights", "probability"),
    [([3.0, 0.0, 1.0, 0.0, 4.0, 0.0], [0.375, 0, 0.125, 0, 0.5, 0]), ([1.0, 2.0], [1 / 9, 1 / 9, 1 / 9] + [2 / 9] * 3)],
    ids=["per example", "per class"],
)
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
    monkeypatch.setattr(module, "uniform", lambda key, counters: torch.full(counters.shape, u, dtype=torch.float64))
    order = Weighted([0.0, 1.0, 0.0, 3.0, 0.0]).prepare(5, 1, 0)
    assert order.indices(0, 0, 2).tolist() == [example, example]


def test_weighted_refuses_what_does_not_fit():
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite, not negative, and not all zero"):
            Weighted(weights)
    with pytest.raises(ValueError, match=r"^3 weights: give 6, one per example$"):
        Weighted([1.0] * 3).prepare(6, 2, 0)
    with pytest.raises(ValueError, match="3 weights: give 6, one per example, or 2, one per class"):
        Weighted([1.0] * 3).prepare(6, 2, 0, torch.tensor([0, 0, 0, 1, 1, 1]))


@given(k=st.integers(1, 6), per_batch=st.integers(1, 12), examples=st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_repeated_keeps_the_copies_in_one_batch(k, per_batch, examples):
    order = Repeated(k).prepare(examples, k * per_batch, 3)
    drawn = epoch_of(order, 2)
    assert len(drawn) == len(order) == k * examples
    assert torch.equal(drawn.bincount(), torch.full((examples,), k))
    for batch in drawn.split(k * per_batch):
        assert set(batch.unique(return_counts=True)[1].tolist()) == {k}


def test_repeated_names_the_nearest_batch_sizes():
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of k = 4 copies: take 8 or 12"):
        Repeated(4).prepare(100, 10, 0)
    with pytest.raises(ValueError, match="batch_size 3 is not a multiple of k = 4 copies: take 4"):
        Repeated(4).prepare(100, 3, 0)
    with pytest.raises(ValueError, match="take 1 or more, not 0"):
        Repeated(0)


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
    with pytest.raises(ValueError, match="window is 0"):
        Bucketed(0)
