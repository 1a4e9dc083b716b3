import math
from time import process_time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchwise.batching.packing import best_fit


@given(st.lists(st.integers(1, 50), max_size=80))
def test_each_sequence_once_and_no_block_too_full(lengths: list[int]) -> None:
    blocks = best_fit(lengths, 50)
    assert sorted(number for block in blocks for number in block) == list(range(len(lengths)))
    room = [50 - sum(lengths[number] for number in block) for block in blocks]
    assert min(room, default=0) >= 0
    fewest = math.ceil(sum(lengths) / 50)
    assert len(blocks) <= 11 / 9 * max(fewest, sum(length > 25 for length in lengths)) + 4
    # No two blocks would go into one.
    assert sum(sorted(50 - left for left in room)[:2]) > 50 or len(blocks) < 2


def test_where_the_least_room_is_left() -> None:
    # 7 and 6 open blocks with 3 and 4 left; 4 fits into the second, 3 into the first, and 2 into none.
    assert best_fit([2, 3, 4, 6, 7], 10) == [[4, 1], [3, 2], [0]]


@pytest.mark.parametrize("length", [0, 11])
def test_a_sequence_that_fits_into_no_block(length: int) -> None:
    with pytest.raises(ValueError, match=f"sequence 1 has the length {length}: a block takes 1 to 10"):
        best_fit([3, length], 10)


def test_fill_and_time_on_log_normal_lengths() -> None:
    lengths = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(0.8).add(4.5).exp()
    sizes = lengths.long().clamp(1, 512).tolist()
    start = process_time()
    blocks = best_fit(sizes, 512)
    assert process_time() - start < 2
    assert sum(sizes) / (512 * len(blocks)) > 0.999
