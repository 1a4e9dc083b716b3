import copy
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Order, Sequential, Shuffled
from batchwise.batching.plan import BatchPlan, Part
from batchwise.batching.ragged import Ragged
from batchwise.batching.sampling import Balanced
from batchwise.batching.tokens import ByTokens, SequencePlan


@st.composite
def all_lengths(draw) -> torch.Tensor:
    return torch.tensor(draw(st.lists(st.integers(0, 40), min_size=1, max_size=60)))


def sequence_plan(lengths: torch.Tensor, order: Order | None = None, **settings) -> SequencePlan:
    order = (order or Shuffled()).prepare(len(lengths), 1, 3, None, lengths)
    settings = {"batch_size": 8} | settings
    return SequencePlan(len(order), **settings, lengths=lengths, order=order)


# Batches


@given(all_lengths(), st.data())
@settings(max_examples=100, deadline=None)
def test_batches_have_equally_many_tokens_but_for_part_of_a_sequence(lengths, data):
    steps = data.draw(st.integers(1, len(lengths)))
    borders = ByTokens(len(lengths), steps, lambda epoch: lengths.roll(epoch))
    for epoch in range(2):
        bounds = [borders.bounds(epoch, number) for number in range(steps)]
        assert (bounds[0][0], bounds[-1][1]) == (0, len(lengths))
        assert all(a[1] == b[0] for a, b in pairwise(bounds))
        assert min(stop - start for start, stop in bounds) >= 1
        share, longest = int(lengths.sum()) / steps, int(lengths.max())
        if 0 < longest <= share and int(lengths.min()) > 0:
            tokens = [int(lengths.roll(epoch)[start:stop].sum()) for start, stop in bounds]
            assert max(abs(count - share) for count in tokens) <= longest


def test_borders_by_hand():
    # Nine tokens in three parts: the middles of the sequences are at 1, 3, 5.5, 8.5.
    borders = ByTokens(4, 3, lambda epoch: torch.tensor([2, 2, 3, 2]))
    assert [borders.bounds(0, number) for number in range(3)] == [(0, 1), (1, 3), (3, 4)]
    assert [borders.epoch(step) for step in (0, 2, 3)] == [0, 0, 1]
    assert borders.before(2) == (6, 8)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_plan_by_tokens_can_be_copied_once_it_is_in_use(make):
    plan = sequence_plan(torch.arange(1, 41), batch_tokens=100)
    bounds = [plan.bounds(step) for step in range(2 * plan.steps_per_epoch)]
    own = make(plan)
    assert [own.bounds(step) for step in range(len(bounds))] == bounds
    assert own.borders.lengths.__self__ is own  # and not the plan that it is a copy of


