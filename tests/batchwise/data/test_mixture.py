"""Several data modules as one: what is put together, and that training on it is exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import yaml
from helpers import CSV, DIGITS, TWO, furthest, run_here, run_process
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from batchwise import DataModule
from batchwise.batching.fetch import InMemory, Request
from batchwise.batching.mixture import Mixture as MixtureOrder
from batchwise.batching.order import Sources
from batchwise.batching.ragged import Ragged
from batchwise.batching.rows import Joined, Rows
from batchwise.batching.tokens import SequencePlan
from batchwise.data.mixture import Mixture
from batchwise.sources.table import Table
from batchwise.sources.text import Text


class Given(DataModule):
    """Whatever is given, by split."""

    def __init__(self, train: Any, val: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = {"train": train, "val": val}

    def load(self, split: str) -> Any:
        return self.given.get(split)


class Squares(Dataset):
    """A map-style data set."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([self.first + index]), (self.first + index) ** 2


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(1)


def mixed(**kwargs: Any) -> Mixture:
    """A large source and a small one, in batches of 10, of which an epoch has 7 and one of 1."""
    modules = {"large": Given(points(60, 0), points(8, 1)), "small": Given(points(11, 2), points(5, 3))}
    return Mixture(modules, {"large": 0.65, "small": 0.35}, **{"batch_size": 10, "seed": 3} | kwargs)


def fit(data: Mixture, **settings: Any) -> tuple[small.Task, Any]:
    keep = ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=1, save_top_k=0)
    return small.fit(data=data, **{"callbacks": [keep], "enable_checkpointing": True, "max_epochs": 4} | settings)


