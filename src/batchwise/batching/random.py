"""Random numbers and permutations as pure functions of integer keys such as (seed, step, position): no generator."""

from typing import overload

import numpy as np
import torch
from torch import Tensor

# SplitMix64's increment and multipliers, written as signed 64-bit numbers because torch has no unsigned arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64

_START = 1234567  # the seed of the published test values; from 0, `mix(-1, key)` would be `mix(key)`
_ROUNDS = 40  # of `permute`, which says why


@overload
def mix(*keys: int) -> int: ...
@overload
def mix(*keys: int | Tensor) -> Tensor: ...
def mix(*keys: int | Tensor) -> int | Tensor:
    """Hash integers to 63 random bits.

    Each key moves the state of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators") by that many steps, and its output is the state for the next key. So `mix(i)` is output i of one
    generator, and the order of keys matters. Keys count modulo 2**64.

    Args:
        keys: integers, or integer tensors of any shapes that broadcast together, on one device.

    Returns:
        An int in [0, 2**63), or where any key is a tensor an int64 tensor with the same values element by element.
        The sign bit is left out so that the number is good as the seed of any generator.
    """
    state: int | Tensor = _START
    for key in keys:
        state = _scramble(_int64(state + _int64((_int64(key) + 1) * _GOLDEN)))
    return state & (2**63 - 1)


def uniform(key: int | Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one per counter: 53 bits of `mix(key, counter)`.

    Args:
        key: names the stream, such as `mix(seed, step)`; a tensor of keys broadcasts against `counters`.
        counters: integers, any shape, such as positions in the batch.
    """
    return (mix(key, counters) >> 10).to(torch.float64) * 2.0**-53


def permute(key: int | Tensor, size: int | Tensor, positions: Tensor) -> Tensor:
    """Where a random permutation of 0 to size-1 sends the given positions, int64, without computing the others.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012, arXiv 1208.1176): each round pairs x with offset - x modulo
    size and swaps the pair or not by one random bit. It works on any size as it is, the smallest too.

    In a round two examples keep their distance with probability 1/2, else it becomes uniform: after 40 rounds, of
    10**9 neighbours one pair in a thousand permutations is still together for want of mixing.

    Args:
        key: names the permutation.
        size: number of things permuted, at least 1. With tensors of keys and sizes, each element is in a permutation
            of its own.
        positions: int64, any shape, in [0, size).
    """
    for number in range(_ROUNDS):
        round_key = mix(key, number)
        partner = round_key % size - positions
        partner = partner + ((partner >> 63) & size)  # modulo size: adds it where negative
        swap = mix(round_key, torch.maximum(positions, partner)) & 1  # the same bit for both of the pair
        positions = torch.where(swap == 1, partner, positions)
    return positions


def _scramble(x: int | Tensor) -> int | Tensor:
    """The output function of SplitMix64 (Stafford's variant 13), the same for an int and for an int64 tensor.

    Changes a tensor in place.
    """
    if isinstance(x, Tensor) and x.device.type == "cpu":
        bits = x.numpy().view(np.uint64)  # half the work, for shifts of unsigned numbers are logical
        for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, 1)):
            bits ^= bits >> np.uint64(shift)
            if factor != 1:
                bits *= np.uint64(factor % 2**64)
        return x
    for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, 1)):
        shifted = x >> shift
        shifted &= 2 ** (64 - shift) - 1  # a logical shift: `>>` copies the sign bit into the top
        x ^= shifted
        if factor != 1:
            x *= factor
            x = _int64(x)
    return x


def _int64(x: int | Tensor) -> int | Tensor:
    """Give a Python int the wraparound that int64 tensors have by themselves."""
    return x.long() if isinstance(x, Tensor) else (int(x) + 2**63) % 2**64 - 2**63
