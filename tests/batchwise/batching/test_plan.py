import re
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchwise.batching.plan import BatchPlan, Part, cut

REMEDY = re.compile(r"\b(accumulate_grad_batches|micro_batch_size|batch_size) (\d+)")


@st.composite
def plans(draw) -> BatchPlan:
    examples, unit, drop_last = draw(st.integers(1, 300)), draw(st.integers(1, 6)), draw(st.booleans())
    return BatchPlan(
        examples,
        batch_size=draw(st.integers(1, examples if drop_last else 90)),
        devices=draw(st.integers(1, 7)),
        micro_batch_size=draw(st.none() | st.integers(unit, unit + 20)),
        drop_last=drop_last,
        unit=unit,
        limit=draw(st.none() | st.integers(1, 12)),
    )


def steps_of(plan: BatchPlan) -> list[list[list[Part]]]:
    """Parts by step, device and number."""
    return [[plan.parts(step, rank) for rank in range(plan.devices)] for step in range(plan.steps_per_epoch)]


def size(part: Part) -> int:
    return part.stop - part.start


@given(plans())
@settings(max_examples=150, deadline=None)
def test_the_parts_of_a_step_are_the_batch(plan):
    for step, devices in enumerate(steps_of(plan)):
        start, stop = plan.bounds(step)
        counted = [part for parts in devices for part in parts if part.counts]
        assert counted[0].start == start
        assert counted[-1].stop == stop
        assert all(a.stop == b.start for a, b in pairwise(counted))
        assert min(map(size, counted)) >= 1


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_device_has_the_same_work(plan):
    for step, devices in enumerate(steps_of(plan)):
        start, stop = plan.bounds(step)
        assert len({len(parts) for parts in devices}) == 1
        units = []
        for part in (part for parts in devices for part in parts):
            if not part.counts:
                assert size(part) == 1
                assert start <= part.start < stop
                units.append(0)
                continue
            assert (part.start - start) % plan.unit == 0
            assert (part.stop - start) % plan.unit == 0 or part.stop == stop
            whole, rest = divmod(size(part), plan.unit)
            units.append(max(1, whole + (2 * rest >= plan.unit)))  # a remainder under half a unit joins the last one
        assert max(units) - min(units) <= 1
        shares = [sum(units[rank * len(devices[0]) : (rank + 1) * len(devices[0])]) for rank in range(plan.devices)]
        assert max(shares) - min(shares) <= 1


@given(plans())
@settings(max_examples=150, deadline=None)
def test_micro_batches_are_as_few_as_the_limit_allows(plan):
    limit = plan.micro_batch_size
    for step, devices in enumerate(steps_of(plan)):
        start, stop = plan.bounds(step)
        if limit is None:
            assert {len(parts) for parts in devices} == {1}
            continue
        # With units, a remainder of less than half of one may come on top.
        assert all(2 * (size(part) - limit) < plan.unit or size(part) <= limit for parts in devices for part in parts)
        if plan.unit == 1:
            assert all((len(parts) - 1) * limit < ceil((stop - start) / plan.devices) for parts in devices)
            sizes = [size(part) * part.counts for parts in devices for part in parts]
            assert max(sizes) <= limit
            assert max(sizes) - min(sizes) <= 1


@given(plans())
@settings(max_examples=150, deadline=None)
def test_batch_b_is_a_slice_of_the_order(plan):
    order, batch = list(range(plan.examples)), plan.batch_size
    batches = [order[start : start + batch] for start in range(0, plan.examples, batch)]
    batches = [b for b in batches if len(b) == batch or not plan.drop_last][: plan.limit]
    assert plan.steps_per_epoch == len(batches)
    assert [order[slice(*plan.bounds(b))] for b in range(len(batches))] == batches
    assert plan.bounds(len(batches)) == plan.bounds(0)  # the next epoch
    assert plan.last_batch == len(batches[-1])
    assert plan.examples_per_epoch == sum(map(len, batches))
    seen = 0
    for step in range(3 * len(batches) + 1):
        assert plan.examples_at(step) == seen
        start, stop = plan.bounds(step)
        seen += stop - start