def test_what_is_trained_on() -> None:
    data = mixed()
    small.fit(data=data)
    assert data.plan is not None
    assert (data.plan.examples, data.plan.steps_per_epoch) == (71, 8)
    assert data.sources() == {"large": range(60), "small": range(60, 71)}
    had = 0
    for step in range(24):
        index = data.order.indices(step // 8, *data.plan.bounds(step))
        had += int((index < 60).sum())
        assert abs(had - 0.65 * data.plan.examples_at(step + 1)) < 1
    val = data.examples("val", 13)
    assert torch.equal(val.inputs, torch.cat([points(8, 1)[0], points(5, 3)[0]]))


def test_micro_batches_and_a_resume_in_mid_epoch_change_nothing() -> None:
    whole, _ = fit(mixed())
    _, trainer = fit(mixed(micro_batch_size=3), max_steps=11, max_epochs=-1)
    assert trainer.global_step == 11
    last = str(Path("checkpoints/last.ckpt").absolute())
    resumed, trainer = fit(mixed(micro_batch_size=4), ckpt_path=last)
    assert trainer.global_step == 32
    assert small.furthest(resumed, whole) < 1e-12


class Own(small.Points):
    """Points that know their source."""

    def sources(self) -> Sources:
        number = torch.arange(small.EXAMPLES)
        return {"threes": number[number % 3 == 0], "others": number[number % 3 > 0]}


def test_a_data_module_whose_examples_know_their_source() -> None:
    data = Own(order=MixtureOrder({"threes": 0.5, "others": 0.5}))
    small.fit(data=data)
    assert data.plan is not None
    for step in range(6):
        assert (data.order.indices(0, *data.plan.bounds(step)) % 3 == 0).sum() == 5


def test_data_sets_stay_where_they_are() -> None:
    sets = [Squares(0, 5), Squares(100, 3)]
    data = Mixture({"a": Given(sets[0]), "b": Given(sets[1])}, {"a": 1, "b": 1}, batch_size=4, seed=0)
    data.setup("fit")
    assert data.sources() == {"a": range(5), "b": range(5, 8)}
    batch = data.examples("train", 8)
    assert batch.inputs.flatten().tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    assert batch.targets.tolist() == [number**2 for number in batch.inputs.flatten().tolist()]


def test_nested_examples_and_arrays() -> None:
    parts = [
        ({"x": np.full((n, 2), n, np.uint8), "words": [f"w{n}"] * n}, torch.arange(n), np.array([f"t{n}"] * n))
        for n in (2, 3)
    ]
    data = Mixture({"a": Given(parts[0]), "b": Given(parts[1])}, {"a": 1, "b": 1}, batch_size=4, seed=0)
    data.setup("fit")
    inputs = data.examples("train", 5).inputs
    assert inputs[0]["x"][:, 0].tolist() == [2, 2, 3, 3, 3]
    assert inputs[0]["words"] == ["w2", "w2", "w3", "w3", "w3"]
    assert data.examples("train", 5).targets == ["t2", "t2", "t3", "t3", "t3"]


def test_files_and_views_are_not_copied() -> None:
    """A mapped file and some rows of another: each is read where it is."""
    first = np.memmap("first", np.uint16, "w+", shape=(5, 3))
    second = np.memmap("second", np.uint16, "w+", shape=(9, 3))
    first[:], second[:] = np.arange(15).reshape(5, 3), 60_000 + np.arange(27).reshape(9, 3)
    rows = Rows(second, torch.tensor([8, 0, 4]))
    data = Mixture(
        {"a": Given((first, torch.zeros(5, 4).long())), "b": Given((rows, torch.ones(3, 4).long()))},
        {"a": 1, "b": 1},
        batch_size=4,
    )
    data.setup("fit")
    fetch = data.split("train")
    assert isinstance(fetch, InMemory)
    assert fetch.mapped
    inputs, targets = fetch.fields
    assert isinstance(inputs, Joined)
    assert isinstance(inputs.parts[0], Tensor)
    assert inputs.parts[0].data_ptr() == first.ctypes.data
    assert isinstance(targets, Tensor)
    index = torch.tensor([7, 1, 5, 5, 0])
    ((read, _),) = fetch.stream([Request.one(index)])
    whole = np.concatenate([first, second[[8, 0, 4]]])
    assert read[0].dtype == torch.uint16
    assert torch.equal(read[0].long(), torch.from_numpy(whole.astype(np.int64))[index])
    assert torch.equal(inputs.to(torch.device("cpu")).long(), torch.from_numpy(whole.astype(np.int64)))
    assert fetch.nbytes == inputs.nbytes + targets.nbytes == 8 * 3 * 2 + 8 * 4 * 8


def test_long_windows_stay_views() -> None:
    parts = [torch.arange(start, start + 200).unfold(0, 64, 1) for start in (0, 1000)]
    data = Mixture({"a": Given(parts[0]), "b": Given(parts[1])}, {"a": 1, "b": 1}, batch_size=4)
    data.setup("fit")
    batch = data.examples("train", 274)
    assert torch.equal(batch.inputs, torch.cat(parts))
    (windows,) = data.split("train").fields  # type: ignore[union-attr]
    assert isinstance(windows, Joined)
    assert isinstance(windows.parts[1], Tensor)
    assert windows.parts[1].data_ptr() == parts[1].data_ptr()


def test_sequences() -> None:
    """Each has its own lengths; the first begins within its values."""
    first = Ragged(torch.arange(10), torch.tensor([2, 5, 9]), torch.tensor([0, 1]))
    second = Ragged(torch.arange(100, 104), torch.tensor([0, 1, 4]), torch.tensor([2, 3]))
    data = Mixture({"a": Given(first), "b": Given(second)}, {"a": 1, "b": 1}, batch_size=2, seed=0)
    data.setup("fit")
    batch = data.examples("train", 4)
    assert batch.inputs.tolist() == [[2, 3, 4, -1], [5, 6, 7, 8], [100, -1, -1, -1], [101, 102, 103, -1]]
    assert batch.targets.tolist() == [0, 1, 2, 3]
    assert isinstance(data.plan, SequencePlan)


def test_text_in_proportions() -> None:
    """The mixture of a language model, which asks the data for more than batches."""
    for name in ("web", "books"):
        Path(f"{name}.txt").write_text("\n".join(f"{name} {number}" for number in range(400)))
    none: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0, "sequence_length": 32, "packing": "cut"}
    modules = {name: Text(f"{name}.txt", **none) for name in ("web", "books")}
    data = Mixture(modules, {"web": 0.75, "books": 0.25}, batch_size=8, seed=0)
    data.prepare_data()
    data.setup("fit")
    web = len(data.sources()["web"])
    for step in range(5):
        assert (data.order.indices(0, 8 * step, 8 * step + 8) < web).sum() == 6
    assert "web 12" in data.decode(data.examples("train", web).inputs.flatten())
    assert data.separator == 256
    with pytest.raises(AttributeError, match="nothing"):
        _ = data.nothing
    characters = Text("web.txt", vocabulary="characters", **none)
    with pytest.raises(ValueError, match=r"data.modules.b has the separator \d+, and the first one 256"):
        Mixture({"a": modules["web"], "b": characters}, {"a": 1, "b": 1}).check(torch.nn.Linear(1, 1))


