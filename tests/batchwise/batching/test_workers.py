import os
import random

import numpy as np
import pytest
import small
import torch
from squares import REQUESTS, Squares, asked, pair, read
from torch import nn
from torch.utils.data import get_worker_info

from batchwise.batching.collate import stack
from batchwise.batching.fetch import DataError, InMemory, Request
from batchwise.batching.workers import Workers
from batchwise.data.mixing import MixUp
from batchwise.models.norm import GhostBatchNorm
from batchwise.tasks.classification import Classification


class AtOnce(Squares):
    def __getitem__(self, i: int):
        raise AssertionError("one by one")

    def __getitems__(self, indices: list[int]):
        assert all(type(i) is int for i in indices)
        return [(*self.make(i), len(indices)) for i in indices]


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
    for request, (x, y, together) in zip(REQUESTS, read(Workers(AtOnce(pair), num_workers)), strict=True):
        assert x[:, 0, 0].tolist() == request
        assert y.tolist() == [i * i for i in request]
        assert together.tolist() == [len(request)] * len(request)


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
        return [plain(item) for item in value] if isinstance(value, tuple) else value.tolist()

    assert tuple(map(plain, fields)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(Workers(Squares(pair), num_workers))
    read(InMemory(pair(4)[:1]), [[1, 0]])
    assert torch.equal(torch.get_rng_state(), before)


def tenth(i: int) -> tuple[torch.Tensor, int]:
    return torch.tensor(0.1), i


@pytest.mark.parametrize("num_workers", [0, 1])
def test_floats_are_of_the_type_of_where_the_data_set_was_given(num_workers):
    fetch = Workers(Squares(tenth), num_workers)
    torch.set_default_dtype(torch.float64)  # as in a training with 64-true, when the workers start
    try:
        assert next(iter(read(fetch)))[0].dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


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
    assert second[1].tolist() == [0, 16]  # example 0 keeps the place of example 3, whatever is read with it
    assert third.tolist() == [0, 0]
    assert fourth.tolist() == [0, 1]
    assert fetch.unreadable == {3, 8}
    assert capsys.readouterr().out.count("left out") == 2  # said once each
    with pytest.raises(DataError, match="example 8 cannot be read"):
        list(Workers(Torn(pair), workers, max_unreadable=1).stream(requests))


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_do_not_disturb_one_another(workers):
    """As where a callback reads a few training examples in the middle of an epoch."""
    fetch = Workers(Squares(pair), workers)
    long, other = fetch.stream(asked(*([i, i + 1] for i in range(12)))), fetch.stream(asked([7], [8], [9]))
    found = []
    for number, (fields, _) in enumerate(long):
        found.append(fields[1].tolist())
        if number in (2, 3, 11):
            assert next(other)[0][1].tolist() == [{2: 49, 3: 64, 11: 81}[number]]
        if number == 6:
            assert [fields[1].tolist() for fields, _ in fetch.stream(asked([3], [5, 6]))] == [[9], [25, 36]]
    assert found == [[i**2, (i + 1) ** 2] for i in range(12)]
    assert list(other) == []


class Missing(Torn):
    torn = range(0, small.EXAMPLES, 7)


class Partly(small.Points):
    """Every seventh of the training examples cannot be read."""

    def load(self, split: str):
        return Missing(lambda i: (self.x[i], int(self.y[i])), small.EXAMPLES) if split == "train" else (self.x, self.y)

    def labels(self):
        return self.y


@pytest.mark.parametrize("ghosts", [False, True], ids=["mixed", "ghosts"])
def test_what_looks_at_neighbours_does_not_depend_on_the_cut_where_one_cannot_be_read(ghosts):
    trained = []
    for size in (None, 4):
        norm = GhostBatchNorm(8, 4) if ghosts else nn.Identity()
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(5, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 3)).double()
        data = Partly(micro_batch_size=size, max_unreadable=10, augment=[] if ghosts else [MixUp(3)])
        trained.append(small.fit(Classification(network, optimizer=small.adamw), data)[0])
    assert small.furthest(*trained) < 1e-12


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


