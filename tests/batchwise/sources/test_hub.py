"""`datasets` on local files alone: Parquet, CSV, an Arrow cache, image folders."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_here
from PIL import Image

from batchwise.batching.fetch import DataError, Request
from batchwise.sources.hub import Hub
from batchwise.tasks.classification import Classification

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network at all, and a cache of its own."""
    import socket

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address} was made"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def rows(count: int = 60) -> dict[str, list]:
    generator = np.random.default_rng(0)
    kinds = [("cat", "dog", "eel")[number % 3] for number in range(count)]
    width = [float(number % 3) + 0.1 * generator.normal() for number in range(count)]
    return {"number": list(range(count)), "width": width, "kind": kinds}


def parquet() -> str:
    pa.parquet.write_table(pa.table(rows()), "pets.parquet")
    return "pets.parquet"


def read(data: Hub, split: str) -> tuple[torch.Tensor, ...]:
    fetch = data.split(split)
    assert fetch is not None
    ((fields, _),) = list(fetch.stream([Request.one(torch.arange(len(fetch)))]))
    return fields


def test_parquet_by_fractions() -> None:
    data = Hub(parquet(), ["number", "width"], "kind", batch_size=8)
    assert data.class_names == ["cat", "dog", "eel"]
    fields = {split: read(data, split) for split in ("train", "val", "test")}
    assert [len(inputs) for inputs, _ in fields.values()] == [42, 9, 9]
    numbers = torch.cat([inputs[:, 0] for inputs, _ in fields.values()])
    assert torch.equal(numbers.sort().values, torch.arange(60.0))
    truth = rows()
    for inputs, targets in fields.values():
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert targets.bincount().tolist() == [len(targets) // 3] * 3
        for (number, width), target in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert target == number % 3
            assert width == pytest.approx(truth["width"][int(number)], abs=1e-6)
    assert torch.equal(data.labels(), fields["train"][1])  # type: ignore[arg-type]


def test_an_example_is_that_of_a_whole_batch() -> None:
    part = Hub(parquet(), ["number", "width"], "kind", batch_size=8).load("val")
    assert part is not None
    inputs, targets = part.__getitems__([4, 2, 2])
    for place, number in enumerate((4, 2, 2)):
        one_input, one_target = part[number]
        assert torch.equal(inputs[place], one_input)
        assert targets[place] == one_target


def test_a_saved_data_set_with_splits_and_arrays() -> None:
    pictures = np.arange(48, dtype=np.float64).reshape(12, 2, 2)
    features = datasets.Features(
        {"x": datasets.Array2D((2, 2), "float64"), "y": datasets.ClassLabel(names=["no", "yes"])}
    )
    whole = datasets.Dataset.from_dict({"x": pictures, "y": [0, 1] * 6}, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole.select([5, 6])}).save_to_disk("saved")
    data = Hub("saved", "x", "y", batch_size=4)
    assert data.class_names == ["no", "yes"]
    inputs, targets = read(data, "val")
    assert torch.equal(inputs, torch.from_numpy(pictures[5:7]).float())
    assert targets.tolist() == [1, 0]
    assert len(read(data, "train")[0]) == 12
    assert data.load("test") is None


def test_classes_have_the_numbers_that_training_gave_them() -> None:
    """A class label is a number of its own data set, or split, which may have the names in another order."""

    def made(kinds: list[str], first: int) -> Any:
        features = datasets.Features({"x": datasets.Value("int64"), "y": datasets.ClassLabel(names=kinds)})
        truth = [("cat", "dog", "eel")[number % 3] for number in range(first, first + 12)]
        columns = {"x": list(range(first, first + 12)), "y": list(map(kinds.index, truth))}
        return datasets.Dataset.from_dict(columns, features=features)

    whole = datasets.DatasetDict({"train": made(["cat", "dog", "eel"], 0), "val": made(["dog", "eel", "cat"], 12)})
    whole.save_to_disk("before")
    data = Hub("before", "x", "y", batch_size=4)
    data.setup("fit")
    kinds = ["eel", "dog", "cat"]
    datasets.DatasetDict({"train": made(kinds, 24), "test": made(kinds, 36)}).save_to_disk("now")
    later = Hub("now", "x", "y", batch_size=4)
    later.recall(data.state_dict())
    for source, split in ((data, "train"), (data, "val"), (later, "test")):
        inputs, targets = read(source, split)
        assert torch.equal(inputs[:, 0].long() % 3, targets), split
        assert source.stored(split, torch.arange(2))["y"] == ["cat", "dog"]
    assert later.class_names == ["cat", "dog", "eel"]


