import os
import random
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from batchwise.batching.fetch import DataError, InMemory, Request, Rows, Workers, make_fetch

REQUESTS = [[3, 1], [0], [4, 4, 2], [1]]


class Squares(Dataset):
    """Example i is `make(i)`."""

    def __init__(self, make, length: int = 5) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int):
        return self.make(i)


class AtOnce(Squares):
    def __getitem__(self, i: int):
        raise AssertionError("one by one")

    def __getitems__(self, indices: list[int]):
        assert all(type(i) is int for i in indices)
        return [(*self.make(i), len(indices)) for i in indices]


def pair(i: int) -> tuple[torch.Tensor, int]:
    return torch.full((2, 3), float(i)), i * i


def asked(*requests: list[int]) -> list[Request]:
    """The micro-batches in requests of two."""
    pairs = [requests[i : i + 2] for i in range(0, len(requests), 2)]
    return [
        Request(
            torch.tensor([i for part in pair for i in part]),
            [len(part) for part in pair],
            [100 * number + place for place in range(len(pair))],
        )
        for number, pair in enumerate(pairs)
    ]


def read(fetch, requests=REQUESTS) -> list[tuple]:
    read = list(fetch.stream(asked(*requests)))
    assert all(weights is None for _, weights in read)
    return [fields for fields, _ in read]


@pytest.mark.parametrize("as_type", [torch.Tensor, np.ndarray])
def test_in_memory_is_a_gather(as_type):
    inputs, targets = torch.arange(30).view(5, 2, 3), torch.arange(5).to(torch.uint8) ** 2
    values = (inputs, targets) if as_type is torch.Tensor else (inputs.numpy(), targets.numpy())
    fetch = InMemory(values)
    assert len(fetch) == 5
    for request, (x, y) in zip(REQUESTS, read(fetch), strict=True):
        assert x.tolist() == [inputs[i].tolist() for i in request]
        assert y.tolist() == [i * i for i in request]
        assert (x.dtype, y.dtype) == (torch.int64, torch.uint8)


def test_in_memory_does_not_hand_out_its_own_memory():
    inputs = torch.arange(5)
    (x,), _ = next(InMemory([inputs]).stream([Request.one(torch.arange(5))]))
    x.zero_()
    assert inputs.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16, torch.bool])
def test_memory_is_used_again_only_where_nobody_looks(dtype):
    inputs = torch.arange(3000).view(1500, 2).to(dtype)
    requests = [Request.one(torch.arange(i, i + 5)) for i in range(0, 1500, 5)]
    views = [x[2:4] for (x,), _ in InMemory([inputs]).stream(requests)]  # views of what was handed out
    assert all(torch.equal(view, inputs[i + 2 : i + 4]) for i, view in zip(range(0, 1500, 5), views, strict=True))
    addresses = {x.data_ptr() for (x,), _ in InMemory([inputs]).stream(requests)}
    assert len(addresses) <= 2 or dtype == torch.bfloat16


def test_a_gather_takes_whole_micro_batches_up_to_a_block(monkeypatch):
    monkeypatch.setattr("batchwise.batching.fetch._BLOCK", 5 * 8)
    taken, take = [], np.take
    monkeypatch.setattr(np, "take", lambda x, i, *rest, **more: taken.append(len(i)) or take(x, i, *rest, **more))
    sizes = [2, 2, 2, 7, 1, 4, 5, 6]
    fields = [
        x.tolist() for (x,), _ in InMemory([torch.arange(29)]).stream([Request(torch.arange(29), sizes, [0] * 8)])
    ]
    assert fields == [x.tolist() for x in torch.arange(29).split(sizes)]
    assert taken == [4, 2, 7, 5, 5, 6]


@pytest.mark.parametrize("slow", [True, False])
def test_a_memory_map_on_a_slow_disk_is_read_ahead_by_a_thread(tmp_path, monkeypatch, slow):
    monkeypatch.setattr("batchwise.batching.fetch._SLOW", -1 if slow else 1000)
    monkeypatch.setattr("batchwise.batching.fetch._PARCEL", 1)
    np.save(tmp_path / "inputs.npy", np.arange(10))
    fetch = make_fetch(np.load(tmp_path / "inputs.npy", mmap_mode="r"))
    assert str(fetch) == "mapped"
    threads = []
    requests = (threads.append(threading.current_thread()) or Request.one(torch.tensor([i])) for i in range(10))
    stream = fetch.stream(requests)
    assert [next(stream)[0][0].item() for _ in range(4)] == [0, 1, 2, 3]
    stream.close()
    others = set(threads) - {threading.main_thread()}
    assert len(others) == slow
    assert len(threads) <= 7
    assert not any(thread.is_alive() for thread in others)  # an epoch that ends early leaves none behind


