"""Data of any shape: nested inputs and targets, a variable number per example, views, the user's own collate."""

import pickle
import re
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from numpy.lib.stride_tricks import sliding_window_view
from small import Classify, Points, adamw, fit, furthest, network
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset

from batchwise import DataModule, MicroBatch, Task
from batchwise.batching.fetch import DataError, Request, as_tensor, make_fetch, on_device
from batchwise.batching.ragged import Ragged
from batchwise.tasks.classification import Classification

Pair = namedtuple("Pair", ["left", "right"])


class Split(nn.Module):
    """The network of `small`, which takes its five numbers in two parts, and an output with logits like theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, left: Tensor, right: Tensor) -> "Output":
        return Output(self.layers(torch.cat([left, right], 1)))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Nested(Classify):
    """Targets are the class, somewhere in a structure, and a number that is the same for all."""

    def losses(self, batch: MicroBatch) -> Tensor:
        target = batch.targets["class"] if isinstance(batch.targets, dict) else batch.targets[0]
        return F.cross_entropy(self(batch.inputs), target, reduction="none")

    def make_metrics(self, outputs: Tensor) -> None:
        assert isinstance(outputs, Tensor)


def nest(form: str, x: Tensor, y: Tensor) -> tuple:
    left, right = x[..., :2], x[..., 2:]
    return {
        "dict": ({"left": left, "right": right}, {"class": y, "more": {"box": x}}),
        "tuple": ((left, right), (y, {"box": x})),
        "named": (Pair(left, right), {"class": y}),
        "three": (left, right, {"class": y}),
        "ragged": ({"left": left, "right": right}, {"class": y, "boxes": [x[:i] for i in range(len(x))]}),
    }[form]


class Shaped(Points):
    def __init__(self, form: str, mapped: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form, self.mapped = form, mapped

    def load(self, split: str) -> Any:
        return Items(self.form, self.x, self.y) if self.mapped else nest(self.form, self.x, self.y)


class Items(Dataset):
    def __init__(self, form: str, x: Tensor, y: Tensor) -> None:
        self.form, self.x, self.y = form, x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple:
        return nest(self.form, self.x[i], self.y[i])


@pytest.fixture(scope="module")
def plain() -> Task:
    return fit(Classify(network(), optimizer=adamw))[0]


@contextmanager
def most_allocated() -> Iterator[list[int]]:
    """The bytes of each tensor that torch makes meanwhile."""
    found = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    found += [event.self_cpu_memory_usage for event in seen.events() or ()]


FORMS = ["dict", "tuple", "named", "three"]


@pytest.mark.parametrize(
    ("form", "mapped"), [*((form, mapped) for form in FORMS for mapped in (False, True)), ("ragged", False)]
)
@pytest.mark.slow
def test_nested_inputs_and_targets_train_as_one_tensor_does(plain, form, mapped):
    data = Shaped(form, mapped, micro_batch_size=4)
    task, _ = fit(Nested(Split(), optimizer=adamw), data)
    assert furthest(task.network.layers, plain.network) < 1e-12  # type: ignore[arg-type]
    assert str(data.split("train")) == ("one by one" if mapped else "resident")


@pytest.mark.parametrize("form", [*FORMS, "ragged"])
def test_a_structure_in_memory_is_read_without_a_copy_of_the_whole(form):
    x, y = torch.randn(9, 5), torch.arange(9)
    fetch = make_fetch(nest(form, x, y))
    stored = fetch.fields[0]  # type: ignore[attr-defined]
    left = stored["left"] if isinstance(stored, dict) else stored[0] if isinstance(stored, tuple) else stored
    assert left.data_ptr() == x.data_ptr()


def micro_batch() -> MicroBatch:
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    boxes = [torch.full((n, 4), float(n)) for n in (2, 5, 0, 9, 1)]
    inputs = {"x": x, "pair": Pair(y, x), "scale": 3}
    targets = {"boxes": boxes, "class": y, "nested": [{"boxes": box, "name": str(len(box))} for box in boxes]}
    return MicroBatch(inputs, targets, torch.arange(5), torch.ones(5))


def test_parts_of_a_micro_batch_keep_the_structure_and_cut_lists_by_example():
    """As a retry after running out of memory does: the boxes of an example stay together."""
    for batch, numbers in zip(micro_batch().split(2), ([0, 1], [2, 3], [4]), strict=True):
        assert batch.inputs["x"][:, 0].tolist() == [2 * number for number in numbers]
        assert isinstance(batch.inputs["pair"], Pair)
        assert batch.inputs["pair"].left.tolist() == batch.targets["class"].tolist() == numbers
        assert batch.inputs["scale"] == 3
        assert [len(boxes) for boxes in batch.targets["boxes"]] == [(2, 5, 0, 9, 1)[number] for number in numbers]
        assert [item["name"] for item in batch.targets["nested"]] == ["25091"[number] for number in numbers]
    taken = micro_batch().take(torch.tensor([3, 3, 0]))
    assert [len(boxes) for boxes in taken.targets["boxes"]] == [9, 9, 2]
    assert taken.inputs["pair"].left.tolist() == [3, 3, 0]
    moved = micro_batch().to(torch.device("meta"))
    assert moved.targets["nested"][1]["boxes"].is_meta
    assert moved.inputs["pair"].right.is_meta
    assert moved.targets["nested"][1]["name"] == "5"


def test_lists_in_memory_have_one_value_per_example():
    boxes = [np.full((n, 4), n) for n in (2, 5, 0)]
    fetch = make_fetch((torch.arange(3), {"boxes": boxes, "kind": [4, 5, 6], "file": ["a", "b", "c"]}))
    ((x, targets), _), *_ = fetch.stream([Request.one(torch.tensor([1, 1, 0]))])
    assert x.tolist() == [1, 1, 0]
    assert [len(each) for each in targets["boxes"]] == [5, 5, 2]
    assert isinstance(targets["boxes"][0], Tensor)
    assert targets["kind"].tolist() == [5, 5, 4]
    assert targets["file"] == ["b", "b", "a"]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ([torch.zeros(3), torch.zeros(3)], r"a list of 2 tensors: return a tuple of inputs and targets"),
        (({"a": torch.zeros(3)}, {"b": [torch.zeros(2)] * 2}), "differ in length: 3 and 2 examples"),
        ((torch.zeros(3), {1, 2, 3}), r"load gave a set among inputs and targets: write tensors or arrays"),
        ((torch.zeros(3), torch.tensor(1)), r"load gave a Tensor among .* with the examples in the first dimension"),
    ],
)
def test_what_is_no_field_is_refused_in_a_line(source, line):
    with pytest.raises(ValueError, match=line):
        make_fetch(source)


class Images(Dataset):
    """Image i is [3, 4 + i, 5], and has i boxes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": torch.full((3, 4 + i, 5), float(i)), "boxes": torch.full((i, 4), float(i))}


