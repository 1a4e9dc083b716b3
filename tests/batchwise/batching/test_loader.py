from collections import OrderedDict, namedtuple
from itertools import islice
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from batchwise.batching.fetch import InMemory
from batchwise.batching.loader import Batch, EvalLoader, MicroBatch, TrainLoader, make_batch
from batchwise.batching.order import Sequential, Shuffled
from batchwise.batching.plan import BatchPlan
from batchwise.batching.workers import Workers


@st.composite
def plans(draw) -> BatchPlan:
    return BatchPlan(
        examples=draw(st.integers(1, 120)),
        batch_size=draw(st.integers(1, 50)),
        devices=draw(st.integers(1, 5)),
        micro_batch_size=draw(st.none() | st.integers(1, 20)),
        limit=draw(st.none() | st.integers(1, 6)),
    )


def fields(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(examples) * 10, -torch.arange(examples)


def loader(plan: BatchPlan, rank: int = 0, step: int = 0, order=Shuffled, seed: int = 5) -> TrainLoader:
    order = order().prepare(plan.examples, plan.batch_size, seed)
    return TrainLoader(plan, order, InMemory(fields(plan.examples)), rank, lambda: step)


def contents(share: Batch) -> tuple:
    batches = [
        (b.inputs.tolist(), b.targets.tolist(), b.index.tolist(), b.weights and b.weights.tolist(), b.position)
        for b in share.micro_batches
    ]
    return share.step, share.epoch, share.size, batches


@given(plan=plans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_to_start_at_a_step_is_to_skip_the_steps_before(plan, data):
    rank = data.draw(st.integers(0, plan.devices - 1))
    steps = plan.steps_per_epoch
    epochs = [[contents(share) for share in loader(plan, rank, epoch * steps)] for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [steps] * 3
    assert [share[0] for epoch in epochs for share in epoch] == list(range(3 * steps))
    start = data.draw(st.integers(0, 3 * steps - 1))
    late = loader(plan, rank, start)
    assert len(late) == steps  # the whole epoch, also when it starts late
    assert [contents(share) for share in late] == epochs[start // steps][start % steps :]


@given(plan=plans(), seed=st.integers(0, 9), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_shares_of_a_step_are_the_batch_of_the_order(plan, seed, epoch):
    first = epoch * plan.steps_per_epoch
    whole = Shuffled().prepare(plan.examples, plan.batch_size, seed).indices(epoch, 0, plan.examples).tolist()
    by_rank = [list(loader(plan, rank, first, seed=seed)) for rank in range(plan.devices)]
    for number, shares in enumerate(zip(*by_rank, strict=True)):
        batch = whole[number * plan.batch_size : (number + 1) * plan.batch_size]
        counted = [b for share in shares for b in share.micro_batches if b.weights is None]
        assert [index for b in counted for index in b.index.tolist()] == batch
        assert {(share.step, share.epoch, share.size) for share in shares} == {(first + number, epoch, len(batch))}
        for b in counted:
            assert batch[b.position : b.position + len(b)] == b.index.tolist()


@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_what_a_device_gets_belongs_to_the_numbers(plan):
    for rank in range(plan.devices):
        for share in loader(plan, rank):
            for batch in share.micro_batches:
                assert torch.equal(batch.inputs, batch.index * 10)
                assert torch.equal(batch.targets, -batch.index)


def test_stand_ins_have_weight_zero():
    plan = BatchPlan(examples=10, batch_size=8, devices=4)
    last = [list(loader(plan, rank))[-1] for rank in range(4)]
    weights = [share.micro_batches[0].weights for share in last]
    assert [len(share.micro_batches) for share in last] == [1] * 4
    assert [w is None or w.tolist() for w in weights] == [[0.0], True, [0.0], True]
    batch = [share.micro_batches[0].index.item() for share in last if share.micro_batches[0].weights is None]
    assert {last[0].micro_batches[0].index.item(), last[2].micro_batches[0].index.item()} <= set(batch)


def test_at_the_end_of_an_epoch_the_next_one_starts():
    plan = BatchPlan(examples=10, batch_size=4)
    assert [share.step for share in loader(plan, step=2)] == [2]
    assert [(share.step, share.epoch) for share in loader(plan, step=3)] == [(3, 1), (4, 1), (5, 1)]
    assert [(share.step, share.epoch) for share in loader(plan, step=6)] == [(6, 2), (7, 2), (8, 2)]


def test_the_position_is_asked_when_iteration_starts():
    done = 0
    order = Sequential().prepare(10, 4, 0)
    train = TrainLoader(BatchPlan(10, 4), order, InMemory(fields(10)), 0, lambda: done)
    assert [share.step for share in train] == [0, 1, 2]
    done = 4
    assert [share.step for share in train] == [4, 5]
    assert next(iter(train)).micro_batches[0].index.tolist() == [4, 5, 6, 7]


def test_sizes_by_hand():
    plan = BatchPlan(examples=11, batch_size=8, devices=2, micro_batch_size=3)
    shares = [list(loader(plan, rank, order=Sequential)) for rank in range(2)]
    index = [[[b.index.tolist() for b in share.micro_batches] for share in rank] for rank in shares]
    assert index == [[[[0, 1], [2, 3]], [[8]]], [[[4, 5], [6, 7]], [[9, 10]]]]
    assert [b.position for b in shares[1][0].micro_batches] == [4, 6]
    assert [b.position for b in shares[1][1].micro_batches] == [1]


def test_workers_give_the_same_shares():
    plan = BatchPlan(examples=23, batch_size=9, devices=2, micro_batch_size=3)
    order = Shuffled().prepare(23, 9, 5)
    workers = Workers(TensorDataset(*fields(23)), num_workers=1)
    late = TrainLoader(plan, order, workers, 1, lambda: 1)
    assert [contents(share) for share in late] == [contents(share) for share in loader(plan, 1, 1)]


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    list(loader(BatchPlan(10, 4)))
    list(EvalLoader(InMemory(fields(10)), 3))
    assert torch.equal(torch.get_rng_state(), before)


# Evaluation


@given(data=st.data(), devices=st.integers(1, 9), batch_size=st.integers(2, 40))
@settings(max_examples=100, deadline=None)
def test_evaluation_reads_each_example_once(data, devices, batch_size):
    examples = data.draw(st.integers(devices, 200))
    loaders = [EvalLoader(InMemory(fields(examples)), batch_size, rank, devices) for rank in range(devices)]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(b) for b in batches]
    assert len({len(b) for b in batches}) == 1
    flat = [batch for rank in batches for batch in rank]
    assert torch.cat([batch.index for batch in flat]).tolist() == list(range(examples))
    assert torch.cat([batch.inputs for batch in flat]).tolist() == fields(examples)[0].tolist()
    assert torch.cat([batch.targets for batch in flat]).tolist() == fields(examples)[1].tolist()
    assert min(map(len, flat)) >= 1
    assert max(map(len, flat)) <= batch_size
    assert len(batches[0]) == ceil(ceil(examples / devices) / batch_size)  # no more than needed
    assert all(batch.weights is None for batch in flat)


@given(data=st.data(), devices=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_examples_one_by_one_where_devices_divide_them(data, devices):
    examples = devices * data.draw(st.integers(1, 12))
    batches = [list(EvalLoader(InMemory(fields(examples)), 1, rank, devices)) for rank in range(devices)]
    assert [batch.index.tolist() for rank in batches for batch in rank] == [[i] for i in range(examples)]


@pytest.mark.parametrize("source", [InMemory(fields(4)), Workers(TensorDataset(*fields(4)))], ids=["memory", "workers"])
def test_no_evaluation_batch_is_empty_where_devices_do_not_divide_the_examples(source):
    # Batches of one, three devices: two have one example each, the third has two and so two batches.
    batches = [list(EvalLoader(source, 1, rank, 3)) for rank in range(3)]
    assert len({len(rank) for rank in batches}) == 1
    assert min(len(batch) for rank in batches for batch in rank) >= 1
    counted = [index for rank in batches for batch in rank if batch.weights is None for index in batch.index.tolist()]
    assert counted == [0, 1, 2, 3]


@pytest.mark.parametrize(("examples", "devices"), [(2, 3), (0, 1)])
def test_too_few_examples_for_the_devices(examples, devices):
    message = f"{examples} examples cannot be evaluated on {devices} devices: use at most {examples}"
    with pytest.raises(ValueError, match=message):
        EvalLoader(InMemory(fields(examples)), 4, 0, devices)


# A batch


def test_a_batch_of_one_two_and_three_fields():
    index, (a, b, c) = torch.tensor([4, 2]), torch.eye(3)
    one, two, three = make_batch((a,), index), make_batch((a, b), index, None, 6), make_batch((a, b, c), index)
    assert one.inputs is a
    assert one.targets is None
    assert (two.inputs is a, two.targets is b, two.index is index, two.position) == (True, True, True, 6)
    assert three.inputs[0] is a
    assert three.inputs[1] is b
    assert three.targets is c
    assert isinstance(three.inputs, tuple)
    assert (len(one), one.weights, one.position) == (2, None, 0)


def test_to_moves_nested_tensors():
    def tensor() -> torch.Tensor:
        return torch.zeros(2)

    inputs = (tensor(), [tensor(), {"a": tensor(), "b": (tensor(), "word", 3, None)}], OrderedDict(c=tensor()))
    batch = MicroBatch(inputs, {"t": tensor()}, torch.arange(2), torch.ones(2), position=7)
    moved = batch.to(torch.device("meta"))
    found = [
        moved.inputs[0],
        moved.inputs[1][0],
        moved.inputs[1][1]["a"],
        moved.inputs[1][1]["b"][0],
        moved.inputs[2]["c"],
        moved.targets["t"],
        moved.weights,
    ]
    assert [value.device.type for value in found] == ["meta"] * 7
    assert moved.inputs[1][1]["b"][1:] == ("word", 3, None)
    assert list(map(type, moved.inputs)) == [torch.Tensor, list, dict]
    assert (moved.position, len(moved)) == (7, 2)
    assert moved.index.tolist() == [0, 1]  # numbers stay where they are read
    assert batch.inputs[0].device.type == batch.weights.device.type == "cpu"


def test_to_without_targets_and_weights():
    moved = MicroBatch(torch.zeros(1), None, torch.zeros(1)).to(torch.device("meta"))
    assert (moved.inputs.device.type, moved.targets, moved.weights) == ("meta", None, None)


Pair = namedtuple("Pair", "left right")


def test_to_keeps_named_tuples():
    moved = MicroBatch(Pair(torch.zeros(1), torch.ones(1)), None, torch.arange(1)).to(torch.device("cpu"))
    assert isinstance(moved.inputs, Pair)
    assert moved.inputs.right.tolist() == [1.0]


def test_only_what_is_used_is_asked_for():
    asked = []

    class Counting(InMemory):
        def stream(self, requests, seed=0):
            return super().stream(asked.append(request) or request for request in requests)

    plan, examples = BatchPlan(50_000, 4000), Counting([torch.arange(50_000)])
    train = TrainLoader(plan, Sequential().prepare(50_000, 4000, 0), examples, 0, lambda: 3)
    list(islice(train, 2))
    assert [(request.index[0].item(), request.sizes) for request in asked] == [(12_000, [4000, 4000])]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("batch_size", [100, 3000])
def test_requests_over_many_steps_keep_examples_positions_and_places(devices, batch_size):
    plan, asked = BatchPlan(5050, batch_size, devices, micro_batch_size=40), []
    order = Shuffled().prepare(5050, batch_size, seed=3)

    class Counting(InMemory):
        def stream(self, requests, seed=0):
            return super().stream(asked.append(request) or request for request in requests)

    for rank in range(devices):
        asked.clear()
        shares = list(TrainLoader(plan, order, Counting([torch.arange(5050)]), rank, lambda: 0))
        micro_batches = [micro_batch for share in shares for micro_batch in share.micro_batches]
        places = [place for request in asked for place in request.positions]
        for micro_batch, place in zip(micro_batches, places, strict=True):
            expected = order.indices(0, place, place + len(micro_batch))
            assert torch.equal(micro_batch.index, expected)
            assert torch.equal(micro_batch.inputs, expected)
            assert place % batch_size == micro_batch.position


def test_to_moves_all_but_the_numbers_of_the_examples():
    batch = MicroBatch((torch.zeros(2), torch.ones(2)), torch.zeros(2), torch.arange(2), weights=torch.ones(2))
    moved = batch.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*moved.inputs, moved.targets, moved.weights))
    assert moved.index.tolist() == [0, 1]


def test_cast_converts_the_floats_of_inputs_and_targets():
    batch = MicroBatch((torch.zeros(2), torch.ones(2).int()), [torch.zeros(1), torch.zeros(3)], torch.arange(2))
    cast = batch.cast(torch.float64)
    assert [tensor.dtype for tensor in cast.inputs] == [torch.float64, torch.int32]
    assert {tensor.dtype for tensor in cast.targets} == {torch.float64}
    plain = MicroBatch(torch.zeros(2), torch.arange(2), torch.arange(2))
    assert plain.cast(torch.float32) is plain  # which costs nothing


def numbers(size: int, name: str = "noise", key: int = 5) -> torch.Tensor:
    whole = MicroBatch(torch.zeros(12, 2), None, torch.arange(100, 112), position=20, key=key)
    return torch.cat([part.randn(name, 3, 2) for part in whole.split(size)])


def test_random_numbers_of_examples_do_not_depend_on_the_cut() -> None:
    assert numbers(12).shape == (12, 3, 2)
    assert torch.equal(numbers(12), numbers(5))
    assert torch.equal(numbers(12, key=0), numbers(5, key=0))
    assert not torch.isclose(numbers(12), numbers(12, key=6)).any()
    assert not torch.isclose(
        numbers(12, "a name that ends in noise"), numbers(12, "another name that ends in noise")
    ).any()
    evaluated = MicroBatch(torch.zeros(2, 2), None, torch.tensor([111, 100])).randn("noise", 3, 2)
    assert torch.equal(evaluated, numbers(12, key=0)[[11, 0]])  # by the number of the example


def test_a_shape_may_be_a_tuple_and_a_name_comes_first() -> None:
    batch = MicroBatch(torch.zeros(4, 3, 2), None, torch.arange(4))
    for shape in ((3, 2), batch.inputs.shape[1:]):
        assert batch.randn("noise", shape).equal(batch.randn("noise", 3, 2))
    assert batch.rand("noise", ()).shape == (4,)
    with pytest.raises(TypeError, match="take a name first, which is a text: it is 3"):
        batch.randn(3, 2)  # type: ignore[arg-type]


def test_random_numbers_have_their_distributions() -> None:
    batch = MicroBatch(torch.zeros(1), None, torch.arange(200_000), key=7)
    uniform, normal = batch.rand("u").double(), batch.randn("n").double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(1 / 2, abs=4 * (1 / 12 / 200_000) ** 0.5)
    assert normal.mean().item() == pytest.approx(0, abs=4 / 200_000**0.5)
    assert normal.var().item() == pytest.approx(1, abs=4 * (2 / 200_000) ** 0.5)
    assert (normal**4).mean().item() == pytest.approx(3, abs=4 * (96 / 200_000) ** 0.5)
    assert torch.corrcoef(torch.stack([uniform, normal]))[0, 1].abs() < 4 / 200_000**0.5


def test_random_numbers_of_half_precision_are_below_one_and_finite() -> None:
    """In the steps of a training in bf16-true, what is close to 1 would become 1, of which there is no logarithm."""
    batch = MicroBatch(torch.zeros(1), None, torch.arange(20_000), key=7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        uniform, normal = batch.rand("u"), batch.randn("u")
    finally:
        torch.set_default_dtype(torch.float32)
    assert uniform.dtype == normal.dtype == torch.bfloat16
    assert uniform.max() < 1
    assert normal.isfinite().all()