@given(
    devices=st.integers(1, 8),
    accumulation=st.integers(1, 6),
    micro_batches=st.integers(1, 10),
    unit=st.integers(1, 4),
    steps=st.integers(1, 3),
)
def test_micro_batch_borders_do_not_depend_on_devices(devices, accumulation, micro_batches, unit, steps):
    micro_batch = micro_batches * unit
    batch = devices * accumulation * micro_batch
    one, many = (BatchPlan(steps * batch, batch, d, micro_batch, unit=unit) for d in (1, devices))
    for step in range(steps):
        parts = [part for rank in range(devices) for part in many.parts(step, rank)]
        assert parts == one.parts(step, 0)
        assert {size(part) for part in parts} == {micro_batch}
    assert (one.accumulation, many.accumulation) == (devices * accumulation, accumulation)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_the_figures_hold_for_every_step(plan):
    devices = [parts for step in steps_of(plan) for parts in step]
    assert plan.accumulation == max(map(len, devices))
    assert plan.share == max(sum(size(part) for part in parts if part.counts) for parts in devices)
    assert plan.largest_micro_batch == max(size(part) for parts in devices for part in parts)


def test_the_largest_micro_batch_may_be_in_the_short_last_batch():
    plan = BatchPlan(examples=21, batch_size=11, micro_batch_size=10)
    assert [list(map(size, plan.parts(step, 0))) for step in (0, 1)] == [[5, 6], [10]]
    assert plan.largest_micro_batch == 10


def test_a_device_without_examples_runs_a_stand_in():
    plan = BatchPlan(examples=10, batch_size=8, devices=3, micro_batch_size=1)
    assert [plan.parts(1, rank) for rank in range(3)] == [[Part(8, 9, False)], [Part(8, 9)], [Part(9, 10)]]
    assert [len(plan.parts(0, rank)) for rank in range(3)] == [3, 3, 3]
    assert plan.parts(0, 0) == [Part(0, 1, False), Part(0, 1), Part(1, 2)]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(8, [(0, 4), (4, 8)]), (9, [(0, 4), (4, 9)]), (10, [(0, 4), (4, 8), (8, 10)]), (1, [(0, 1)]), (3, [(0, 3)])],
)
def test_a_remainder_under_half_a_unit_joins_the_unit_before(batch, expected):
    parts = BatchPlan(examples=100, batch_size=batch, micro_batch_size=7, unit=4).parts(0, 0)
    assert [(part.start, part.stop) for part in parts] == expected


def test_table():
    figures = {
        "examples": 1257,
        "batch_size": 100,
        "devices": 2,
        "share": 50,
        "micro_batch_size": 17,
        "accumulate_grad_batches": 3,
        "steps_per_epoch": 13,
        "last_batch": 57,
        "total_steps": 130,
    }
    plan = BatchPlan(examples=1257, batch_size=100, devices=2, micro_batch_size=24)
    assert plan.table(130) == figures
    dropped = BatchPlan(1257, 100, 2, 24, drop_last=True)
    assert dropped.table(130) == figures | {"steps_per_epoch": 12, "last_batch": 100}
    assert dropped.examples_per_epoch == 1200
    assert BatchPlan(1257, 100, 2, 24, limit=3).table(130) == figures | {"steps_per_epoch": 3, "last_batch": 100}


