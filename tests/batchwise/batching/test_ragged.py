import numpy as np
import pytest
import torch

from batchwise.batching.fetch import Request, make_fetch
from batchwise.batching.ragged import Ragged

LENGTHS = [3, 0, 5, 1, 2]
OFFSETS = np.cumsum([0, *LENGTHS])
REQUESTS = [Request(torch.tensor([4, 2, 1, 3, 0]), [2, 1, 2], [0, 2, 3]), Request.one(torch.tensor([1, 1]))]


def read(fetch) -> list[tuple[torch.Tensor, ...]]:
    return [fields for fields, weights in fetch.stream(REQUESTS) if weights is None]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_each_micro_batch_is_as_wide_as_its_longest_sequence(dtype):
    values = np.arange(OFFSETS[-1]).astype(dtype)
    first, second, third, fourth = read(make_fetch(Ragged(values, OFFSETS)))
    assert first[0].tolist() == [[9, 10, -1, -1, -1], [3, 4, 5, 6, 7]]
    assert second[0].tolist() == [[-1]]  # an empty sequence still has a place
    assert third[0].tolist() == [[8, -1, -1], [0, 1, 2]]
    assert fourth[0].tolist() == [[-1], [-1]]
    assert {batch.dtype for (batch,) in (first, second, third, fourth)} == {torch.int32}


def test_fractions_of_several_features_are_padded_with_zeros():
    values = torch.arange(2.0 * OFFSETS[-1], dtype=torch.float64).view(-1, 2) + 1
    first, *_ = read(Ragged(values, torch.as_tensor(OFFSETS)))
    assert first[0].dtype == torch.float64
    assert first[0][0].tolist() == [[19, 20], [21, 22], [0, 0], [0, 0], [0, 0]]
    assert torch.equal(first[0][1], values[3:8])


def test_other_fields_come_along():
    fetch = Ragged(np.arange(11), OFFSETS, torch.arange(5) * 10, np.arange(10.0).reshape(5, 2))
    _, labels, pairs = read(fetch)[0]
    assert labels.tolist() == [40, 20]
    assert pairs.tolist() == [[8.0, 9.0], [4.0, 5.0]]
    assert (len(fetch), fetch.lengths.tolist(), str(fetch)) == (5, LENGTHS, "ragged")
    assert fetch.nbytes == 11 * 8 + 6 * 8 + 5 * 8 + 10 * 8


def test_a_memory_map(tmp_path):
    np.save(tmp_path / "values.npy", np.arange(11, dtype=np.uint16))
    fetch = Ragged(np.load(tmp_path / "values.npy", mmap_mode="r"), OFFSETS)
    assert str(fetch) == "mapped"
    assert read(fetch)[0][0].tolist() == [[9, 10, -1, -1, -1], [3, 4, 5, 6, 7]]


@pytest.mark.parametrize("offsets", [[], [-1, 4], [0, 12], [0, 5, 3]])
def test_offsets_that_are_no_borders(offsets):
    with pytest.raises(ValueError, match="the offsets of 11 values are not their borders"):
        Ragged(np.arange(11), np.array(offsets))


def test_other_fields_of_another_length():
    with pytest.raises(ValueError, match="inputs and targets differ in length: 5 and 4 examples"):
        Ragged(np.arange(11), OFFSETS, np.arange(4))


def test_what_is_not_there_cannot_be_read():
    with pytest.raises(IndexError):
        next(Ragged(np.arange(11), OFFSETS).stream([Request.one(torch.tensor([5]))]))
