import pytest
import torch
from helpers import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchwise.batching import shards as module
from batchwise.batching.shards import BlockShuffled

SIZES = torch.tensor([13, 7, 20, 5, 9, 11, 4, 30, 2, 16])


def prepared(window: int, sizes: Tensor = SIZES, batch_size: int = 8, seed: int = 0) -> BlockShuffled:
    return BlockShuffled(window).prepare(int(sizes.sum()), batch_size, seed, shards=sizes)


def file_of(index: Tensor, sizes: Tensor = SIZES) -> Tensor:
    return torch.searchsorted(sizes.cumsum(0), index, right=True)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 25),
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_every_example_once_and_any_slice_without_walking(sizes, window, batch_size, seed, data):
    order = prepared(window, torch.tensor(sizes), batch_size, seed)
    epoch = data.draw(st.integers(0, 5))
    whole = order.indices(epoch, 0, len(order))
    assert whole.sort().values.tolist() == list(range(sum(sizes)))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(order))] * 2)))
    assert prepared(window, torch.tensor(sizes), batch_size, seed).indices(epoch, a, b).tolist() == whole[a:b].tolist()


def test_a_window_is_a_few_files_and_a_batch_stands_file_by_file() -> None:
    sizes = torch.full((10,), 24)
    order = prepared(3, sizes)
    for epoch in range(4):
        files = file_of(order.indices(epoch, 0, 240), sizes)
        for file in range(10):
            places = (files == file).nonzero()
            assert 24 < places.max() - places.min() < 3 * 24
        for batch in files.split(8):
            assert (batch.diff() != 0).sum() == len(batch.unique()) - 1


def test_a_large_window_is_shuffled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.full((4,), 600)
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    order = prepared(2, sizes)
    assert order.indices(1, 0, 2400).sort().values.tolist() == list(range(2400))


def test_places_in_a_window_are_equally_likely() -> None:
    """Where an example of a window of all files comes: the batch, over many seeds."""
    sizes, counts = torch.tensor([6, 10, 8]), torch.zeros(24, 6)
    for seed in range(600):
        order = prepared(99, sizes, batch_size=4, seed=seed).indices(0, 0, 24)
        counts[order, torch.arange(24) // 4] += 1
    assert p_value(counts) > 1e-3


@pytest.mark.parametrize(("window", "alike"), [(1, 1.0), (4, 1.0), (10, 1.0), (40, 1.0), (4, 0.3), (4, 0.0)])
@pytest.mark.slow
def test_worth_is_the_measured_variance_of_a_batch(window: int, alike: float) -> None:
    files, each, batch_size = 40, 50, 25
    generator = torch.Generator().manual_seed(0)
    between = torch.randn(files, generator=generator).repeat_interleave(each)
    values = alike**0.5 * (between - between.mean()) / between.std() if alike else torch.zeros(files * each)
    values = values + (1 - alike) ** 0.5 * torch.randn(files * each, generator=generator)
    values = (values - values.mean()) / values.std()
    means = []
    for seed in range(120):
        order = prepared(window, torch.full((files,), each), batch_size, seed)
        means.append(values[order.indices(0, 0, files * each)].view(-1, batch_size).mean(1))
    measured = 1 / torch.cat(means).square().mean().item()
    assert order.worth(batch_size, alike) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("alike", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_a_window_that_is_enough(alike: float, batch_size: int) -> None:
    sizes = torch.full((60,), 20)
    enough = prepared(1, sizes).enough(batch_size, alike)
    assert 1 <= enough <= 60
    divisors = [window for window in range(1, 61) if 60 % window == 0]  # else windows are smaller than they may be
    for window in divisors:
        assert (prepared(window, sizes).worth(batch_size, alike) >= batch_size / 2 - 1e-9) == (window >= enough)


def test_each_of_two_devices_needs_about_half_of_the_files() -> None:
    sizes = torch.full((20,), 100)
    batches = file_of(prepared(20, sizes, batch_size=200).indices(0, 0, 2000), sizes).view(10, 200)
    for share in (batches[:, :100], batches[:, 100:]):
        assert len(share.unique()) <= 14


def test_the_plan_says_how_far_it_is_from_uniform() -> None:
    assert prepared(99).summary(8) == "all 10 shards are shuffled together"
    line = prepared(3).summary(8)
    assert line.startswith(
        "10 shards are shuffled in 4 windows of 2.5: if the examples of a shard are all alike, a batch"
    )
    assert line.endswith("of 8 says as much as 2.4 random ones")


def test_a_billion_examples_in_a_hundred_thousand_files() -> None:
    order = prepared(16, torch.full((100_000,), 10_000), batch_size=512)
    index = order.indices(3, 512 * 1_000_000, 512 * 1_000_001)
    assert len(set(file_of(index, order.shards).tolist())) == 16


def test_data_without_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="which these data have not: take Shuffled"):
        BlockShuffled().prepare(10, 2, 0)
