import threading

import numpy as np
import pytest
import torch
from squares import REQUESTS, Squares, pair, read
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from batchwise.batching import fetch as fetch_module
from batchwise.batching.fetch import InMemory, Request, Rows, make_fetch
from batchwise.batching.workers import Workers


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


DTYPES = [torch.uint8, torch.int64, torch.float64, torch.bfloat16, torch.bool, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_type_of_number(dtype):
    inputs = torch.arange(3000).view(1500, 2).to(dtype)
    index = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    ((x,), _), ((y,), _) = InMemory([inputs]).stream([Request(index, [700, 800], [0, 700])])
    assert x.dtype == y.dtype == dtype
    assert torch.equal(torch.cat([x, y]).double(), inputs[index].double())


def test_what_is_not_contiguous():
    inputs = torch.arange(60).view(3, 4, 5).transpose(0, 2)[::2]  # [3, 4, 3]
    row, one = torch.arange(10)[::3][:3], torch.tensor(7).expand(3)
    index = torch.tensor([[2, 9], [0, 9], [2, 9]])[:, 0]
    assert not index.is_contiguous()
    (x, y, z), _ = next(InMemory([inputs, row, one]).stream([Request.one(index)]))
    assert x.tolist() == [inputs[i].tolist() for i in (2, 0, 2)]
    assert (y.tolist(), z.tolist()) == ([6, 0, 6], [7, 7, 7])


def test_tensors_may_move_to_shared_memory():
    """As they do when a data module is sent to a process that is spawned."""
    inputs = torch.arange(2**16)
    fetch = make_fetch((inputs, inputs.clone().numpy()))
    stream = fetch.stream([Request.one(torch.tensor([i, 2**16 - 1])) for i in range(2)])
    assert next(stream)[0][0].tolist() == [0, 2**16 - 1]
    inputs.share_memory_()
    inputs += 1
    assert [x.tolist() for x in next(stream)[0]] == [[2, 2**16], [1, 2**16 - 1]]


@pytest.mark.parametrize("values", [[0.1, 2], [True, False], [3, 4], [np.float32(0.1), np.float32(2)]])
def test_a_list_of_numbers_is_read_as_an_array_of_them(values):
    """Floats of Python are of double precision."""
    ((_, as_list),) = read(make_fetch((torch.zeros(2), values)), [[1, 0]])
    ((_, as_array),) = read(make_fetch((torch.zeros(2), np.array(values))), [[1, 0]])
    assert as_list.dtype == as_array.dtype
    assert as_list.tolist() == as_array.tolist() == values[::-1]


def gathered(fetch: InMemory, sizes: list[int], monkeypatch) -> tuple[list[tuple], int]:
    """Read one request of micro-batches; return them, and in how many gathers of the first field it was done."""
    calls = []
    select = fetch_module.select
    monkeypatch.setattr(fetch_module, "select", lambda *arguments: calls.append(1) or select(*arguments))
    index = torch.arange(len(fetch)).flip(0)[: sum(sizes)]
    read = list(fetch.stream([Request(index, sizes, [0] * len(sizes))]))
    assert [len(fields[-1]) for fields, _ in read] == sizes
    return [fields for fields, _ in read], len(calls) // len(fetch.fields)


def test_micro_batches_are_gathered_together_as_far_as_each_begins_in_aligned_memory(monkeypatch):
    inputs = {"x": torch.arange(4000.0).view(1000, 4), "pair": (torch.arange(1000, dtype=torch.int16),)}
    targets = torch.arange(1000)
    for sizes, expected in (
        ([128, 128, 128, 77], 1),  # 128 numbers of 16 bits take 256 bytes
        ([128, 77, 128, 128], 2),
        ([64, 64, 64], 3),
        ([7], 1),
    ):
        read, gathers = gathered(InMemory((inputs, targets)), sizes, monkeypatch)
        assert gathers == expected
        at = 1000
        for size, (x, y) in zip(sizes, read, strict=True):
            numbers = range(at - 1, at - 1 - size, -1)
            at -= size
            assert y.tolist() == x["pair"][0].tolist() == list(numbers)
            assert torch.equal(x["x"], inputs["x"][y])
            for leaf in (x["x"], x["pair"][0], y):
                assert leaf.storage_offset() * leaf.itemsize % 256 == 0
                assert leaf.is_contiguous()


def test_no_more_is_gathered_at_once_than_a_cache_holds(monkeypatch):
    rows = InMemory((torch.zeros(1024, 2**8),))  # of 1 KiB, so 256 of them
    for sizes, gathers in (([64] * 5, 2), ([256, 256], 2), ([512, 128, 128], 2), ([300, 300], 2)):
        assert gathered(rows, sizes, monkeypatch)[1] == gathers
    with_names = InMemory((torch.zeros(1024), ["name"] * 1024))
    assert gathered(with_names, [64, 64], monkeypatch)[1] == 2


def test_a_change_in_one_micro_batch_is_none_of_another():
    (x,), (y,) = (
        fields for fields, _ in InMemory((torch.ones(128, 2),)).stream([Request(torch.arange(128), [64, 64], [0, 64])])
    )
    assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    weight = torch.ones((), requires_grad=True)
    loss = (x * weight).sum()
    y.zero_()
    loss.backward()  # autograd would refuse, if x counted as changed
    assert weight.grad == 128


@pytest.mark.parametrize("slow", [True, False])
def test_a_memory_map_on_a_slow_disk_is_read_ahead_by_a_thread(tmp_path, monkeypatch, slow):
    monkeypatch.setattr("batchwise.batching.fetch._SLOW", -1 if slow else 1000)
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
    assert len(threads) <= 8
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


def test_memory_maps_are_read_where_they_are(tmp_path):
    written = np.memmap(tmp_path / "inputs", np.float32, "w+", shape=(5, 2))
    written[:] = np.arange(10).reshape(5, 2)
    fetch = make_fetch(np.memmap(tmp_path / "inputs", np.float32, "r+", shape=(5, 2)))
    written[4] = -1
    written.flush()
    assert [x.tolist() for (x,) in read(fetch, [[4, 0]])] == [[[-1, -1], [0, 1]]]


def test_make_fetch_chooses():
    inputs, targets = torch.arange(4), np.arange(4)
    for source, fields in ((inputs, 1), (targets, 1), ((inputs, targets), 2), ((inputs, targets, inputs), 3)):
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


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (Endless(), "load gave an Endless, which has no __getitem__ .* return a list of its examples"),
        (iter([1]), "load gave a list_iterator, which has no __getitem__ .* return a list of its examples"),
        ((i for i in range(3)), "load gave a generator, which has no __getitem__ .* return a list of its examples"),
        (
            DataLoader(TensorDataset(torch.zeros(3))),
            "load gave a DataLoader: return its data set, loader",
        ),
        (DataLoader(Endless()), "load gave a DataLoader: return its data set"),
        (7, "load gave an int, which has no __getitem__ and __len__: return a tuple of inputs and targets"),
    ],
)
def test_what_cannot_be_read_by_number_is_refused(source, line):
    with pytest.raises(ValueError, match=line) as error:
        make_fetch(source)
    assert "\n" not in str(error.value)


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


