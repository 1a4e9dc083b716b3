"""Folders, lists and caches of images as people have them: read as they are meant, or refused with what is meant."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CSV, DIGITS, run_here
from PIL import Image

from batchwise.data.split import split_examples
from batchwise.sources.folder import Folder
from batchwise.sources.images import ImageFormat, cached_images
from batchwise.sources.layout import find_images

PIXELS = np.zeros((2, 2, 3), np.uint8)


def touch(*names: str) -> None:
    """Make images, and empty files of other kinds."""
    for name in names:
        path = Path("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".tif", ".webp"):
            Image.fromarray(PIXELS).save(path)
        else:
            path.write_text("x")


def link(target: str, name: str) -> None:
    Path("data", name).symlink_to(Path("data", target).absolute())


CASES: dict[str, tuple[list[str], Any]] = {
    "classes": (["a/1.png", "b/1.png"], {"": "ab"}),
    "classes at a depth": (["a/x/1.png", "b/y/z/1.png"], {"": "ab"}),
    "splits": (["train/a/1.png", "val/a/1.png", "test/b/1.png"], {"train": "a", "val": "a", "test": "b"}),
    "Train": (["Train/a/1.png", "Val/a/1.png"], {"train": "a", "val": "a"}),
    "TRAINING": (["TRAINING/a/1.png", "Validation/b/1.png"], {"train": "a", "val": "b"}),
    "dev": (["train/a/1.png", "dev/a/1.png"], {"train": "a", "val": "a"}),
    "beside labels without images": (["train/a/1.png", "labels/a/1.txt", "README.md"], {"train": "a"}),
    "beside __MACOSX": (["train/a/1.png", "__MACOSX/train/a/1.png"], {"train": "a"}),
    "__MACOSX in classes": (["a/1.png", "__MACOSX/a/1.png", "b/1.png"], {"": "ab"}),
    "hidden": (["a/1.png", ".cache/x/1.png", "b/.1.png", "b/2.png"], {"": "ab"}),
    "a class that is named train": (["train/1.png", "bus/1.png", "car/1.png"], {"": ["bus", "car", "train"]}),
    "classes that are named test and train": (["train/1.png", "test/1.png"], {"": ["test", "train"]}),
    "endings in upper case": (["a/1.PNG", "b/1.JPG"], {"": "ab"}),
    "files beside classes": (["a/1.png", "b/1.png", "a/notes.txt", "labels.csv"], {"": "ab"}),
    "an empty class folder": (["a/1.png", "b/1.png", "c/.keep"], {"": "ab"}),
    "train beside images": (
        ["train/a/1.png", "unlabelled/1.png"],
        "folders train, unlabelled: train look like splits, and unlabelled like classes or other images: move this",
    ),
    "a test folder without classes": (
        ["train/a/1.png", "test/1.png", "test/2.png"],
        "test like classes or other images",
    ),
    "train and Train": (["train/a/1.png", "Train/a/1.png"], "of which two are the same split"),
    "val and valid": (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "of which two are the same split"),
    "one level too many": (["pets/a/1.png", "pets/b/1.png"], "one folder, and that has a, b: write data/pets"),
    "one level too many, with splits": (
        ["pets/train/a/1.png", "pets/val/a/1.png"],
        "one folder, and that has train, val: write data/pets",
    ),
    "one level too many, beside __MACOSX": (["pets/a/1.png", "__MACOSX/x/1.png"], "that has a: write data/pets"),
    "only .heic": (
        ["a/1.png", "b/1.heic", "b/2.HEIC"],
        r"b has no image that can be read, .* end in \.heic:",
    ),
    "only .heic in a split": (["train/a/1.png", "train/b/1.heic"], r"train/b has no image that can be read"),
    "only texts": (["a/1.png", "b/1.txt", "b/2.xml"], r"files that end in \.txt, \.xml: convert them, or move"),
    "cat and Cat": (["cat/1.png", "Cat/1.png"], "labels 'Cat' and 'cat', which look like one: give both the same name"),
    "a blank at the end": (["cat/1.png", "cat /1.png"], "labels 'cat' and 'cat ', which look like one"),
    "two blanks": (["big cat/1.png", "big  cat/1.png"], "labels 'big  cat' and 'big cat', which look like one"),
    "cat in train and Cat in val": (
        ["train/cat/1.png", "val/Cat/1.png"],
        "labels 'Cat' and 'cat', which look like one",
    ),
    "no images": (["a/1.txt"], "has no image that can be read"),
    "no folders": (["1.png"], "data.path data has no images: write a folder that has one sub-folder per class"),
}


@pytest.mark.parametrize("case", CASES)
def test_folders(case: str) -> None:
    files, expected = CASES[case]
    touch(*files)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as error:
            find_images(Path("data"))
        assert "\n" not in str(error.value)
        return
    found = find_images(Path("data"))
    splits = found.splits or [""] * len(found.names)
    assert {
        name: sorted(label for label, split in zip(found.labels, splits, strict=True) if split == name)
        for name in expected
    } == {name: list(labels) for name, labels in expected.items()}
    assert set(splits) == set(expected)
    assert all((Path("data") / name).is_file() for name in found.names)


def test_links_are_followed_once() -> None:
    touch("a/1.png", "b/1.png", "elsewhere/x/2.png")
    shutil.move("data/elsewhere", "elsewhere")
    Path("data/a/more").symlink_to(Path("elsewhere").absolute())
    Path("data/c").symlink_to(Path("elsewhere").absolute())
    link("a", "a/back")
    assert Counter(find_images(Path("data")).labels) == {"a": 2, "b": 1, "c": 1}


def test_a_folder_without_files_is_named() -> None:
    touch("train/a/1.png", "train/b/1.png", "test/a/1.png")
    for name in ("train/c", "test/b", "train/.hidden"):
        (Path("data") / name).mkdir()
    with pytest.warns(UserWarning, match="data.path data has 2 folder.s. without images, such as test/b: fill") as said:
        assert set(find_images(Path("data")).labels) == {"a", "b"}
    assert len(said) == 1


def test_a_recalled_folder_needs_no_training_images() -> None:
    touch("test/a/1.png")
    assert find_images(Path("data"), train=False).splits == ["test"]


HEAD = "path,label\n"
LISTS: dict[str, tuple[str, str | bytes, Any]] = {
    "plain": ("l.csv", HEAD + "a/1.png,a\nb/1.png,b\n", "ab"),
    "a mark of byte order": ("l.csv", b"\xef\xbb\xbf" + (HEAD + "a/1.png,a\n").encode(), "a"),
    "semicolons": ("l.csv", "path;label\na/1.png;a\nb/1.png;b\n", "ab"),
    "tabs": ("l.tsv", "path\tlabel\na/1.png\ta\n", "a"),
    "tabs in .csv": ("l.csv", "path\tlabel\na/1.png\ta\n", "a"),
    "commas in .tsv": ("l.tsv", "path,label\na/1.png,a\n", "a"),
    "an ending in upper case": ("l.CSV", HEAD + "a/1.png,a\n", "a"),
    "JSON lines": ("l.jsonl", '{"path": "a/1.png", "label": "a"}\n\n{"path": "b/1.png", "label": 7}\n', "a7"),
    "JSONL in upper case": ("l.JSONL", '{"path": "a/1.png", "label": "a"}\n', "a"),
    "backslashes": ("l.csv", HEAD + "a\\1.png,a\n", "a"),
    "blanks after commas": ("l.csv", "path, label\na/1.png, a\n", "a"),
    "names in upper case": ("l.csv", "Path,Label\na/1.png,a\n", "a"),
    "filename and class": ("l.csv", "filename,class\na/1.png,a\n", "a"),
    "image and category": ("l.csv", "id,image,category\n1,a/1.png,a\n", "a"),
    "file_name and target": ("l.jsonl", '{"file_name": "a/1.png", "target": 3}\n', "3"),
    "path comes before file": ("l.csv", "file,path,label\nx,a/1.png,a\n", "a"),
    "split in upper case": ("l.csv", "path,label,split\na/1.png,a,Train\nb/1.png,b,TEST\n", "ab"),
    "a comma in quotes": ("l.csv", HEAD + '"a/1.png","a, b"\n', ["a, b"]),
    "a separator of lines in a label": ("l.csv", HEAD + "a/1.png,a\u2028b\n", ["a\u2028b"]),
    "the same in JSON": ("l.jsonl", '{"path": "a/1.png", "label": "a\u2028b"}\n', ["a\u2028b"]),
    "a comma without quotes": ("l.csv", HEAD + "a/1.png,a, b\n", "row 1 of data/l.csv has more fields than the first"),
    "a number for a path": (
        "l.jsonl",
        '{"path": 5, "label": "a"}\n',
        "row 1 of data/l.jsonl has the path 5: write",
    ),
    "a list for a path": ("l.jsonl", '{"path": ["a"], "label": "a"}\n', r"has the path \['a'\]: write a text"),
    "no path": ("l.csv", "label\na\n", "row 1 of data/l.csv has no path: write `path` and `label` in each"),
    "no label": ("l.csv", "path\na/1.png\n", "row 1 of data/l.csv has no label"),
    "a label that is no number": (
        "l.jsonl",
        '{"path": "a/1.png", "label": NaN}\n',
        "row 1 of data/l.jsonl has no label",
    ),
    "several labels": (
        "l.jsonl",
        '{"path": "a/1.png", "label": ["a", "b"]}\n',
        "the label in row 1 of data/l.jsonl is of the type list: write one text",
    ),
    "half a character": (
        "l.jsonl",
        '{"path": "a/1.png", "label": "\\ud800"}\n',
        "cannot be read as CSV, TSV or JSON-l",
    ),
    "a column twice": (
        "l.csv",
        "path,label,label\na/1.png,a,b\n",
        "1 column name.s. twice, such as 'label': rename one",
    ),
    "rows that are no objects": ("l.jsonl", "[1]\n", "row 1 of data/l.jsonl has no path"),
    "an unknown split": (
        "l.csv",
        "path,label,split\na/1.png,a,tran\n",
        "has the split 'tran': write train, val",
    ),
    "latin-1": ("l.csv", HEAD.encode() + b"caf\xe9.png,a\n", r"is not UTF-8 \(byte 14\): convert it"),
    "not JSON": ("l.jsonl", "{path}\n", "cannot be read as CSV, TSV or JSON-lines"),
    "empty": ("l.csv", "", "has no images"),
    "a head alone": ("l.csv", HEAD, "has no images"),
    "labels that look alike": ("l.csv", HEAD + "a/1.png,a\nb/1.png,A\n", "labels 'A' and 'a', which look like one"),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists(case: str) -> None:
    name, content, expected = LISTS[case]
    touch("a/1.png", "b/1.png")
    path = Path("data") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str) and len(expected) > 2:
        with pytest.raises(ValueError, match=expected) as error:
            find_images(path)
        assert "\n" not in str(error.value)
        return
    found = find_images(path)
    assert found.labels == list(expected)
    assert all((found.root / one).is_file() for one in found.names)
    assert set(found.splits) in (set(), {"train", "test"})


def test_names_need_not_be_utf8() -> None:
    touch("a/1.png", "b/1.png")
    odd = os.fsencode("data/a/") + b"caf\xe9.png"
    shutil.copy("data/a/1.png", odd)
    data = Folder("data", size=2, batch_size=2, predict_path="data/a", val_fraction=0, test_fraction=0)
    assert len(data.load("train")[0]) == 3  # type: ignore[index]
    data.split("predict")
    paths = data.describe(torch.arange(2))["path"]
    assert paths == ["1.png", "caf\ufffd.png"]
    json.dumps(paths).encode()


def test_one_image_may_be_predicted() -> None:
    touch("a/1.png", "b/1.png", "b/2.png")
    data = Folder("data", size=2, batch_size=2, predict_path="data/b/2.png")
    fetch = data.split("predict")
    assert fetch is not None
    assert len(fetch) == 1
    assert data.describe(torch.tensor([0])) == {"path": ["2.png"]}


def shorter(images: Path, unreadable: Path) -> None:
    images.write_bytes(images.read_bytes()[:-5])


def emptied(images: Path, unreadable: Path) -> None:
    images.write_bytes(b"")


def longer(images: Path, unreadable: Path) -> None:
    images.write_bytes(images.read_bytes() + b"x")


def half(images: Path, unreadable: Path) -> None:
    unreadable.unlink()


def other_half(images: Path, unreadable: Path) -> None:
    images.unlink()


def no_json(images: Path, unreadable: Path) -> None:
    unreadable.write_text("{")


def part_without_list(images: Path, unreadable: Path) -> None:
    images.rename(images.with_suffix(".part"))
    images.with_suffix(".part").write_bytes(b"y" * 12)
    unreadable.unlink()


def part_too_long(images: Path, unreadable: Path) -> None:
    images.unlink()
    images.with_suffix(".part").write_bytes(b"y" * 999)


DAMAGES: list[Callable[[Path, Path], None]] = [
    shorter, emptied, longer, half, other_half, no_json, part_without_list, part_too_long,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
def test_a_damaged_cache_is_made_anew(damage: Callable, capsys: pytest.CaptureFixture) -> None:
    touch("a/1.png", "b/1.png")
    Image.fromarray(PIXELS + 200).save("data/b/1.png")
    form, names = ImageFormat.of(2, 3, "crop"), ["a/1.png", "b/1.png"]
    right = np.array(cached_images(Path("data"), names, form, Path("cache"))[0])
    (images,), (unreadable,) = (list(Path("cache").glob(f"*.{kind}")) for kind in ("images", "unreadable"))
    capsys.readouterr()
    damage(images, unreadable)
    again, problems = cached_images(Path("data"), names, form, Path("cache"))
    assert np.array_equal(again, right)
    assert problems == {}
    said = capsys.readouterr().out
    assert ("is damaged (" in said and "): it is made anew" in said) == (
        damage in (shorter, emptied, longer, half, no_json)
    )


@pytest.mark.parametrize("each", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_small_sets_have_all_splits(each: int, classes: int) -> None:
    labels = torch.arange(classes).repeat(each)
    found = split_examples(labels, 0.15, 0.15, seed=0)
    together = torch.cat(list(found.values()))
    assert together.sort().values.tolist() == list(range(len(labels)))
    if len(labels) >= 3:
        assert all(len(index) for index in found.values())
    assert len(found["train"]) >= 1
    zero = split_examples(labels, 0.0, 0.0, seed=0)
    assert [len(zero[name]) for name in ("train", "val", "test")] == [len(labels), 0, 0]


@pytest.mark.slow
def test_the_best_of_an_older_run_is_not_taken_in_silence() -> None:
    small = (*DIGITS, *CSV, "--name", "pair", "--trainer.max_epochs", 1, "--model.network.hidden_features", "[4]")
    first = run_here("fit", *small)
    assert (first.folder / "checkpoints" / "best.ckpt").exists()
    second = run_here("fit", *small, "--data.val_fraction", 0)
    assert second.code == 0, second.err
    assert second.folder != first.folder
    result = run_here("test", *small[:6], "--name", "pair", "--ckpt_path", "best")
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith(
        f"error: ckpt_path best: the newest run, {second.folder.relative_to(Path.cwd())}, has no best."
    )
    assert line.endswith("because it was not validated: write last, or the file of an older run")


@pytest.mark.parametrize(("largest", "white"), [(200, 255), (1000, 1023), (4000, 4095), (9000, 16383), (65535, 65535)])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_images_of_16_bits(largest: int, white: int, kind: str, capsys: pytest.CaptureFixture) -> None:
    for label, level in (("a", largest), ("b", largest // 2)):
        touch(f"{label}/x")
        for number in range(3):
            Image.fromarray(np.full((2, 2), level, np.uint16)).save(f"data/{label}/{number}.{kind}")
    settings: dict[str, Any] = {"size": 2, "channels": 1, "val_fraction": 0, "test_fraction": 0, "batch_size": 2}
    data = Folder("data", **settings)
    data.setup("fit")
    images, labels = data.load("train")  # type: ignore[misc]
    pixels = images.gather(torch.arange(len(labels)), False)
    found = {int(label): int(pixels[number].max()) for number, label in enumerate(labels)}
    assert found == {0: round(largest * 255 / white), 1: round(largest // 2 * 255 / white)}
    assert f"0 to {white:,} become 0 to 255" in capsys.readouterr().out
    again = Folder("data", **settings, predict_path="data/b")
    again.recall(data.state_dict() | {"learnt": data.learnt | {"white": 65535}})
    (predicted,) = again.load("predict")  # type: ignore[misc]
    assert int(predicted.gather(torch.arange(3), False).max()) == round(largest // 2 * 255 / 65535)
    (given,) = Folder("data", **settings, white=largest, predict_path="data/a").load("predict")  # type: ignore[misc]
    assert int(given.gather(torch.arange(3), False).min()) == 255


def test_floats_need_a_scale() -> None:
    touch("a/x")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save("data/a/1.tif")
    with pytest.raises(ValueError, match=r"more than 8 bits per channel: convert it, or write data\.white"):
        Folder("data", size=2, batch_size=2).load("train")