def test_a_plan_by_tokens():
    lengths = torch.randint(1, 50, (1000,), generator=torch.Generator().manual_seed(0))
    tokens = int(lengths.sum())
    plan = sequence_plan(lengths, batch_size=20, batch_tokens=500, micro_batch_tokens=120)
    assert plan.steps_per_epoch == -(-tokens // 500)
    assert plan.table(7) == {
        "examples": 1000, "tokens": tokens, "batch_tokens": 500, "batch_size": 20, "devices": 1,
        "micro_batch_tokens": 120, "steps_per_epoch": plan.steps_per_epoch, "total_steps": 7,
    }  # fmt: skip
    assert plan.examples_at(3 * plan.steps_per_epoch) == 3000
    sizes = [stop - start for start, stop in map(plan.bounds, range(2 * plan.steps_per_epoch))]
    assert len(set(sizes)) > 5
    assert plan.accumulation == 5  # at least 500 / 120
    limited = sequence_plan(lengths, batch_size=20, batch_tokens=500, limit=10)
    assert limited.steps_per_epoch == 10
    assert limited.examples_per_epoch == 1000 * 10 // plan.steps_per_epoch
    assert limited.bounds(9)[1] == limited.examples_per_epoch == limited.examples_at(10)


def test_an_order_that_repeats_examples_counts_their_tokens():
    lengths, labels = torch.tensor([1] * 90 + [10] * 10), torch.tensor([0] * 90 + [1] * 10)
    order = Balanced().prepare(100, 1, 0, labels, lengths)
    plan = SequencePlan(100, 10, lengths=lengths, order=order, batch_tokens=19)
    counts = [int(lengths[order.indices(0, *plan.bounds(step))].sum()) for step in range(plan.steps_per_epoch)]
    assert sum(counts) == 550
    assert max(counts) - min(counts) <= 20


# Micro-batches


@given(all_lengths(), st.integers(1, 4), st.none() | st.integers(1, 9), st.none() | st.integers(40, 200))
@settings(max_examples=200, deadline=None)
def test_micro_batches_are_the_sorted_batch(lengths, devices, most, tokens):
    plan = sequence_plan(lengths, devices=devices, micro_batch_size=most, micro_batch_tokens=tokens)
    index = torch.arange(len(lengths)).flip(0)
    arranged = [plan.arrange(index, rank) for rank in range(devices)]
    batch = arranged[0][0]
    assert all(torch.equal(each, batch) for each, _ in arranged)
    expected = sorted(index.tolist(), key=lambda example: -int(lengths[example].clamp(min=1)))
    assert batch.tolist() == expected
    assert len({len(parts) for _, parts in arranged}) == 1
    turns = [part for turn in zip(*(parts for _, parts in arranged), strict=True) for part in turn]
    counted = [part for part in turns if part.counts]
    assert [part.start for part in counted] == [0, *(part.stop for part in counted[:-1])]
    assert counted[-1].stop == len(index)
    for part in turns:
        assert 1 <= part.stop - part.start <= (most or len(index))
        longest = int(lengths[batch[part.start]].clamp(min=1))
        assert tokens is None or longest * (part.stop - part.start) <= tokens
    assert turns[len(counted) :] == [Part(len(index) - 1, len(index), False)] * (len(turns) - len(counted))


def test_devices_have_about_the_same_work():
    lengths = torch.randint(1, 500, (64,), generator=torch.Generator().manual_seed(1)).sort(descending=True).values
    plan = sequence_plan(lengths, devices=4)
    parts = [plan.arrange(torch.arange(64), rank)[1] for rank in range(4)]
    padded = [int(lengths[part.start]) * (part.stop - part.start) for (part,) in parts]
    assert max(padded) < 1.25 * sum(padded) / 4
    assert max(padded) < 0.7 * int(lengths[0]) * 16  # what a device would have of the batch cut by number


def test_stand_ins_by_hand():
    plan = sequence_plan(torch.tensor([5, 5, 5]), devices=2, micro_batch_tokens=5)
    assert plan.arrange(torch.arange(3), 0)[1] == [Part(0, 1), Part(2, 3)]
    assert plan.arrange(torch.arange(3), 1)[1] == [Part(1, 2), Part(2, 3, False)]


# The loader


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("tokens", [{"batch_tokens": 300, "micro_batch_tokens": 90}, {"micro_batch_tokens": 90}])
def test_the_loader_reads_the_sorted_batches(devices, tokens):
    lengths = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(2))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    fetch = Ragged(torch.arange(int(offsets[-1])), offsets, torch.arange(200))
    plan = sequence_plan(lengths, devices=devices, **tokens)
    for start in (0, 5, plan.steps_per_epoch + 2):
        shares = [
            list(TrainLoader(plan, plan.order, fetch, rank, lambda start=start: start)) for rank in range(devices)
        ]
        for step, ours in enumerate(zip(*shares, strict=True), start):
            epoch, batch = plan.epoch(step), plan.order.indices(plan.epoch(step), *plan.bounds(step))
            whole, _ = plan.arrange(batch, 0)
            seen = []
            for share in ours:
                assert (share.step, share.epoch, share.size) == (step, epoch, len(batch))
                for part in share.micro_batches:
                    assert part.inputs.shape[1] == max(1, int(lengths[part.index].max()))
                    assert part.inputs.numel() <= 90
                    assert torch.equal(part.index, whole[part.position : part.position + len(part)])
                    assert torch.equal(part.targets, part.index)
                    assert torch.equal((part.inputs >= 0).sum(1), lengths[part.index])
                    assert part.counts == (part.weights is None)
                    seen += part.index.tolist() if part.counts else []
            assert sorted(seen) == sorted(batch.tolist())


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 39}, "data.batch_tokens is 39, but example 1 has 40 tokens: write at least as many"),
        ({"micro_batch_tokens": 39}, "data.micro_batch_tokens is 39, but example 1 has 40 tokens"),
        ({"unit": 2}, "ghost_batch_size would mix the padding"),
        ({"batch_tokens": 40, "changes": ((5, 9),)}, "batch_size_schedule is in examples"),
    ],
)
def test_plans_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        sequence_plan(torch.tensor([3, 40, 2]), **settings)


def test_lengths_change_nothing_where_the_plan_is_not_of_sequences():
    fetch = Ragged(torch.arange(6), torch.tensor([0, 1, 3, 6]))
    order = Sequential().prepare(3, 3, 0)
    (share,) = TrainLoader(BatchPlan(3, 3), order, fetch, 0, lambda: 0)
    assert share.micro_batches[0].index.tolist() == [0, 1, 2]
