"""Proportions in every batch, an even use of each source, and any batch by arithmetic."""

import time
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchwise.batching.mixture import Mixture
from batchwise.batching.order import Sources


def ranges(**sizes: int) -> Sources:
    """Sources of the given sizes, one after the other."""
    made, start = {}, 0
    for name, size in sizes.items():
        made[name] = range(start, start + size)
        start += size
    return made


def prepared(
    proportions: Mapping[str, float], sources: Sources, batch_size: int = 10, epoch_examples: int | None = None
) -> Mixture:
    examples = sum(map(len, sources.values()))
    return Mixture(proportions, epoch_examples).prepare(examples, batch_size, 0, sources=sources)


def drawn(order: Mixture, epochs: int) -> Tensor:
    return torch.cat([order.indices(epoch, 0, len(order)) for epoch in range(epochs)])


def counts(order: Mixture, indices: Tensor) -> list[int]:
    """How many of these examples are of each source, which are ranges."""
    assert order.sources is not None
    ranges = [source for source in order.sources.values() if isinstance(source, range)]
    return [int(((indices >= source.start) & (indices < source.stop)).sum()) for source in ranges]


def test_whole_numbers_per_batch_are_exact():
    order = prepared({"web": 0.7, "books": 0.2, "code": 0.1}, ranges(web=93, books=11, code=77), 20)
    for step in range(len(order) // 20):
        assert counts(order, order.indices(3, 20 * step, 20 * step + 20)) == [14, 4, 2]


def test_fractions_per_batch_are_rounded_down_or_up_in_turn():
    order = prepared({"a": 0.7, "b": 0.3}, ranges(a=900, b=100), 64, 6400)
    had = [counts(order, batch)[0] for batch in drawn(order, 1).split(64)]
    assert (had.count(45), had.count(44)) == (80, 20)


SHARES = st.one_of(
    st.lists(st.integers(1, 1000), min_size=1, max_size=7),
    st.lists(st.integers(10, 9999).map(lambda number: number / 10_000), min_size=1, max_size=7),
)


@given(shares=SHARES, batch_size=st.integers(1, 70), extra=st.integers(0, 69))
@settings(max_examples=40, deadline=None)
@pytest.mark.slow
def test_each_source_is_less_than_one_example_off_after_any_batch(shares, batch_size, extra):
    exact = [Fraction(str(share)) for share in shares]
    exact = [share / sum(exact) for share in exact]
    names = [f"s{number}" for number in range(len(shares))]
    order = prepared(
        dict(zip(names, shares, strict=True)), ranges(**dict.fromkeys(names, 50)), batch_size, 12 * batch_size + extra
    )
    if sum(order._shares.values()) == 10_000 and any((share * 10_000).denominator > 1 for share in exact):
        exact = [Fraction(turns, 10_000) for turns in order._shares.values()]  # rounded, as the class says
    indices, length = drawn(order, 7), len(order)
    ends = sorted({*range(0, length, batch_size), length})
    for seen in (epoch * length + end for epoch in range(7) for end in ends):
        had = counts(order, indices[:seen])
        assert all(abs(count - seen * share) < 1 for count, share in zip(had, exact, strict=True))


@pytest.mark.slow
def test_the_error_stays_below_one_over_a_long_time():
    shares = {"a": 0.3333, "b": 0.6117, "c": 0.0549, "d": 0.0001}
    order = prepared(shares, ranges(a=7, b=1000, c=13, d=2), 37, 37 * 1000)
    had = torch.zeros(4)
    for epoch in range(60):
        had += torch.tensor(counts(order, order.indices(epoch, 0, len(order))))
        off = had - (epoch + 1) * len(order) * torch.tensor(list(shares.values()), dtype=torch.float64)
        assert off.abs().max() < 1


def test_proportions_of_more_decimals_are_rounded():
    order = prepared({"a": 0.123456, "b": 0.876544}, ranges(a=5, b=5))
    assert order._shares == {"a": 1235, "b": 8765}
    thirds = prepared({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, ranges(a=5, b=5, c=5))
    assert thirds._shares == {"a": 1, "b": 1, "c": 1}


def test_all_examples_of_a_source_come_before_any_comes_again():
    """Of a source that has several passes per epoch, of one that has one in several epochs, and of a large one."""
    sizes = {"small": 7, "large": 150, "huge": 40_000}
    sources = ranges(**sizes)
    order = prepared({"small": 0.4, "large": 0.1, "huge": 0.5}, sources, epoch_examples=997)
    for name, epochs in (("small", 6), ("large", 6), ("huge", 170)):
        # The order within a batch is random, so a pass is seen from outside only to a batch: the draws are looked at.
        indices, source, size = drawn(order, epochs), sources[name], sizes[name]
        assert isinstance(source, range)
        own = indices[(indices >= source.start) & (indices < source.stop)]
        passes = len(own) // size
        assert passes >= 2
        uses = own.bincount(minlength=source.stop)[source.start :]
        assert set(uses.tolist()) <= {passes, passes + 1}
        rows = order._draw(name, torch.arange(2 * size)).view(2, size)
        assert torch.equal(rows.sort().values, torch.arange(source.start, source.stop).expand(2, -1))
        assert not torch.equal(rows[0], rows[1])


def test_sources_need_not_stand_together():
    even, odd = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
    order = prepared({"even": 1, "odd": 4}, {"even": even, "odd": odd})
    for batch in order.indices(0, 0, 40).split(10):
        assert (batch % 2).sum() == 8


def test_a_source_is_left_out_by_a_zero():
    order = prepared({"a": 1, "b": 0, "c": 1}, ranges(a=4, b=3, c=6))
    assert len(order) == 10
    assert counts(order, drawn(order, 4)) == [20, 0, 20]
    assert len(prepared({"a": 1, "b": 0}, {"a": range(4), "b": range(0)})) == 4


@given(start=st.integers(0, 40_000), length=st.integers(0, 200), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
@pytest.mark.slow
def test_a_slice_is_a_slice_of_the_whole(start, length, epoch):
    shares, sources = {"a": 0.31, "b": 0.69}, ranges(a=123, b=40_000)
    order = prepared(shares, sources, 33)
    stop = min(start + length, len(order))
    start = min(start, stop)
    slice_ = prepared(shares, sources, 33).indices(epoch, start, stop)
    assert torch.equal(slice_, order.indices(epoch, 0, len(order))[start:stop])


def test_any_batch_of_ten_million_examples_comes_in_milliseconds():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sources = ranges(a=10_000_000, b=300)
        order = prepared({"a": 0.9, "b": 0.1}, sources, 64)
        order.indices(5, 0, 64)  # loads the libraries
        for epoch, first in ((0, 0), (1, 6_400_000), (100_000, 640_000)):
            start = time.perf_counter()
            order.indices(epoch, first, first + 64)
            assert time.perf_counter() - start < 0.1  # 5 ms on an idle machine; a walk would take many minutes
    finally:
        torch.set_num_threads(threads)


def test_the_seed_and_the_batch():
    """Another seed is another order. Another batch size has the same examples of each source, but for the last."""
    shares, sources = {"a": 1, "b": 2}, ranges(a=30, b=60)
    by_seed = [Mixture(shares).prepare(90, 30, seed, sources=sources).indices(0, 0, 30) for seed in (0, 1)]
    assert not torch.equal(*by_seed)
    by_size = [prepared(shares, sources, size).indices(0, 0, 30).sort().values for size in (10, 30)]
    assert torch.equal(*by_size)


def test_what_is_printed():
    order = prepared({"web": 7, "books": 3}, ranges(web=400, books=100), 64, 1000)
    assert order.summary(64) == (
        "mixture: web 0.7 (44.8 of 64 per batch, 1.8 passes per epoch), "
        "books 0.3 (19.2 of 64 per batch, 3 passes per epoch)"
    )
    assert str(order) == "Mixture {'web': 7, 'books': 3}"
    assert not order.once


@pytest.mark.parametrize(
    ("shares", "sources", "message"),
    [
        ({"a": 1, "b": 2}, ranges(a=3, c=4), "proportions name a, b, but the sources are a, c: write one for each"),
        ({"a": 1}, ranges(a=3, b=4), "proportions name a, but the sources are a, b"),
        ({"a": 1}, None, r"Mixture needs sources: write sources\(\) in the data module"),
        ({"a": -1, "b": 2}, ranges(a=3, b=4), "proportions are {'a': -1, 'b': 2}: write numbers of at least 0"),
        ({"a": 0, "b": 0}, ranges(a=3, b=4), "and one above 0"),
        ({}, ranges(a=3), "proportions are {}"),
        ({"a": float("nan")}, ranges(a=3), "write numbers of at least 0"),
        ({"a": 1, "b": 2}, {"a": range(3), "b": range(0)}, "source b has no examples: check where it is read from"),
        ({"a": 1, "b": 1e-5}, ranges(a=3, b=4), "proportion of b is 1e-05 of all: write at least 0.0001, or 0"),
    ],
)
def test_refusals(shares, sources, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Mixture(shares).prepare(10, 4, 0, sources=sources)
    assert "\n" not in str(refusal.value)