def test_targets_keep_all_their_digits_and_dates_are_days() -> None:
    moments = [1.7e9 + number for number in range(20)]
    days = [datetime.date(2024, 1, 1 + number) for number in range(20)]
    pa.parquet.write_table(pa.table({"x": days, "y": moments}), "moments.parquet")
    inputs, targets = read(Hub("moments.parquet", "x", "y", batch_size=4, val_fraction=0, test_fraction=0), "train")
    assert targets.tolist() == moments
    assert inputs.flatten().tolist() == list(range(19723, 19743))
    hours = [datetime.timedelta(hours=number) for number in range(20)]
    pa.parquet.write_table(pa.table({"x": hours, "y": days}), "moments.parquet")
    inputs, targets = read(Hub("moments.parquet", "x", "y", batch_size=4, val_fraction=0, test_fraction=0), "train")
    assert targets.tolist() == list(range(19723, 19743))
    assert inputs[6:8].flatten().tolist() == [0.25, pytest.approx(7 / 24)]


def test_images_beside_another_column() -> None:
    whole = datasets.Dataset.from_dict({"x": [1.0] * 8, "y": [0, 1] * 4, "photo": [Image.new("L", (4, 4))] * 8})
    whole.cast_column("photo", datasets.Image()).save_to_disk("both")
    with pytest.raises(ValueError, match="'x', 'photo'] has images beside another column: write one column"):
        Hub("both", ["x", "photo"], "y", batch_size=4).setup("fit")


