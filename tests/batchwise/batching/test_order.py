import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchwise.batching import order as module
from batchwise.batching.order import Order, Repeated, Sequential, Shuffled
from batchwise.batching.sampling import Balanced, Bucketed, Stratified, Weighted

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


MEASURE = """
import resource, sys, torch
from batchwise.batching.order import Shuffled
Shuffled().prepare(2**20 + 1, 64, 0).indices(0, 0, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
order = Shuffled().prepare(10**9, 64, 0)
for epoch, start in ((0, 0), (0, 10**9 - 64), (7, 5 * 10**8)):
    assert len(order.indices(epoch, start, start + 64).unique()) == 64
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
def test_a_billion_examples_take_little_memory():
    run = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 5e7


@pytest.mark.parametrize("examples", [2**20 + 1, 1100**2])  # almost a row too many in the square; none
def test_more_examples_than_are_shuffled_at_once(examples):
    order = Shuffled().prepare(examples, 1000, 0)
    epochs = [epoch_of(order, epoch) for epoch in range(2)]
    for drawn in epochs:
        assert torch.equal(drawn.sort().values, torch.arange(examples))
    assert int((epochs[0] == epochs[1]).sum()) < 10  # of two random orders: one, on average
    for start in (0, 16_000, 15_999, 31_900, examples - 500):
        assert torch.equal(order.indices(1, start, start + 500), epochs[1][start : start + 500])


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