@pytest.mark.parametrize("index", [[-1], [0, 10]])
def test_an_example_that_is_not_there(index):
    with pytest.raises(IndexError, match="were asked for, of 10"):
        list(InMemory([torch.arange(10)]).stream([Request.one(torch.tensor(index))]))


def test_an_error_in_the_thread_comes_out(tmp_path, monkeypatch):
    monkeypatch.setattr("batchwise.batching.fetch._SLOW", -1)
    np.save(tmp_path / "inputs.npy", np.arange(10))
    requests = [Request.one(torch.tensor([i])) for i in (1, 2, 99)]
    with pytest.raises(IndexError, match="examples 99 to 99 were asked for, of 10"):
        list(make_fetch(np.load(tmp_path / "inputs.npy", mmap_mode="r")).stream(requests))


def test_fields_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="differ in length: 7 and 5 examples"):
        InMemory((torch.zeros(7, 2), np.zeros(5)))
    with pytest.raises(ValueError, match="7 and 7 and 6"):
        InMemory((torch.zeros(7), torch.zeros(7), torch.zeros(6)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_a_data_set_in_order(num_workers):
    fetch = Workers(Squares(pair), num_workers)
    assert len(fetch) == 5
    for request, (x, y) in zip(REQUESTS, read(fetch), strict=True):
        assert x.shape == (len(request), 2, 3)
        assert x[:, 1, 2].tolist() == request
        assert y.tolist() == [i * i for i in request]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_whole_micro_batch_is_asked_for_at_once(num_workers):
    for request, (x, y, asked) in zip(REQUESTS, read(Workers(AtOnce(pair), num_workers)), strict=True):
        assert x[:, 0, 0].tolist() == request
        assert y.tolist() == [i * i for i in request]
        assert asked.tolist() == [len(request)] * len(request)


def worker_of(i: int) -> tuple[int, int]:
    info = get_worker_info()
    return i, -1 if info is None else info.id


def test_num_workers_is_the_number_of_processes():
    seen = {
        workers: {int(w[0]) for _, w in read(Workers(Squares(worker_of), workers), [[0, 1]] * 6)} for workers in (0, 2)
    }
    assert seen == {0: {-1}, 2: {0, 1}}
    # A micro-batch is read by one process.
    assert all(len(w.unique()) == 1 for _, w in read(Workers(Squares(worker_of), 2)))


def test_workers_outlive_an_epoch_also_one_that_ends_early():
    fetch = Workers(Squares(lambda i: os.getpid(), length=100), 2)
    next(fetch.stream(asked(*[[i] for i in range(100)])))
    second = {int(x) for (x,), _ in fetch.stream(asked([0], [1], [2], [3]))}
    third = {int(x) for (x,), _ in fetch.stream(asked([0], [1], [2], [3]))}
    assert second == third
    assert len(second) == 2
    assert os.getpid() not in second


def draws(i: int) -> tuple[int, float, float, float]:
    return i, torch.rand(()).item(), np.random.rand(), random.random()


def test_what_examples_draw_depends_on_their_place_alone():
    def read(workers: int, *sizes: int, seed: int = 7, first: int = 0) -> torch.Tensor:
        positions = [first + sum(sizes[:i]) for i in range(len(sizes))]
        requests = [Request(torch.arange(12) % 5, list(sizes), positions)]
        return torch.cat(
            [
                torch.stack([x.double() for x in fields], 1)
                for fields, _ in Workers(Squares(draws), workers).stream(requests, seed)
            ]
        )

    here = read(0, 12)
    assert torch.equal(here, read(0, 5, 7))
    assert torch.equal(here, read(2, 3, 4, 5))
    for other in (read(0, 12, seed=8), read(0, 12, first=1)):
        assert (here[:, 1:] != other[:, 1:]).all()
    assert len(here[:, 1:].unique()) == 36  # also where an example comes twice


def test_generators_of_this_process_are_left_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = draws(0)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    read(Workers(Squares(draws), 0), [[1, 2]])
    assert draws(0) == before


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda i: {"a": i, "b": [i + 1.0]}, ({"a": [3, 1], "b": [[4.0, 2.0]]},)),
        (lambda i: ({"a": i}, i * i), ({"a": [3, 1]}, [9, 1])),
        (lambda i: [i, i + 1, i + 2], ([3, 1], [4, 2], [5, 3])),
        (lambda i: torch.tensor(i), ([3, 1],)),
        (lambda i: (i,), ([3, 1],)),
    ],
    ids=["dict", "dict and target", "three", "tensor", "tuple of one"],
)
def test_items_of_any_structure(make, expected):
    (fields,) = read(Workers(Squares(make)), [[3, 1]])
    assert isinstance(fields, tuple)

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value.tolist()

    assert tuple(map(plain, fields)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(Workers(Squares(pair), num_workers))
    read(InMemory(pair(4)[:1]), [[1, 0]])
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_maps_are_read_where_they_are(tmp_path):
    written = np.memmap(tmp_path / "inputs", np.float32, "w+", shape=(5, 2))
    written[:] = np.arange(10).reshape(5, 2)
    fetch = make_fetch(np.memmap(tmp_path / "inputs", np.float32, "r+", shape=(5, 2)))
    written[4] = -1
    written.flush()
    assert [x.tolist() for (x,) in read(fetch, [[4, 0]])] == [[[-1, -1], [0, 1]]]


def test_make_fetch_chooses():
    inputs, targets = torch.arange(4), np.arange(4)
    for source, fields in ((inputs, 1), (targets, 1), ((inputs, targets), 2), ([inputs, targets, inputs], 3)):
        fetch = make_fetch(source, num_workers=2)
        assert isinstance(fetch, InMemory)
        assert len(fetch.fields) == fields
        assert len(fetch) == 4
    own = InMemory((inputs,))
    assert make_fetch(own) is own
    workers = make_fetch(Squares(pair), num_workers=2)
    assert isinstance(workers, Workers)
    assert (workers.num_workers, len(workers)) == (2, 5)
    assert isinstance(make_fetch(TensorDataset(inputs)), Workers)
    examples = [(inputs[0], 1), (inputs[1], 2)]  # a list of examples is a map-style data set
    assert [x.tolist() for _, x in read(make_fetch(examples), [[1, 0]])] == [[2, 1]]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


@pytest.mark.parametrize("source", [Endless(), iter([1]), 7])
def test_what_cannot_be_read_by_number_is_refused(source):
    with pytest.raises(ValueError, match=f"{type(source).__name__} has no __getitem__ and __len__"):
        make_fetch(source)


class Torn(Squares):
    """Some examples cannot be read."""

    torn = (3, 8)

    def __getitem__(self, i: int):
        if i in self.torn:
            raise OSError(f"cannot identify image file 'img_{i}.png'")
        return self.make(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_example_ends_reading_with_its_number_and_path(workers):
    with pytest.raises(DataError, match=r"example 3 cannot be read \(OSError: .*img_3.png.*max_unreadable 2"):
        list(Workers(Torn(pair), workers).stream(asked([1, 2], [3, 4])))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_examples_are_left_out_up_to_a_limit(workers, capsys):
    fetch = Workers(Torn(pair), workers, max_unreadable=2)
    requests = asked([1, 2], [3, 4], [8, 3], [3, 5])
    (_, first), (second, second_weights), (_, third), (_, fourth) = fetch.stream(requests)
    assert first is None
    assert second_weights.tolist() == [0, 1]
    assert second[1].tolist() == [16, 16]  # example 4 keeps the place of example 3
    assert third.tolist() == [0, 0]
    assert fourth.tolist() == [0, 1]
    assert fetch.unreadable == {3, 8}
    assert capsys.readouterr().out.count("left out") == 2  # said once each
    with pytest.raises(DataError, match="example 8 cannot be read"):
        list(Workers(Torn(pair), workers, max_unreadable=1).stream(requests))


def test_nothing_can_be_read():
    class Gone(Torn):
        torn = range(100)

    with pytest.raises(DataError, match="no example can be read"):
        list(Workers(Gone(pair), 0, max_unreadable=100).stream(asked([1, 2])))


def test_a_killed_worker_is_one_line():
    import signal

    class Killer(Squares):
        def __getitem__(self, i: int):
            if i == 4 and torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.make(i)

    with pytest.raises(DataError, match=r"killed, probably for want of memory: lower data.num_workers"):
        list(Workers(Killer(pair), 1).stream(asked([1, 2], [3, 4], [5, 6])))


def test_rows_of_an_array_are_gathered_without_a_copy(tmp_path):
    array = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=(50, 3))
    array[:] = np.arange(150).reshape(50, 3)
    index = torch.tensor([40, 7, 7, 0, 49])
    fetch = make_fetch((Rows(array, index), torch.arange(5)))
    assert (len(fetch), str(fetch), fetch.nbytes) == (5, "mapped", 15 + 40)
    order = torch.tensor([4, 1, 0, 3, 2, 2])
    reads = list(fetch.stream([Request(order, [2, 3, 1], [0, 2, 5])]))
    assert torch.equal(torch.cat([fields[0] for fields, _ in reads]), torch.as_tensor(array[index[order].numpy()]))
    assert torch.cat([fields[1] for fields, _ in reads]).tolist() == order.tolist()
    assert torch.equal(Rows(array, index).to(torch.device("cpu")), torch.as_tensor(array[index.numpy()]))
    with pytest.raises(IndexError):
        list(fetch.stream([Request.one(torch.tensor([5]))]))