def test_images_of_several_sizes() -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label, grey in (("dark", 40), ("light", 200)):
            folder = Path("pictures", split, label)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (10 + number, 12), (grey, grey, grey)).save(folder / f"{number}.png")
    source = str(Path("pictures").absolute())
    data = Hub(source, "image", "label", size=6, batch_size=4, num_workers=1, val_fraction=0.25)
    data.setup("fit")
    share = next(iter(data.train_dataloader()))
    inputs, targets = share.micro_batches[0].inputs, share.micro_batches[0].targets
    assert inputs.dtype == torch.uint8
    assert inputs.shape[1:] == (3, 6, 6)
    assert torch.equal(inputs[:, 0, 0, 0], torch.tensor([40, 200], dtype=torch.uint8)[targets])
    scaled = data.transform(share.micro_batches[0], training=False).inputs
    assert torch.allclose(scaled, inputs.float() / 127.5 - 1)
    assert [len(data.load(split) or ()) for split in ("train", "val", "test")] == [6, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch.parquet", "x"), ["nosuch.parquet", "no such file"]),
        (("pets.parquet", "size", "kind"), ["no column 'size'", "number, width, kind"]),
        (("torn.parquet", "x"), ["torn.parquet cannot be read"]),
        (("other.jsonl", "words", "kind"), ["column 'words' of the train split holds texts: save them as a file"]),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], words: list[str]) -> None:
    Path("torn.parquet").write_bytes(Path(parquet()).read_bytes()[:200])
    lines = ({"words": f"word {number}", "kind": "ab"[number % 2]} for number in range(40))
    Path("other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Hub(*arguments, batch_size=4)  # type: ignore[arg-type]

    def first_batch() -> None:
        data.setup("fit")
        next(iter(data.train_dataloader()))

    with pytest.raises((ValueError, DataError)) as error:
        first_batch()
    assert all(word in str(error.value) for word in words), error.value


def test_it_trains_from_the_command_line() -> None:
    network = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: 1, num_classes: 3}}"
    result = run_here(
        *("fit", "--data", "batchwise.sources.hub.Hub", "--data.source", parquet(), "--data.inputs", "width"),
        *("--data.target", "kind", "--data.batch_size", 8, "--model", "batchwise.tasks.classification.Classification"),
        *("--model.network", network, "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.02),
        *("--trainer.max_epochs", 25, "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    )
    assert result.code == 0, result.err
    assert "best val/accuracy 1.0000" in result.out


WRONG: dict[str, tuple[dict[str, list], str]] = {
    "a missing number": (
        {"width": [None, 1.0]},
        "'width' of the train split is missing in 1 of 20 rows, such as row 3",
    ),
    "a number that is not finite": ({"width": [math.nan]}, "'width' .* is missing in 1 of 20 rows, such as row 3"),
    "infinite": ({"width": [math.inf, -math.inf]}, "'width' .* is infinite in 2 of 20 rows, such as row 3"),
    "a missing label": ({"kind": [None]}, "'kind' of the train split is missing in 1 of 20 rows, such as row 3"),
    "no label": (
        {"number": [-1, -1]},
        "'number' .* is -1, which says that there is no label, in 2 of 20 rows, such as row 3: filter",
    ),
    "arrays of unequal length": (
        {"many": [[1.0], [1.0, 2.0, 3.0]]},
        "'many' .* holds arrays of 1 to 3 values: make",
    ),
    "labels that look alike": ({"kind": ["Cat", "cat"]}, "column 'kind' has the labels 'Cat' and 'cat', which look"),
    "a missing array": ({"many": [None]}, "'many' .* is missing in 1 of 20 rows, such as row 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_columns_are_judged_before_training(case: str) -> None:
    change, words = WRONG[case]
    table: dict[str, list] = {key: values[:20] for key, values in rows().items()} | {"many": [[1.0, 2.0]] * 20}
    for name, values in change.items():
        table[name] = [*table[name][:2], *values, *table[name][2 + len(values) :]]
    pa.parquet.write_table(pa.table(table), "wrong.parquet")
    target = "number" if "number" in change else "kind"
    data = Hub("wrong.parquet", "many" if "many" in change else "width", target, batch_size=4)
    with pytest.raises(ValueError, match=words) as error:
        data.setup("fit")
    assert "\n" not in str(error.value)


def test_labels_that_begin_with_one() -> None:
    table = {"width": [[float(n), 1.0] for n in range(30)], "kind": [1 + n % 3 for n in range(30)]}
    pa.parquet.write_table(pa.table(table), "ones.parquet")
    data = Hub("ones.parquet", "width", "kind", batch_size=4)
    data.setup("fit")
    task = Classification(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"label 3 at example \d+ of the train split, but model.network has 3 outputs"):
        task.prepare(data, "train")


def test_written_as_shards_and_read_as_saved(tmp_path: Path) -> None:
    """Images by class: from a folder to shards, and as `save_to_disk` leaves them."""
    from batchwise.sources.shard_index import make_index
    from batchwise.sources.shard_writing import write_shards
    from batchwise.sources.shards import Shards
    from batchwise.sources.store import Store

    for label, level in (("cat", 40), ("dog", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((12, 12, 3), level + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    data = Hub(str(tmp_path / "images"), "image", size=8, batch_size=4)
    write_shards(data, tmp_path / "made", 0.001)
    datasets.load_dataset(str(tmp_path / "images"))["train"].save_to_disk(str(tmp_path / "saved"), num_shards=2)
    make_index(Store(str(tmp_path / "saved")))
    for folder, examples in (("made", len(data.split("train") or ())), ("saved", 20)):
        shards = Shards(str(tmp_path / folder), "image", size=8, batch_size=4, seed=0)
        shards.setup("fit")
        parts = [part for batch in shards.train_dataloader() for part in batch.micro_batches]
        assert sum(map(len, parts)) == examples
        names = shards.class_names or ["cat", "dog"]
        for part in parts:
            for image, target in zip(part.inputs, part.targets, strict=True):
                assert {"cat": image.max() < 100, "dog": image.min() >= 200}[names[target]]
