"""Image folders: the three ways to lay them out, splits, what cannot be read, normalising."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_here
from PIL import Image

from batchwise.batching.fetch import Request
from batchwise.batching.loader import make_batch
from batchwise.sources.folder import Folder

LEVELS = {"ant": 20, "bee": 120, "cow": 220}


def picture(path: str | Path, level: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (level, level // 2, 0)).save(path)


def zoo(root: str = "zoo", count: int = 20) -> str:
    """A picture's red is the level of its class and, added to it, its number."""
    for label, level in LEVELS.items():
        for number in range(count):
            picture(Path(root, label, f"{number:02}.png"), level + number)
    return root


def read(data: Folder, split: str) -> tuple[list[int], list[int]]:
    """The red of each image, and the targets."""
    fetch = data.split(split)
    assert fetch is not None
    ((fields, _),) = list(fetch.stream([Request.one(torch.arange(len(fetch)))]))
    assert fields[0].dtype == torch.uint8
    return fields[0][:, 0, 0, 0].tolist(), fields[-1].tolist()


def test_classes_by_folder_and_splits_by_fraction() -> None:
    data = Folder(zoo(), size=(2, 3), batch_size=8)
    Path("zoo/bee/notes.txt").write_text("no image")
    picture("zoo/.hidden/1.png", 3)
    assert data.class_names == ["ant", "bee", "cow"]
    seen: list[int] = []
    for split, count in {"train": 42, "val": 9, "test": 9}.items():
        reds, targets = read(data, split)
        assert [targets.count(label) for label in range(3)] == [count // 3] * 3
        assert [list(LEVELS.values())[target] for target in targets] == [red // 100 * 100 + 20 for red in reds]
        seen += reds
    assert sorted(seen) == sorted(level + number for level in LEVELS.values() for number in range(20))
    assert str(data.split("train")) == "mapped"
    assert read(Folder("zoo", size=(2, 3), batch_size=8, seed=3), "test") == read(data, "test")
    assert read(Folder("zoo", size=(2, 3), batch_size=8, split_seed=3), "test") != read(data, "test")
    assert len(list(Path("zoo/.cache").glob("*.images"))) == 1  # other splits of the same images


def test_folders_of_splits() -> None:
    zoo("parts/train", 4)
    picture("parts/validation/bee/1.png", 121)
    picture("parts/test/cow/1.png", 222)
    data = Folder("parts", size=2, batch_size=8)
    assert sorted(read(data, "train")[0]) == [level + number for level in LEVELS.values() for number in range(4)]
    assert (read(data, "val"), read(data, "test")) == (([121], [1]), ([222], [2]))
    zoo("two/train", 4)
    picture("two/test/cow/1.png", 222)
    data = Folder("two", size=2, batch_size=8, val_fraction=0.25)
    assert [len(read(data, split)[0]) for split in ("train", "val", "test")] == [9, 3, 1]
    picture("class/train/1.png", 1)  # a class that is called train is a class
    picture("class/boat/1.png", 2)
    assert Folder("class", size=2, batch_size=8).class_names == ["boat", "train"]


def test_a_split_that_the_folders_do_not_have() -> None:
    for split in ("train", "val"):
        zoo(f"zoo/{split}", 2)
    with pytest.raises(ValueError, match=r"needs that split \(the data comes in splits, so .*: add test to the data\)"):
        Folder("zoo", batch_size=4).setup("test")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists(kind: str) -> None:
    zoo(count=4)
    rows = [
        {"path": f"zoo/{label}/0{number}.png", "label": 10 * place, "split": ("train", "train", "val", "test")[number]}
        for place, label in enumerate(LEVELS)
        for number in range(4)
    ]
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = ["path,label,split", *(",".join(map(str, row.values())) for row in rows)]
    Path(f"list.{kind}").write_text("\n".join(lines))
    data = Folder(f"list.{kind}", size=2, batch_size=8)
    assert data.class_names == ["0", "10", "20"]
    assert read(data, "train") == ([20, 21, 120, 121, 220, 221], [0, 0, 1, 1, 2, 2])
    assert (read(data, "val")[0], read(data, "test")[0]) == ([22, 122, 222], [23, 123, 223])


def test_accents_in_the_names_of_folders_are_as_on_any_system() -> None:
    """The folder for training comes from Linux, and that for validation from macOS."""
    for level, name in enumerate(("train/Caf\u00e9", "train/zoo", "val/Cafe\u0301", "val/zoo")):
        picture(f"cafes/{name}/1.png", level)
    data = Folder("cafes", size=(2, 3), batch_size=1)
    assert data.class_names == ["Caf\u00e9", "zoo"]
    assert read(data, "train")[1] == read(data, "val")[1] == [0, 1]


def test_an_image_may_be_left_out() -> None:
    zoo(count=4)
    for number in (0, 3):
        Path(f"zoo/bee/0{number}.png").write_bytes(b"")
    settings: dict = {"size": 2, "batch_size": 8, "val_fraction": 0, "test_fraction": 0}
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read: bee/00.png \(.*\); bee/03.png"):
        Folder("zoo", **settings).load("train")
    data = Folder("zoo", max_unreadable=2, **settings)
    assert read(data, "train") == ([20, 21, 22, 23, 121, 122, 220, 221, 222, 223], [0] * 4 + [1] * 2 + [2] * 4)
    assert data.load("val") is None


def test_normalised_by_the_training_split() -> None:
    data = Folder(zoo(), size=2, batch_size=8)
    fetch = data.split("train")
    assert fetch is not None
    ((fields, _),) = list(fetch.stream([Request.one(torch.arange(len(fetch)))]))
    inputs = data.transform(make_batch(fields, torch.arange(len(fetch))), training=True).inputs
    assert inputs.dtype == torch.float32
    assert inputs.mean((0, 2, 3)).tolist()[:2] == pytest.approx([0, 0], abs=1e-5)
    assert inputs.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    reds = np.array(read(data, "val")[0])
    known = fields[0][:, 0].double()
    ((fields, _),) = list(data.split("val").stream([Request.one(torch.arange(9))]))  # type: ignore[union-attr]
    found = data.transform(make_batch(fields, torch.arange(9)), training=False).inputs[:, 0, 0, 0]
    np.testing.assert_allclose(found, (reds - known.mean().item()) / known.std(correction=0).item(), atol=1e-5)


def test_new_images_are_predicted_with_their_paths() -> None:
    zoo()
    for level in (20, 130, 225):
        picture(f"new/deep/{level}.png", level)
    data = Folder("zoo", size=2, batch_size=8, predict_path="new")
    fetch = data.split("predict")
    assert fetch is not None
    assert len(fetch.fields) == 1  # type: ignore[attr-defined]
    assert data.describe(torch.tensor([2, 0])) == {"path": ["deep/225.png", "deep/130.png"]}


WRONG = {
    "nothing there": ({"path": "nosuch"}, "data.path nosuch does not exist: write a folder"),
    "no images": ({"path": "empty"}, "data.path empty has no images: write a folder that has one sub-folder per class"),
    "no label": ({"path": "a.csv"}, "row 2 of a.csv has no label"),
    "unknown split": ({"path": "b.csv"}, "row 1 of b.csv has the split 'tran': write train, val or test"),
    "not JSON": ({"path": "c.jsonl"}, "data.path c.jsonl cannot be read"),
    "a file that is not there": ({"path": "d.csv"}, r"1 of 2 images cannot be read: gone.png \(\[Errno 2\] No such"),
    "size": ({"size": 0}, "data.size is 0"),
    "channels": ({"channels": 2}, "data.channels is 2: write 3"),
    "cache": (
        {"cache": "/proc/here"},
        "data.cache /proc/here cannot be written .*: make room, or write another folder",
    ),
}


@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(settings: dict, words: str) -> None:
    zoo(count=1)
    Path("empty/ant").mkdir(parents=True)
    Path("a.csv").write_text("path,label\nzoo/ant/00.png,ant\nzoo/bee/00.png,\n")
    Path("b.csv").write_text("path,label,split\nzoo/ant/00.png,ant,tran\n")
    Path("c.jsonl").write_text("{path: 3}\n")
    Path("d.csv").write_text("path,label\nzoo/ant/00.png,ant\ngone.png,bee\n")
    with pytest.raises(ValueError, match=words):
        Folder(**{"path": "zoo", "batch_size": 8} | settings).load("train")


@pytest.mark.slow
def test_from_the_command_line_to_a_row_per_image() -> None:
    zoo()
    network = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: 12, num_classes: 3}}"
    common = (
        *("--data", "batchwise.sources.folder.Folder", "--data.path", "zoo", "--data.size", 2, "--data.batch_size", 8),
        *("--model", "batchwise.tasks.classification.Classification", "--model.network", network),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    )
    result = run_here("fit", *common, "--trainer.max_epochs", 15)
    assert result.code == 0, result.err
    assert "zoo: 60 images, 3 classes: ant, bee, cow" in result.out
    assert "feeding  mapped" in result.out
    result = run_here("predict", *common, "--ckpt_path", "last", "--predictions", "out/zoo.parquet")
    assert result.code == 0, result.err
    rows = pytest.importorskip("pyarrow.parquet").read_table("out/zoo.parquet").to_pylist()
    assert [row["example"] for row in rows] == list(range(9))
    for row in rows:
        assert row["label"] == ["ant", "bee", "cow"][row["predicted"]] == row["path"].split("/")[0]