def tables(**first: Any) -> Mixture:
    """Two tables of other means, categories and rarer labels."""
    for name, scale, colours, labels in (("a", 1, "rgb", "xyz"), ("b", 100, "gb?", "yx")):
        rows = (f"{scale * n},{colours[n % 3]},{labels[n % len(labels)]}" for n in range(60))
        Path(f"{name}.csv").write_text("\n".join(["size,colour,kind", *rows]))
    none: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.2}
    modules = {"a": Table("a.csv", "kind", **none | first), "b": Table("b.csv", "kind", **none)}
    return Mixture(modules, {"a": 1, "b": 1}, batch_size=8, seed=0)


def test_what_the_first_module_learns_holds_for_all() -> None:
    """A column is the same input in all tables: of the same scale, and with the same category in the same place."""
    data = tables()
    data.setup("fit")
    mean, std = (data.learnt["a"]["columns"][0][key] for key in ("mean", "std"))
    inputs, targets = data.split("train").fields  # type: ignore[union-attr]
    for n in range(60):
        size = (100 * n - mean) / std
        at = (inputs[48:, 0] - size).abs().argmin() + 48
        if abs(inputs[at, 0] - size) > 1e-3:  # it is in the test
            continue
        expected = [float("gb?"[n % 3] == colour) for colour in "bgr"]
        assert inputs[at, 1:].tolist() == expected
        assert targets[at] == "xyz".index("yx"[n % 2])
    state = data.state_dict()
    assert list(state["learnt"]) == ["a"]
    Path("new.csv").write_text("size,colour\n7,b\n8,r\n")
    later = tables(predict_path="new.csv")
    Path("a.csv").unlink()
    later.recall(state)
    assert later.modules["a"].learnt == later.modules["b"].learnt == state["learnt"]["a"]
    later.setup("predict")
    batch = later.examples("predict", 9)
    assert torch.allclose(batch.inputs[:, 0].double(), (torch.tensor([7.0, 8.0]).double() - mean) / std, atol=1e-6)
    grown = tables()
    with Path("b.csv").open("a") as file:
        file.write("\n1,g,x")
    grown.recall(state)
    with pytest.warns(UserWarning, match=r"examples that were trained on, .* \(examples: 60 -> 61"):
        grown.setup("test")


def test_texts_of_other_characters_are_refused() -> None:
    for name in ("ab", "xy"):
        Path(f"{name}.txt").write_text("\n".join(f"{name} {number}" for number in range(40)))
    modules = {n: Text(f"{n}.txt", vocabulary="characters", delimiter="\n", sequence_length=8) for n in ("ab", "xy")}
    data = Mixture(modules, {"ab": 1, "xy": 1}, batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"training has learnt from its texts: \d+ characters"):
        data.setup("fit")