def test_a_worker_that_ends_by_itself_is_not_said_to_lack_memory():
    """As one does that was started anew and cannot import the data set, which was typed into a notebook."""

    class Ender(Squares):
        def __getitem__(self, i: int):
            os._exit(1)

    with pytest.raises(
        DataError, match=r"has ended by itself, for the reason above: .* in a file that can be imported"
    ):
        list(Workers(Ender(pair), 1).stream(asked([1, 2])))


class Broken(Torn):
    """Reading several examples at once has a fault of its own."""

    def __getitems__(self, indices: list[int]):
        if len(indices) > 1:
            raise TypeError("cannot stack a list")
        return [self[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_getitems_itself_is_not_hidden(workers, capsys):
    fetch = Workers(Broken(pair), workers, max_unreadable=2)
    requests = [[1], [2, 3], [3, 4]]  # with an unreadable example among them, that one is to blame
    assert [int(fields[1][-1]) for fields, _ in fetch.stream(asked(*requests))] == [1, 0, 16]
    assert fetch.unreadable == {3}
    line = r"^examples 1, 2 cannot be read at once.* TypeError: cannot stack a list at test_workers.py:\d+$"
    with pytest.raises(DataError, match=line):
        list(fetch.stream(asked([1, 2])))


class OnlyAtOnce(Squares):
    """There is no __getitem__ to fall back on."""

    def __getitem__(self, i: int):
        raise NotImplementedError

    def __getitems__(self, indices: list[int]):
        return [{"x": self.make(i)}["x" if i != 3 else "y"] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_getitems_alone_has_the_number_of_its_example(workers):
    line = r"^example 3 cannot be read \(KeyError: 'y' at test_workers.py:\d+\)"
    with pytest.raises(DataError, match=line):
        list(Workers(OnlyAtOnce(pair), workers).stream(asked([1, 2], [4, 3])))
    fetch = Workers(OnlyAtOnce(pair), workers, max_unreadable=1)
    ((_, squares), weights), *_ = fetch.stream(asked([4, 3]))
    assert (squares.tolist(), weights.tolist()) == ([16, 0], [1, 0])


class Fields(Squares):
    """Whole micro-batches as a tuple of fields."""

    def __getitems__(self, indices: list[int]):
        if 3 in indices:
            raise OSError("torn")
        return {"x": torch.tensor(indices)}, [self.make(i) for i in indices]


def test_fields_made_at_once_with_an_unreadable_example_among_them():
    fetch = Workers(Fields(lambda i: "y" * i), max_unreadable=1)
    (first, _), ((x, y), weights) = fetch.stream(asked([1, 2], [4, 3]))
    assert (first[0]["x"].tolist(), first[1]) == ([1, 2], ["y", "yy"])
    assert (x["x"].tolist(), y, weights.tolist()) == ([4, 0], ["yyyy", ""], [1, 0])


@pytest.mark.parametrize("values", [["a", 1], [1, "a"], ["a", b"a"]])
def test_a_text_among_other_values_is_one_line(values: list) -> None:
    """If the text stands first, PyTorch makes a list of them."""
    kinds = [type(value).__name__ for value in values]
    with pytest.raises(DataError, match=f"^example 4 has a {kinds[1]} at targets, and example 3 has a {kinds[0]}:"):
        stack([(0.0, value) for value in values], [3, 4])


@pytest.mark.parametrize("one", [(1.0, 2), [1.0, 2], {"x": 1.0, "y": 2}, 3.0])
def test_a_none_among_examples_is_one_line(one: object) -> None:
    """Some data sets return it for what they cannot read, and leave it to a collate function."""
    kind = type(one).__name__
    for values, message in (
        ([one, one, None], f"example 6 has a NoneType, and example 4 has a {kind}: bring them to one shape"),
        ([None, one, one], f"example 5 has a {kind}, and example 4 has a NoneType: bring them to one shape"),
    ):
        with pytest.raises(DataError, match=message):
            stack(values, [4, 5, 6])
