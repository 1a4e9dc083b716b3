"""Random numbers and permutations as pure functions of integer keys, such as (seed, step, position)."""

from hashlib import blake2b
from math import pi, prod
from typing import overload

import numpy as np
import torch
from torch import Tensor

# The increment and the multipliers of SplitMix64, as signed numbers because torch lacks unsigned arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64

_ALL = 2**64 - 1
_START = 1234567  # the seed of the published test values. From 0, `mix(-1, key)` would be `mix(key)`
_ROUNDS = 40  # of `permute`, which says why


@overload
def mix(*keys: int) -> int: ...
@overload
def mix(*keys: int | Tensor) -> Tensor: ...
def mix(*keys: int | Tensor) -> int | Tensor:
    """Hash integers to 63 random bits.

    Each key advances SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") by that
    many steps. Its output is the state for the next key. So `mix(i)` is output i of one generator, and the order of the
    keys matters. Keys are taken modulo 2**64.

    Args:
        keys: integers, or integer tensors of any shapes that broadcast together, on one device.

    Returns:
        An int in [0, 2**63). If a key is a tensor, an int64 tensor with the same values, element by element. The sign
        bit is left out, so that the number can seed any generator.
    """
    state: int | Tensor = _START
    for key in keys:
        if isinstance(key, Tensor) or isinstance(state, Tensor):
            state = _scramble(_int64(state) + _int64((_int64(key) + 1) * _GOLDEN))  # pyright: ignore[reportArgumentType]
        else:
            x = (state + (int(key) + 1) * _GOLDEN) & _ALL
            x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _ALL
            x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _ALL
            state = x ^ (x >> 31)
    return state & (2**63 - 1)


def uniform(key: int | Tensor, counters: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), float64, one per counter: 53 bits of `mix(key, counter)`.

    Args:
        key: names the stream, such as `mix(seed, step)`. A tensor of keys broadcasts against `counters`.
        counters: integers of any shape, such as positions in the batch.
    """
    return (mix(key, counters) >> 10).to(torch.float64) * 2.0**-53


def keyed(
    key: int | Tensor, name: str, examples: Tensor, shape: tuple[int, ...], normal: bool, dtype: torch.dtype
) -> Tensor:
    """Return random numbers for examples, [N, *shape], on their device: a function of key, name and example.

    Args:
        key: such as that of (seed, step).
        name: what the numbers are for.
        examples: whole numbers [N], such as positions in the batch.
        shape: of the numbers for each of them.
        normal: draw from the standard normal distribution (Box and Muller 1958), and not uniformly from [0, 1).
        dtype: floats.
    """
    salt = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    count = prod(shape)
    places = torch.arange(count * (1 + normal), device=examples.device)
    draws = uniform(mix(key, salt, examples)[:, None], places)
    if normal:
        radius, angle = draws[:, :count], draws[:, count:]
        draws = (-2 * (1 - radius).log()).sqrt() * (2 * pi * angle).cos()  # of a number above 0
    else:
        draws = draws.clamp_max(1 - torch.finfo(dtype).eps / 2)  # below 1, although the type rounds
    return draws.to(dtype).view(len(examples), *shape)


def permute(key: int | Tensor, size: int | Tensor, positions: Tensor) -> Tensor:
    """Return where a random permutation of 0 to size-1 sends the given positions, int64.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012, arXiv 1208.1176). Each round pairs x with offset - x modulo
    size, and swaps the pair or not by one random bit. It works for any size, however small, and each element may be in
    a permutation of its own. For one large permutation, `Permutation` is much faster.

    In a round, two numbers keep their distance with probability 1/2; otherwise it becomes uniform. So after 40 rounds,
    of 10**9 pairs of neighbours one is still unmixed in one of a thousand permutations.

    Args:
        key: names the permutation. A tensor of keys broadcasts against `positions`.
        size: number of things permuted, at least 1, or a tensor of such.
        positions: int64, any shape, in [0, size).
    """
    for number in range(_ROUNDS):
        round_key = mix(key, number)
        partner = round_key % size - positions
        partner = partner + ((partner >> 63) & size)  # modulo size: add it where the number is negative
        swap = mix(round_key, torch.maximum(positions, partner)) & 1  # the same bit for both of the pair
        positions = torch.where(swap == 1, partner, positions)
    return positions


def _scramble(x: Tensor) -> Tensor:
    """Return the output function of SplitMix64 (Stafford's variant 13), in place."""
    if x.device.type == "cpu":
        bits = x.numpy().view(np.uint64)  # half the work, because shifts of unsigned numbers are logical
        for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, 1)):
            bits ^= bits >> np.uint64(shift)
            if factor != 1:
                bits *= np.uint64(factor & _ALL)
        return x
    for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, 1)):
        shifted = x >> shift
        shifted &= 2 ** (64 - shift) - 1  # a logical shift: `>>` copies the sign bit into the top
        x ^= shifted
        if factor != 1:
            x *= factor
    return x


def _int64(x: int | Tensor) -> int | Tensor:
    """Wrap a Python int around, as an int64 tensor does by itself."""
    return x.long() if isinstance(x, Tensor) else (int(x) + 2**63) % 2**64 - 2**63
