import math

import pytest
import torch
from helpers import p_value
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchwise.batching.random import mix, permute, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def permutations(size: int, number: int, seed: int = 0) -> Tensor:
    """Many permutations of one size, under different keys, [number, size]."""
    return permute(mix(seed, torch.arange(number))[:, None], size, torch.arange(size).expand(number, size))


def test_mix_is_splitmix64():
    # The first outputs for seed 1234567 (rosettacode.org, "Pseudo-random numbers/Splitmix64"), without the sign bit.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix(i) for i in range(4)] == [number & (2**63 - 1) for number in published]


@given(st.lists(INT64, min_size=1, max_size=4), st.data())
def test_mix_of_tensors_is_mix_of_ints(keys, data):
    as_tensor = [torch.tensor([key]) if data.draw(st.booleans()) else key for key in keys[1:]]
    assert mix(torch.tensor([keys[0]]), *as_tensor).tolist() == [mix(*keys)]


def test_mix_broadcasts():
    rows, columns = torch.arange(3)[:, None], torch.arange(4, dtype=torch.int32)
    assert mix(7, rows, columns).tolist() == [[mix(7, row, column) for column in range(4)] for row in range(3)]


def test_mix_tells_keys_apart():
    keys = [(), (0,), (0, 0), (1,), (-1,), (0, 1), (1, 0), (1, 1), (2**62,), (1, 2, 3), (3, 2, 1)]
    assert len({mix(*key) for key in keys}) == len(keys)
    assert mix(-1, 5) == mix(2**64 - 1, 5) != mix(5)


def test_mix_flips_half_the_bits_for_any_bit_of_any_key():
    counters = torch.arange(4000)
    for flip in [1 << bit for bit in range(0, 63, 7)]:
        changed = mix(3, counters, 5) ^ mix(3, counters ^ flip, 5)
        rates = torch.stack([(changed >> bit & 1).double().mean() for bit in range(63)])
        assert (rates - 0.5).abs().max() < 5 * 0.5 / 2000**0.5  # i and i ^ flip are one pair, seen twice


def test_uniform_is_uniform_and_independent_over_counters_and_keys():
    by_counter = uniform(mix(1, 2), torch.arange(100_000))
    by_key = uniform(torch.arange(100_000), torch.tensor(0))
    assert by_counter.dtype == torch.float64
    for u in (by_counter, by_key):
        assert u.min() >= 0
        assert u.max() < 1
        cell = (u * 20).long()
        assert p_value(cell.bincount(minlength=20)) > 0.01
        assert p_value((cell[::2] * 20 + cell[1::2]).bincount(minlength=400)) > 0.01
    assert abs(torch.corrcoef(torch.stack([by_counter, by_key]))[0, 1]) < 0.015


def test_uniform_does_not_depend_on_its_neighbours():
    whole = uniform(5, torch.arange(100))
    assert torch.equal(uniform(5, torch.arange(40, 60)), whole[40:60])
    assert torch.equal(uniform(torch.full((100,), 5), torch.arange(100)), whole)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    uniform(mix(1), permute(2, 10, torch.arange(10)))
    assert torch.equal(torch.get_rng_state(), before)


def test_permute_is_a_permutation_for_every_small_size():
    sizes = torch.arange(1, 401).repeat_interleave(torch.arange(1, 401))
    positions = torch.arange(len(sizes)) - sizes * (sizes - 1) // 2
    start = sizes * (sizes - 1) // 2
    assert torch.equal((permute(mix(8, sizes), sizes, positions) + start).sort().values, torch.arange(len(sizes)))


@given(st.integers(400, 5000), INT64)
def test_permute_is_a_permutation(size, key):
    assert torch.equal(permute(key, size, torch.arange(size)).sort().values, torch.arange(size))


def test_permute_with_tensors_is_permute_with_ints():
    keys, sizes = torch.tensor([[4], [9]]), torch.tensor([[10], [17]])
    both = permute(keys, sizes, torch.arange(10).expand(2, 10))
    assert both.tolist() == [permute(4, 10, torch.arange(10)).tolist(), permute(9, 17, torch.arange(10)).tolist()]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_permutations_of_a_small_set_are_equally_likely(size):
    code = (permutations(size, 20_000) * size ** torch.arange(size)).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(size)
    assert p_value(counts) > 0.01


@pytest.mark.parametrize("size", [5, 8, 13, 31, 64])
@pytest.mark.slow
def test_positions_and_successive_pairs_are_uniform(size):
    drawn = permutations(size, 10_000)
    for position in (0, size // 2, size - 1):
        assert p_value(drawn[:, position].bincount(minlength=size)) > 0.001
    for position in (0, size - 2):
        step = (drawn[:, position + 1] - drawn[:, position]) % size
        assert p_value(step.bincount(minlength=size)[1:]) > 0.001
    pairs = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size * size).view(size, size)
    assert p_value(pairs[~torch.eye(size, dtype=torch.bool)]) > 0.001


def test_successive_pairs_of_one_large_permutation_are_uniform():
    drawn = permute(1, 10**9, torch.arange(10**6, 10**6 + 2**17))
    assert len(drawn.unique()) == len(drawn)
    cell = drawn * 32 // 10**9
    assert p_value(cell.bincount(minlength=32)) > 0.01
    assert p_value((cell[:-1] * 32 + cell[1:]).bincount(minlength=1024)) > 0.01
    assert p_value((drawn % 97).bincount(minlength=97)) > 0.01