class Boxes(Points):
    def load(self, split: str) -> Any:
        return Images()


class Padded(Boxes):
    margin = 1

    def collate(self, examples: list[dict[str, Tensor]]) -> tuple:
        images = torch.zeros(len(examples), 3, 16 + self.margin, 5)
        for place, example in enumerate(examples):
            images[place, :, : example["image"].shape[1]] = example["image"]
        return {"image": images}, {"boxes": [example["boxes"] for example in examples]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_module_may_say_how_examples_make_a_micro_batch(num_workers):
    data = Padded(num_workers=num_workers, micro_batch_size=4)
    data.setup("fit")
    batches = [batch for item in data.train_dataloader() for batch in item.micro_batches]
    assert sum(map(len, batches)) == 12
    for batch in batches:
        assert batch.inputs["image"].shape == (len(batch), 3, 17, 5)
        assert batch.inputs["image"][:, 0, 0, 0].tolist() == batch.index.tolist()
        assert [len(boxes) for boxes in batch.targets["boxes"]] == batch.index.tolist()


def test_collate_travels_to_another_process_without_the_data():
    data = Padded()
    data.x = torch.zeros(0)
    data.examples("train", 2)
    collate: Any = data.split("train")._loader.dataset.collate  # type: ignore[union-attr]
    data.trainer = lambda: None  # type: ignore[assignment]  # which cannot be sent
    sent = pickle.loads(pickle.dumps(collate))
    assert sent([Images()[1], Images()[2]])[0]["image"].shape == (2, 3, 17, 5)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda i: {"image": torch.zeros(3, 4 + i // 3)},
            r"^example 3 has the shape \[3, 5\] at \['image'\], and example 0 has the shape \[3, 4\].* collate\(",
        ),
        (lambda i: (torch.zeros(2), torch.zeros(i // 2)), r"^example 2 has the shape \[1\] at targets, and example 0"),
        (lambda i: {"a": 1} if i else {"b": 1}, r"^example 1 has the keys \['a'\], and example 0 has the keys \['b'\]"),
        (lambda i: (1,) * (1 + i), r"^example 1 has 2 items, and example 0 has 1 items"),
        (lambda i: (1, None), r"^example 0 has a NoneType at targets: return tensors"),
        (lambda i: (torch.zeros(2), i or None), r"^example 1 has a int at targets, and example 0 has a NoneType"),
    ],
)
def test_examples_that_make_no_micro_batch_are_one_line(make, line, num_workers):
    source = make_fetch([make(i) for i in range(5)], num_workers)
    with pytest.raises(DataError, match=line):
        next(iter(source.stream([Request.one(torch.arange(4))])))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("collate", "line"),
    [
        (
            lambda examples: {}["x"],
            r"^examples 0, 1, 2, ... cannot be put together: collate raised KeyError: 'x' at test_",
        ),
        (lambda examples: ([1, 2], [3]), r"^collate gave a list of 2 at inputs for 4 examples"),
        (
            lambda examples: ({"a": torch.zeros(4)}, {"b": torch.zeros(3)}),
            r"gave a Tensor of 3 at targets\['b'\] for 4",
        ),
        (lambda examples: (torch.zeros(4), torch.tensor(1)), r"^collate gave one number at targets for 4 examples"),
        (lambda examples: ({1, 2}, torch.zeros(4)), r"^collate gave a set at inputs for 4 examples"),
    ],
)
def test_what_collate_must_not_return(collate, line, num_workers):
    source = make_fetch(Images(), num_workers, collate=collate)
    with pytest.raises(DataError, match=line):
        next(iter(source.stream([Request.one(torch.arange(4))])))


def windows(kind: str, path: Path) -> Any:
    """Windows of 256 values, 256 MB as numbers of their own, over 1 MB."""
    values = np.arange(2**18, dtype=np.float32)
    if kind == "memory map":
        np.save(path / "values.npy", values)
        return sliding_window_view(np.load(path / "values.npy", mmap_mode="r"), 256)
    return {
        "array": lambda: sliding_window_view(values, 256),
        "unfold": lambda: torch.from_numpy(values).unfold(0, 256, 1),
        "channels": lambda: torch.from_numpy(values).view(-1, 2).unfold(0, 512, 1).transpose(1, 2),
        "expand": lambda: torch.from_numpy(values[:256]).expand(2**18, 256),
        "sixteen bits": lambda: torch.from_numpy(values).to(torch.uint16).unfold(0, 256, 1),
        "dict": lambda: {"x": torch.from_numpy(values).unfold(0, 256, 1)},
    }[kind]()


KINDS = ["array", "unfold", "channels", "expand", "sixteen bits", "memory map", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_read_without_copying_the_whole_of_it(kind, tmp_path):
    view = windows(kind, tmp_path)
    index = torch.tensor([2**16, 5, 2**16])
    with most_allocated() as most:
        fetch = make_fetch((view, torch.arange(len(view["x"] if kind == "dict" else view))))
        ((x, _), _), *_ = fetch.stream([Request.one(index)])
    stored, x, view = (value["x"] if kind == "dict" else value for value in (fetch.fields[0], x, view))  # type: ignore[attr-defined]
    assert torch.equal(x, as_tensor(view)[index])
    assert stored.data_ptr() == as_tensor(view).data_ptr()
    assert fetch.nbytes <= 2**20 + 8 * len(stored)  # type: ignore[attr-defined]
    assert max(most) < 2**23
    assert str(fetch) == ("mapped" if kind == "memory map" else "resident")


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_stays_one_where_it_moves_to_a_device(kind, tmp_path):
    """To the device that has no memory, which shows what would be there."""
    field = make_fetch((windows(kind, tmp_path),)).fields[0]  # type: ignore[attr-defined]
    field = field["x"] if kind == "dict" else field
    moved = on_device(field, torch.device("meta"))
    assert (moved.shape, moved.stride(), moved.dtype) == (field.shape, field.stride(), field.dtype)
    assert moved.untyped_storage().nbytes() <= 2**20
    assert torch.equal(on_device(field, torch.device("cpu"))[-3:], field[-3:])


def test_an_array_may_run_backwards():
    ((x,), _), *_ = make_fetch(np.arange(6).reshape(3, 2)[::-1, ::-1]).stream([Request.one(torch.tensor([0, 2]))])
    assert x.tolist() == [[5, 4], [1, 0]]


def test_ragged_sequences_with_nested_targets():
    fetch = Ragged(torch.arange(6), torch.tensor([0, 1, 3, 6]), {"a": torch.arange(3), "b": ["x", "y", "z"]})
    ((tokens, targets), _), *_ = fetch.stream([Request.one(torch.tensor([2, 0]))])
    assert tokens.tolist() == [[3, 4, 5], [0, -1, -1]]
    assert (targets["a"].tolist(), targets["b"]) == ([2, 0], ["z", "x"])


def test_a_network_that_lacks_an_argument_is_one_line():
    line = r"Linear cannot take the data, whose inputs are \{'left': \[2\], 'right': \[3\]\} per .* argument 'left'"
    with pytest.raises(ValueError, match=line):
        fit(Nested(nn.Linear(5, 3), optimizer=adamw), Shaped("dict"))


class Numbers(Points):
    """The points, with a target that is a number, in a type of their own, and in another after `transform`."""

    stored = torch.float64
    made: torch.dtype | None = None
    given: ClassVar[set] = set()

    def load(self, split: str) -> Any:
        inputs = {"x": self.x.to(self.stored).numpy(), "kind": self.y.to(torch.int16).numpy()}
        return inputs, {"value": self.x.sum(1).to(self.stored).numpy(), "class": self.y}

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        self.given.add(batch.inputs["x"].dtype)
        made = {"x": batch.inputs["x"].to(self.made or self.stored) - 0.5, "kind": batch.inputs["kind"]}
        return replace(batch, inputs=made)


class OfX(nn.Linear):
    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return super().forward(x)


class Sum(Task):
    seen: ClassVar[set] = set()

    def losses(self, batch: MicroBatch) -> Tensor:
        inputs, targets = batch.inputs, batch.targets
        self.seen.add((inputs["x"].dtype, inputs["kind"].dtype, targets["value"].dtype, targets["class"].dtype))
        return F.mse_loss(self(inputs).squeeze(1), targets["value"], reduction="none")


@pytest.mark.parametrize("made", [None, torch.float32])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ],
)
@pytest.mark.slow
def test_floats_come_in_the_precision_of_the_run(precision, expected, stored, made, monkeypatch):
    monkeypatch.setattr(Sum, "seen", set())
    monkeypatch.setattr(Numbers, "given", set())
    data = Numbers()
    data.stored, data.made = stored, made
    fit(Sum(OfX(5, 1), optimizer=adamw), data, precision=precision, max_epochs=1)
    assert Sum.seen == {(expected, torch.int16, expected, torch.int64)}
    assert Numbers.given == {expected}  # in training and in evaluation


def documented(name: str) -> DataModule:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {"DataModule": DataModule, "torch": torch}
    exec(next(block for block in blocks if f"class {name}" in block), space)
    return space[name](batch_size=4, micro_batch_size=3)


class OfImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, pixels: Tensor, age: Tensor | None = None) -> Tensor:
        return self.layer(pixels.sum((2, 3)) / 100)  # a mean would depend on the padding


