import pytest
import torch
from helpers import p_value
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchwise.batching.permutation import Permutation
from batchwise.batching.random import mix

SIZES = [2**20 + 1, 1448**2, 1448**2 + 1, 2**21, 2**21 + 1]
"""Just above what is shuffled in one piece; full squares; squares with a row too many; powers of two."""


@given(size=st.integers(1, 3000), key=st.integers(-(2**63), 2**63 - 1))
def test_it_is_a_permutation(size, key):
    assert torch.equal(Permutation(key, size)(torch.arange(size)).sort().values, torch.arange(size))


def test_each_position_is_computed_by_itself():
    permutation = Permutation(3, 10**9)
    positions = torch.tensor([0, 10**9 - 1, 5 * 10**8, 17])
    drawn = permutation(positions)
    assert positions.tolist() == [0, 10**9 - 1, 5 * 10**8, 17]
    assert drawn.dtype == torch.int64
    assert bool((drawn < 10**9).all() and (drawn >= 0).all())
    for position, number in zip(positions, drawn, strict=True):
        assert Permutation(3, 10**9)(position[None]).item() == number
        assert Permutation(4, 10**9)(position[None]).item() != number


@pytest.mark.parametrize("size", [1009, 1024, 1025])
@pytest.mark.weekly
def test_positions_and_pairs_are_uniform_over_many_permutations(size):
    drawn = torch.stack([Permutation(mix(5, key), size)(torch.arange(size)) for key in range(4000)])
    for position in (0, size // 2, size - 1):
        assert p_value(drawn[:, position].bincount(minlength=size)) > 0.001
    for lag in (1, 32, 33):  # neighbours in a row of the square, in a column, on a diagonal
        distance = (drawn[:, lag:] - drawn[:, :-lag]) % size
        assert p_value(distance.flatten().bincount(minlength=size)[1:]) > 0.001


def neighbours(drawn: Tensor, size: int, side: int) -> dict[str, float]:
    """P-values of tests that see a whole permutation: neighbours in the square, and small squares of four."""
    found = {}
    for lag in (1, 2, side - 1, side, side + 1):
        before, after = drawn[:-lag], drawn[lag:]
        distance = (after - before) % size
        found[f"cells {lag}"] = p_value((before * 32 // size * 32 + after * 32 // size).bincount(minlength=1024))
        found[f"distances {lag}"] = p_value((distance * 4096 // size).bincount(minlength=4096))
        found[f"columns {lag}"] = p_value((distance % side).bincount(minlength=side))
        # The distance kept, forwards or backwards: by chance twice.
        found[f"kept {lag}"] = at_least(int(((distance == lag) | (distance == size - lag)).sum()), 2.0)
    square = (drawn[: -side - 1] - drawn[1:-side] - drawn[side:-1] + drawn[side + 1 :]) % size
    found["squares"] = p_value((square * 4096 // size).bincount(minlength=4096))
    found["squares kept"] = at_least(int((square == 0).sum()), 1.0)
    return found


def at_least(count: int, mean: float) -> float:
    """Return the probability that a Poisson number is at least `count`."""
    return 1.0 if count == 0 else float(torch.special.gammainc(torch.tensor(float(count)), torch.tensor(mean)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.weekly
def test_neighbours_of_a_large_permutation_are_independent(size):
    permutation = Permutation(mix(1, size), size)
    drawn = permutation(torch.arange(size))
    assert torch.equal(drawn.sort().values, torch.arange(size))
    found = neighbours(drawn, size, permutation.side)
    assert min(found.values()) > 1e-4, found  # of 22


def test_the_tests_see_too_few_rounds(monkeypatch):
    monkeypatch.setattr("batchwise.batching.permutation._ROUNDS", 4)
    size = 2**21 + 1
    permutation = Permutation(mix(1, size), size)
    found = neighbours(permutation(torch.arange(size)), size, permutation.side)
    assert min(found.values()) < 1e-12, found
