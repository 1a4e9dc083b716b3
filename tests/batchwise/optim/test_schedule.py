import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwise.optim.schedule import Schedule

SHAPES = ["constant", "cosine", "linear"]


def factors(schedule: Schedule, batch_size: int, total: int) -> dict[tuple[int, int], float]:
    """The factor of each step, by the examples seen before and after it."""
    steps = [(seen, min(seen + batch_size, total)) for seen in range(0, total, batch_size)]
    return {(before, after): schedule.factor(before, after, total) for before, after in steps}


def test_by_default_the_rate_is_constant():
    assert set(factors(Schedule(), 10, 95).values()) == {1.0}


@pytest.mark.parametrize(
    ("shape", "floor", "expected"),
    [
        ("cosine", 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]),
        ("cosine", 0.2, [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.1, [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("constant", 0.0, [1.0] * 5),
        ("constant", 0.3, [1.0] * 5),
    ],
)
@pytest.mark.parametrize("warmup", [0, 200])
def test_from_the_full_rate_down_to_the_floor(shape, floor, expected, warmup):
    schedule = Schedule(shape, warmup_examples=warmup, floor=floor)
    found = [schedule.factor(warmup + seen, warmup + seen + 10, warmup + 800) for seen in range(0, 801, 200)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "schedule", [{"warmup": 0.25}, {"warmup_examples": 100}, {"warmup": 0.9, "warmup_examples": 100}]
)
def test_warm_up_rises_in_a_line_to_the_full_rate(shape, schedule):
    schedule = Schedule(shape, **schedule, floor=0.5)
    rising = list(factors(schedule, 20, 400).values())[:6]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])  # the first step moves; the rate is full at 100
    assert schedule.factor(100, 120, 400) == 1.0


def test_no_warm_up_examples_go_before_a_share():
    assert Schedule(warmup=0.5, warmup_examples=0).factor(0, 10, 100) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_across_the_end_of_the_warm_up_is_full(shape):
    assert Schedule(shape, warmup_examples=100).factor(96, 128, 400) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_step_is_as_far_from_the_floor_as_one_step_is(shape):
    schedule = Schedule(shape, floor=0.1)
    last = list(factors(schedule, 10, 1000).values())[-1]
    done = {"constant": 1.0, "linear": 0.1 + 0.9 * 0.01, "cosine": 0.1 + 0.45 * (1 - math.cos(math.pi * 0.01))}
    assert last == pytest.approx(done[shape])


@pytest.mark.parametrize(
    ("settings", "held"), [({"hold_examples": 400}, 400), ({"warmup_examples": 100}, 100), ({"warmup": 0.125}, 100)]
)
def test_held_and_then_divided_by_the_square_root_of_the_examples(settings, held):
    schedule = Schedule("inverse_sqrt", **settings)
    found = [schedule.factor(seen, seen + 10, 800) for seen in (held, held + 10, 4 * held, 9 * held, 10_000 * held)]
    assert found == pytest.approx([1.0, math.sqrt(held / (held + 10)), 1 / 2, 1 / 3, 1 / 100])
    assert Schedule("inverse_sqrt", hold_examples=400).factor(100, 110, math.inf) == 1.0
    assert Schedule("inverse_sqrt", hold_examples=50, warmup_examples=100).factor(99, 100, math.inf) == 1.0
    assert Schedule("inverse_sqrt", hold_examples=50, warmup_examples=100).factor(40, 50, math.inf) == 0.5
    assert Schedule("inverse_sqrt", hold_examples=50, floor=0.3).factor(10**6, 10**6 + 1, math.inf) == 0.3


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_after_the_end_the_rate_stays_at_the_floor(shape):
    schedule = Schedule(shape, warmup=0.1, floor=0.25)
    assert [schedule.factor(seen, seen + 10, 100) for seen in (100, 110, 1000)] == [0.25] * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [{}, {"warmup": 0.1}, {"warmup_examples": 640}])
def test_the_rate_goes_by_examples_and_not_by_batch_size(shape, warmup):
    schedule = Schedule(shape, **warmup, floor=0.05)
    small, large = factors(schedule, 32, 6400), factors(schedule, 128, 6400)
    assert len(small) == 4 * len(large) == 200
    by_after = {after: factor for (_, after), factor in small.items()}
    by_before = {before: factor for (before, _), factor in small.items()}
    warm = 640 if warmup else 0
    for (before, after), factor in large.items():
        assert factor == (by_after[after] if after < warm else by_before[before] if before >= warm else 1.0)
    assert sum(large.values()) / len(large) == pytest.approx(sum(small.values()) / len(small), abs=0.02)


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    total=st.integers(1, 10_000),
    batch_size=st.integers(1, 2_000),
)
def test_up_and_then_down_within_bounds(shape, warmup, floor, total, batch_size):
    found = list(factors(Schedule(shape, warmup, floor=floor), batch_size, total).values())
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert all(0 < factor <= 1 for factor in found[: top + 1])
    assert all(factor >= floor - 1e-15 for factor in found[top:]) or warmup == 1


def test_training_without_an_end():
    assert Schedule(warmup_examples=100).factor(40, 50, math.inf) == 0.5
    assert Schedule(warmup=0.5, warmup_examples=100).factor(40, 50, math.inf) == 0.5
    assert Schedule().factor(10**9, 10**9 + 1, math.inf) == 1.0


@pytest.mark.parametrize(
    ("schedule", "needs"),
    [
        (Schedule(), False),
        (Schedule(warmup_examples=100), False),
        (Schedule(warmup=0.1, warmup_examples=100), False),
        (Schedule(warmup=0.1, warmup_examples=0), False),
        (Schedule(warmup=0.1), True),
        (Schedule("cosine"), True),
        (Schedule("linear", warmup_examples=100), True),
        (Schedule("inverse_sqrt", hold_examples=100), False),
        (Schedule("inverse_sqrt", warmup=0.1), True),
    ],
)
def test_needs_end(schedule, needs):
    assert schedule.needs_end is needs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": -0.1}, "schedule.warmup is -0.1: write a share of the training, from 0 to 1"),
        ({"warmup": 500}, "schedule.warmup is 500: "),
        ({"warmup": math.nan}, "schedule.warmup is nan: "),
        ({"floor": 1.5}, "schedule.floor is 1.5: write a share of the full rate, from 0 to 1"),
        ({"floor": -1}, "schedule.floor is -1: "),
        ({"warmup_examples": -5}, "schedule.warmup_examples is -5: write a number of examples"),
        ({"shape": "sqrt"}, "schedule.shape is sqrt: write constant, cosine, linear or inverse_sqrt"),
        ({"shape": "inverse_sqrt"}, "schedule.shape is inverse_sqrt: write hold_examples"),
        ({"shape": "inverse_sqrt", "hold_examples": 0}, "schedule.hold_examples is 0, with shape inverse_sqrt: write"),
        ({"hold_examples": 10}, "hold_examples is 10, with shape constant: write .* with shape: inverse_sqrt"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**wrong)