NO_TENSORS = {
    "masked": (np.ma.masked_less(np.arange(5.0), 2), r"a masked array, .*\.filled\("),
    "long double": (np.arange(5, dtype=np.longdouble), r"an array of float128, .*\.astype\("),
    "dates": (np.arange(5).astype("M8[s]"), r"an array of datetime64\[s\], .*\.astype\("),
    "records": (np.zeros(5, [("a", "f4")]), r"an array of \[\('a', '<f4'\)\], .*\.astype\("),
    "objects": (np.array([[1.0, 2.0]] * 5, dtype=object), r"an array of object, .*\.astype\("),
    "another order of bytes": (np.arange(5, dtype=">f4"), r"an array of >f4, .*\.astype\("),
    "sparse": (torch.eye(5).to_sparse(), r"a tensor of layout torch\.sparse_coo: write \.to_dense\(\)"),
    "nested": (torch.nested.nested_tensor([torch.ones(2)] * 5), r"a nested tensor: write Ragged\(\.\.\.\)"),
    "no values": (torch.ones(5, device="meta"), "a tensor on meta: write one with values"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_no_tensor_can_hold_is_refused(kind: str) -> None:
    leaf, message = NO_TENSORS[kind]
    with pytest.raises(ValueError, match=message):
        make_fetch((leaf, torch.arange(5)))


def test_a_path_is_no_data() -> None:
    with pytest.raises(ValueError, match=r"load gave 'data\.npy': read it"):
        make_fetch("data.npy")


@pytest.mark.parametrize("nested", [False, True])
def test_a_column_of_a_table_is_no_data(nested: bool) -> None:
    column = pytest.importorskip("pyarrow").array(range(5))  # as those of pandas and polars, which are not needed here
    with pytest.raises(ValueError, match=r"load gave a Int64Array: write \.to_numpy\(\) of the columns"):
        make_fetch((torch.arange(5), column) if nested else column)