@given(total=st.integers(0, 500), parts=st.integers(1, 50))
def test_cut(total, parts):
    borders = cut(total, parts)
    sizes = [b - a for a, b in pairwise(borders)]
    assert (borders[0], borders[-1], len(sizes)) == (0, total, parts)
    assert {total // parts, -(-total // parts)} >= set(sizes)


# From any two of three


def derive(batch_size=None, micro_batch_size=None, accumulate_grad_batches=None, devices=1, **rest) -> BatchPlan:
    return BatchPlan.derive(
        examples=100_000,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        accumulate_grad_batches=accumulate_grad_batches,
        devices=devices,
        **rest,
    )


@given(devices=st.integers(1, 8), accumulation=st.integers(1, 20), micro_batch=st.integers(1, 64))
def test_any_two_give_the_third(devices, accumulation, micro_batch):
    stated = {
        "batch_size": devices * accumulation * micro_batch,
        "micro_batch_size": micro_batch,
        "accumulate_grad_batches": accumulation,
    }
    whole = BatchPlan(100_000, stated["batch_size"], devices, micro_batch)
    assert (whole.accumulation, whole.largest_micro_batch) == (accumulation, micro_batch)
    for left_out in (None, *stated):
        assert derive(**(stated | ({left_out: None} if left_out else {})), devices=devices) == whole


@given(devices=st.integers(1, 6), batch=st.integers(1, 200), micro_batch=st.integers(1, 60))
def test_batch_and_micro_batch_size_always_go_together(devices, batch, micro_batch):
    plan = derive(batch, micro_batch, devices=devices)
    assert plan == derive(batch, micro_batch, plan.accumulation, devices=devices)
    for wrong in {plan.accumulation - 1, plan.accumulation + 1} - {0}:
        with pytest.raises(ValueError, match=r"cannot be .* micro-batches of") as error:
            derive(batch, micro_batch, wrong, devices=devices)
        numbers = set(map(int, re.findall(r"\d+", str(error.value))))
        assert numbers >= {batch, devices, micro_batch, plan.accumulation, wrong}


@given(devices=st.integers(1, 6), batch=st.integers(1, 120), accumulation=st.integers(1, 60))
@settings(max_examples=200)
def test_batch_size_and_accumulation_give_that_accumulation(devices, batch, accumulation):
    try:
        plan = derive(batch, None, accumulation, devices)
    except ValueError as error:  # some numbers cannot be had: then they are in the message
        message = str(error)
    else:
        message = None
    if message is not None:
        assert {batch, devices, accumulation} <= set(map(int, re.findall(r"\d+", message)))
        return
    assert plan.accumulation == accumulation
    assert plan.batch_size == batch
    assert plan.largest_micro_batch == ceil(ceil(batch / devices) / accumulation)


@given(
    devices=st.integers(1, 6),
    batch=st.integers(1, 120),
    micro_batch=st.none() | st.integers(1, 30),
    accumulation=st.integers(1, 40),
)
@example(devices=1, batch=10, micro_batch=None, accumulation=6)
@example(devices=1, batch=10, micro_batch=3, accumulation=6)
@example(devices=1, batch=10, micro_batch=3, accumulation=20)
@example(devices=3, batch=10, micro_batch=2, accumulation=3)
@example(devices=2, batch=10, micro_batch=None, accumulation=6)
@settings(max_examples=300)
def test_what_an_error_suggests_works(devices, batch, micro_batch, accumulation):
    stated = {"batch_size": batch, "micro_batch_size": micro_batch, "accumulate_grad_batches": accumulation}
    try:
        derive(**stated, devices=devices)
    except ValueError as error:
        advice = str(error).rpartition(": ")[2]
        remedies = [(name, int(number)) for name, number in REMEDY.findall(advice)]
        remedies += [("accumulate_grad_batches", int(number)) for number in re.findall(r"at most (\d+)", advice)]
        assert remedies
        for name, number in remedies:
            plan = derive(**(stated | {name: number}), devices=devices)
            assert plan.accumulation == (stated | {name: number})["accumulate_grad_batches"]
        if "leave one of the three out" in advice:
            assert micro_batch is not None  # or only two were given
            for left_out in ("batch_size", "accumulate_grad_batches"):
                derive(**(stated | {left_out: None}), devices=devices)


def test_batch_size_alone_is_one_micro_batch_per_device():
    plan = derive(1000, devices=4)
    assert (plan.accumulation, plan.share, plan.largest_micro_batch) == (1, 250, 250)


@pytest.mark.parametrize("stated", [(), (None, 4), (None, None, 2)])
def test_one_number_that_is_not_the_batch_size_is_too_few(stated):
    with pytest.raises(ValueError, match=r"^data.batch_size is not set: write"):
        derive(*stated)


def test_derive_passes_on_the_rest():
    plan = derive(10, 5, drop_last=True, unit=5, limit=7)
    assert plan == BatchPlan(100_000, 10, 1, 5, True, 5, 7)


# Wrong numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 0}, "the training split has no examples"),
        ({"batch_size": 0}, "^batch_size is 0: write a whole number of at least 1"),
        ({"batch_size": -3}, "^batch_size is -3: write"),
        ({"devices": 0}, "^devices is 0: write"),
        ({"micro_batch_size": 0}, "^micro_batch_size is 0: write"),
        ({"unit": 0}, "^unit is 0: write"),
        ({"micro_batch_size": 3, "unit": 4}, "micro_batch_size is 3, but 4 examples must stay together: .* at least 4"),
        ({"batch_size": 101, "drop_last": True}, "batch_size is 101 with drop_last.* only 100 .* at most 100"),
        ({"limit": 0}, "limit"),
        ({"limit": -1}, "limit"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**({"examples": 100, "batch_size": 10} | change))


def test_the_nearest_right_values_are_right():
    assert BatchPlan(100, 10, micro_batch_size=4, unit=4).largest_micro_batch == 4
    assert BatchPlan(100, 100, drop_last=True).steps_per_epoch == 1
    assert BatchPlan(100, 101).last_batch == 100


@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size", "accumulate_grad_batches", "devices"])
@pytest.mark.parametrize("value", [0, -1])
def test_derive_refuses_numbers_below_one(name, value):
    stated = {"batch_size": 8, "micro_batch_size": 2, "accumulate_grad_batches": 4, "devices": 1} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value}: write a whole number of at least 1"):
        derive(**stated)