class CountBoxes(Task):
    def losses(self, batch: MicroBatch) -> Tensor:
        outputs = self(batch.inputs)
        assert len(batch.targets["boxes"]) == len(batch)
        counts = torch.tensor([len(boxes) for boxes in batch.targets["boxes"]])
        return (outputs - counts[:, None]).square().sum(1)


@pytest.mark.parametrize("name", ["Scenes", "Photos"])
def test_the_classes_of_the_documents_train(name):
    _, trainer = fit(CountBoxes(OfImages(), optimizer=adamw), documented(name))
    assert trainer.global_step == 6


def test_classification_of_nested_targets_is_one_line():
    line = "the targets of the train split are a dict: write one tensor of whole numbers, or a task of your own"
    with pytest.raises(ValueError, match=line):
        fit(Classification(Split(), optimizer=adamw), Shaped("dict"))


@pytest.mark.parametrize("kind", ["tensors", "a list", "a data set", "at once", "collated", "sequences"])
def test_examples_that_another_network_has_made_do_not_learn(kind):
    layer = nn.Linear(5, 5).double()

    class Made(Points):
        def load(self, split):
            features = layer(self.x)
            if kind == "sequences":
                return Ragged(features.flatten(), torch.arange(0, 5 * len(self.y) + 1, 5), self.y)
            if kind == "tensors":
                return features, self.y
            return (list(features), self.y) if kind == "a list" else OfFeatures(features, self.y)

        def transform(self, batch, training):
            return replace(batch, inputs=torch.stack(batch.inputs)) if kind == "a list" else batch

    class OfFeatures(Dataset):
        def __init__(self, features, labels):
            self.features, self.labels = features, labels
            if kind == "at once":
                self.__getitems__ = lambda indices: (features[indices], labels[indices])

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return self.features[index], self.labels[index]

    class Collated(Made):
        def collate(self, examples):
            return tuple(map(torch.stack, zip(*examples, strict=True)))

    fit(Classify(network(), optimizer=adamw), (Collated if kind == "collated" else Made)())
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (None, r"batch\.targets is None, since load gave none: cross_entropy_loss\(\).* \(small\.py, line \d+\)$"),
        (["a"] * 64, r"batch\.targets is a list: cross_entropy_loss\(\).* not list \(small\.py, line \d+\)$"),
    ],
)
def test_targets_that_are_no_tensor_are_one_line(targets, words):
    class Odd(Points):
        def load(self, split):
            return self.x if targets is None else (self.x, targets)

    with pytest.raises(ValueError, match="^Classify.losses fails on a few examples: " + words):
        fit(Classify(network(), optimizer=adamw), Odd())


def test_inputs_that_are_lists_are_one_line():
    class Lists(Points):
        def load(self, split):
            return self.x.tolist(), self.y

    line = r"^model\.network Sequential cannot take the data, whose inputs are \['list', '\.\.\.'\] per example: 'list'"
    with pytest.raises(ValueError, match=line):
        fit(Classify(nn.Sequential(nn.Flatten(), network()), optimizer=adamw), Lists())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_what_a_hook_makes_is_waited_for_where_there_are_no_targets(hook):
    class Teach(Classify):
        def __init__(self):
            super().__init__(network(), optimizer=adamw)
            self.teacher = None

        def losses(self, batch):
            return (self(batch.inputs) - self.teacher(batch.inputs)).square().sum(1)

    class Unlabelled(Points):
        def load(self, split):
            return self.x

    def make(self):
        self.teacher = network()

    setattr(Teach, hook, make)
    fit(Teach(), Unlabelled())