class Doubled(Given):
    def transform(self, batch: Any, training: bool) -> Any:
        return batch


X, Y = torch.zeros(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((torch.zeros(4, 3), Y), r"data.modules.b has examples\[0\] of float32 \[N, 3\], and a of float32 \[N, 2\]"),
        ((X.double(), Y), r"data.modules.b has examples\[0\] of float64 \[N, 2\]"),
        ((X,), "data.modules.b has examples of 1 parts, and a of 2 parts: make them the same in load"),
        (X, "data.modules.b has examples of float32"),
        (
            Squares(0, 3),
            "a gives tuple, b gives Squares: load tensors and arrays, Ragged, or data sets in all",
        ),
        ((X[:0], Y[:0]), "source b has no examples"),
        (None, "data.modules.b has no train split: leave it out"),
    ],
)
def test_sources_that_do_not_fit(second: Any, message: str) -> None:
    data = Mixture({"a": Given((X, Y)), "b": Given(second)}, {"a": 1, "b": 1}, batch_size=4, seed=0)
    with pytest.raises(ValueError, match=message) as refusal:
        data.setup("fit")
    assert "\n" not in str(refusal.value)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"data.modules.b sets batch_size: write it at data.batch_size"):
        Mixture({"a": Given(X), "b": Given(X, batch_size=2)}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"data.modules.b is a Doubled, which transforms or collates"):
        Mixture({"a": Given(X), "b": Doubled(X)}, {"a": 1, "b": 1})
    named = Given(X)
    named.class_names = ["no", "yes"]
    with pytest.raises(ValueError, match=r"data.modules.b has the classes \['no', 'yes'\], and the first one None"):
        _ = Mixture({"a": Given(X), "b": named}, {"a": 1, "b": 1}).class_names
    with pytest.raises(ValueError, match=r"modules are \{\}"):
        Mixture({}, {"a": 1})


MIXED = """
data:
  class_path: batchwise.data.mixture.Mixture
  init_args:
    batch_size: 50
    epoch_examples: 520
    proportions: {few: 0.3, many: 0.7}
    modules:
      few: {class_path: batchwise.sources.digits.Digits, init_args: {examples_per_class: 6}}
      many: {class_path: batchwise.sources.digits.Digits}
"""


@pytest.mark.weekly
def test_on_the_command_line_and_two_processes() -> None:
    """The plan has a line for it, and two processes get the weights of one."""
    Path("mixed.yaml").write_text(MIXED)
    settings = yaml.safe_load(Path(DIGITS[1]).read_text())
    settings.pop("data")
    Path("rest.yaml").write_text(yaml.safe_dump(settings))
    command = ("fit", "--config", "rest.yaml", "--config", "mixed.yaml", *CSV, "--trainer.max_epochs", 2)
    command = (*command, "--trainer.precision", "64-true")
    one = run_here(*command)
    assert one.code == 0, one.err
    assert (
        "mixture: few 0.3 (15 of 50 per batch, 2.6 passes per epoch), "
        "many 0.7 (35 of 50 per batch, 0.29 passes per epoch)\n"
    ) in one.out
    other = run_here(
        *command, "--data.proportions", "{few: 1, many: 1}", "--ckpt_path", one.folder / "checkpoints/last.ckpt"
    )
    assert other.code == 2
    assert "Mixture {'few': 0.3, 'many': 0.7}" in other.err
    two = run_process(*command, *TWO, "--data.micro_batch_size", 9, OMP_NUM_THREADS="1")
    assert two.code == 0, two.err
    assert furthest(one, two) < 1e-12
    wrong = run_here(*command, "--data.proportions", "{few: 1, lots: 2}")
    assert wrong.code == 2
    assert wrong.err.splitlines()[-1].startswith("error: ")
    assert "proportions name few, lots, but the sources are few, many" in wrong.err
