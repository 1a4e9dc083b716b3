from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwise.batching.borders import BySize
from batchwise.batching.plan import BatchPlan


@st.composite
def borders(draw) -> BySize:
    positions, drop_last = draw(st.integers(1, 60)), draw(st.booleans())
    sizes = st.integers(1, positions if drop_last else 90)
    points = sorted(draw(st.sets(st.integers(1, 250), max_size=4)))
    return BySize(positions, draw(sizes), tuple((point, draw(sizes)) for point in points), drop_last)


def batches(borders: BySize):
    """Yield (epoch, number, start, stop, examples seen before, size), batch after batch, as the words say it."""
    seen = epoch = 0
    while True:
        number = start = 0
        while start < borders.positions:
            size = [size for point, size in borders.sizes if point <= seen][-1]
            stop = min(start + size, borders.positions)
            if borders.drop_last and stop - start < size:
                break
            yield epoch, number, start, stop, seen, size
            seen, number, start = seen + stop - start, number + 1, stop
        epoch += 1


@given(borders())
@settings(max_examples=100, deadline=None)
def test_every_batch_is_where_one_comes_to_it_by_walking(borders):
    walked = list(islice(batches(borders), 400))
    plan = BatchPlan(borders.positions, borders.sizes[0][1], 1, None, borders.drop_last, changes=borders.sizes[1:])
    for step, (epoch, number, start, stop, seen, size) in enumerate(walked):
        assert borders.epoch(step) == epoch
        assert borders.bounds(epoch, number) == (start, stop)
        assert plan.size_at(step) == size
        if number == 0:
            assert borders.before(epoch) == (step, seen)
        assert borders.before(epoch)[0] + number == step
    assert all(a[3] == b[2] or b[1] == 0 for a, b in pairwise(walked))


def test_the_plan_in_numbers():
    # 100 examples in batches of 16; from 130 examples on 40. The first that begins there begins at 132 = 100 + 2 * 16.
    plan = BatchPlan(100, 16, devices=2, changes=((130, 40),))
    assert [plan.bounds(step) for step in range(7, 14)] == [
        *[(0, 16), (16, 32)],
        *[(32, 72), (72, 100)],
        *[(0, 40), (40, 80), (80, 100)],
    ]
    assert [plan.steps_in(epoch) for epoch in range(4)] == [7, 4, 3, 3]
    assert [plan.first_step(epoch) for epoch in range(4)] == [0, 7, 11, 14]
    assert [step for step in range(20) if plan.begins_epoch(step)] == [0, 7, 11, 14, 17]
    assert [plan.examples_at(step) for step in (0, 7, 9, 10, 11, 12, 14)] == [0, 100, 132, 172, 200, 240, 300]
    assert [plan.size_at(step) for step in (6, 8, 9, 10, 13)] == [16, 16, 40, 40, 40]
    assert plan.table(20)["after 130 examples"] == 40


def test_micro_batches_stay_as_they_are():
    plan = BatchPlan(1000, 64, devices=2, changes=((500, 256),))
    assert [len(plan.parts_of(size, 0)) for size in (64, 256)] == [1, 4]
    assert plan.largest_micro_batch == 32
    assert plan.share == 128


def test_no_memory_and_no_time_for_a_billion_examples():
    plan = BatchPlan(10**9, 64)
    assert len(plan.borders._epochs) == 1
    assert plan.bounds(10**12 + 3) == ((10**12 + 3) % (10**9 // 64) * 64, (10**12 + 3) % (10**9 // 64) * 64 + 64)
    assert plan.examples_at(10 * plan.steps_per_epoch) == 10**10


def test_a_later_size_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match="batch_size is 101 with drop_last, but there are only 100"):
        BatchPlan(100, 10, drop_last=True, changes=((50, 101),))
