"""Shards: their formats, their index, their cache, and what is wrong with them in one line."""

import csv
import errno
import io
import itertools
import json
import os
import shutil
import struct
import tarfile
import threading
import warnings
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from helpers import Result, run_here
from PIL import Image

from batchwise.batching.fetch import DataError, Request
from batchwise.batching.order import Shuffled
from batchwise.batching.shards import BlockShuffled
from batchwise.sources import shard_cache, shard_index, shard_reading, shard_writing
from batchwise.sources.digits import Digits
from batchwise.sources.shard_files import save_table
from batchwise.sources.shard_index import alike, make_index, read_index, split_of
from batchwise.sources.shard_reading import Shelf
from batchwise.sources.shard_writing import write_shards
from batchwise.sources.shards import Shards
from batchwise.sources.store import Store

EXAMPLES = 60
PIXELS = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8), np.uint8)
LABELS = np.arange(EXAMPLES) % 3


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def arrow(path: Path, numbers: range) -> None:
    table = pa.table({"image": [png(PIXELS[i]) for i in numbers], "label": [f"n{LABELS[i]}" for i in numbers]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def stream(path: Path, numbers: range) -> None:
    """In batches, as `save_to_disk` of `datasets` writes it, with images as dicts."""
    rows = [{"image": {"bytes": png(PIXELS[i]), "path": None}, "label": f"n{LABELS[i]}"} for i in numbers]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, 4)


def parquet(path: Path, numbers: range) -> None:
    table = pa.table({"image": [png(PIXELS[i]) for i in numbers], "label": [f"n{LABELS[i]}" for i in numbers]})
    pq.write_table(table, path, row_group_size=4)


def tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for i in numbers:
            about = json.dumps({"label": f"n{LABELS[i]}", "more": [1]}).encode()
            for ending, data in (("image", png(PIXELS[i])), ("cls", b"%d" % LABELS[i]), ("json", about)):
                member = tarfile.TarInfo(f"folder/{i:03}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def mds(path: Path, numbers: range) -> None:
    """As version 2 of mosaicml-streaming writes it."""
    about = {
        "column_names": ["image", "label", "number", "box"],
        "column_encodings": ["png", "str", "int", "ndarray:float32:2"],
        "column_sizes": [None, None, 8, 8],
    }
    head, examples = json.dumps(about).encode(), []
    for i in numbers:
        image, label = png(PIXELS[i]), f"n{LABELS[i]}".encode()
        sizes = struct.pack("<II", len(image), len(label))
        examples.append(sizes + image + label + struct.pack("<q", i) + np.array([i, 1], np.float32).tobytes())
    ends = np.cumsum([4 * (len(examples) + 2) + len(head), *map(len, examples)]).astype("<u4")
    data = struct.pack("<I", len(examples)) + ends.tobytes() + head + b"".join(examples)
    with pa.output_stream(str(path), compression="zstd" if path.name.endswith(".zstd") else None) as file:
        file.write(data)


FORMATS = {
    **{".arrow": arrow, ".stream.arrow": stream, ".parquet": parquet, ".tar": tar, ".tgz": tar},
    **{".mds": mds, ".mds.zstd": mds},
}


def make(folder: Path, ending: str = ".arrow", each: int = 10) -> Path:
    """Five training shards of ten examples, and one for validation."""
    folder.mkdir()
    for start in range(0, EXAMPLES, each):
        name = f"train-{start:03}" if start < EXAMPLES - each else "val-000"
        FORMATS[ending](folder / f"{name}{ending}", range(start, start + each))
    make_index(Store(str(folder)))
    return folder


def shards(path: object, **settings: Any) -> Shards:
    usual = {"inputs": "image", "size": 8, "channels": 1, "batch_size": 8, "seed": 0, "cache": "cache"}
    return Shards(str(path), **{**usual, "target": "label", **settings})


def examples(data: Shards, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    shelf = data.split(split)
    assert shelf is not None
    (fields, _), *_ = shelf.stream([Request.one(torch.arange(len(shelf)))])
    return fields  # type: ignore[return-value]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.slow
def test_every_format_has_the_same_examples(ending: str) -> None:
    target = "json.label" if ending in (".tar", ".tgz") else "label"
    data = shards(make(Path("data"), ending), target=target)
    images, labels = examples(data)
    assert torch.equal(images, torch.from_numpy(PIXELS[:50, None]))
    assert data.class_names == ["n0", "n1", "n2"]
    assert labels.tolist() == LABELS[:50].tolist()
    assert examples(data, "val")[1].tolist() == LABELS[50:].tolist()
    data.setup("fit")
    seen = torch.cat([part.index for batch in data.train_dataloader() for part in batch.micro_batches])
    assert seen.sort().values.tolist() == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_order(num_workers: int) -> None:
    data = shards(make(Path("data")), num_workers=num_workers, micro_batch_size=3, order=BlockShuffled(2))
    data.setup("fit")
    images, labels = torch.from_numpy(PIXELS[:, None]), torch.from_numpy(LABELS)
    for epoch in range(2):
        places = data.order.indices(epoch, 0, 50)
        parts = [part for batch in data.train_dataloader() for part in batch.micro_batches]
        assert torch.equal(torch.cat([part.index for part in parts]), data.order.indices(0, 0, 50))
        assert all(torch.equal(part.inputs, images[part.index]) for part in parts)
        assert all(torch.equal(part.targets, labels[part.index]) for part in parts)
        assert len(places) == 50


def test_many_shards_some_of_them_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reading, "OPEN", 3)
    Path("data").mkdir()
    sizes = [3, 0, 1, 0, 0, 4, 2, 0, 5, 1, 1, 1, 0]
    for number, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        table = pa.table({"x": np.arange(end - size, end, dtype=np.float64), "label": np.arange(size)})
        pq.write_table(table, f"data/{number:02}.parquet")
    make_index(Store("data"))
    data = shards("data", inputs="x", order=BlockShuffled(5), batch_size=4)
    data.setup("fit")
    seen = [value for batch in data.train_dataloader() for value in batch.micro_batches[0].inputs.flatten().tolist()]
    assert sorted(seen) == list(range(18))
    assert seen == data.order.indices(0, 0, 18).tolist()
    shelf = data.split("train")
    assert isinstance(shelf, Shelf)
    assert len(shelf.dataset._open) <= 3 + 4


def test_numbers_arrays_and_nothing_to_predict() -> None:
    Path("data").mkdir()
    rng = np.random.default_rng(0)
    boxes, tokens = rng.normal(size=(20, 2, 3)), rng.integers(0, 9, (20, 4), np.int16)
    table = pa.table({
        "a": np.arange(20), "b": np.arange(20) / 2, "y": np.arange(20) + 0.5, "on": np.arange(20) % 2 == 0,
        "third": np.arange(20) / 3, "boxes": pa.array(boxes.tolist()), "tokens": pa.array(list(tokens)),
    })  # fmt: skip
    pq.write_table(table, "data/0.parquet")
    make_index(Store("data"))
    inputs, targets = examples(shards("data", inputs=["a", "b", "on"], target="y"))
    assert inputs.dtype == torch.float32
    assert inputs[:, 1].tolist() == [i / 2 for i in range(20)]
    assert inputs[:2, 2].tolist() == [1, 0]
    assert targets.tolist() == [i + 0.5 for i in range(20)]
    assert examples(shards("data", inputs=["a"], target="third"))[1].tolist() == [i / 3 for i in range(20)]
    assert targets.dtype == torch.float64
    several = examples(shards("data", inputs=["boxes", "tokens"], target=None))
    assert torch.equal(several[0], torch.from_numpy(boxes))
    assert torch.equal(several[1], torch.from_numpy(tokens))


def test_arrays_of_pixels_are_scaled_by_the_largest() -> None:
    digits = Digits(batch_size=64)
    write_shards(digits, Path("made"), 1)
    data = Shards("made", "inputs", "targets", batch_size=64, seed=0)
    images = data.to_device(data.examples("train", 2000), torch.device("cpu"), training=False).inputs
    assert (images.min().item(), images.max().item()) == (-1, 1)


def test_fields_of_your_own() -> None:
    class Sums(Shards):
        def fields(self, values: Any) -> tuple:
            return torch.tensor([len(image) for image in values["image"]]), torch.zeros(len(values["image"]))

    data = Sums(str(make(Path("data"))), "image", batch_size=8, num_workers=1)
    assert examples(data)[0].tolist() == [len(png(PIXELS[i])) for i in range(50)]


def test_shards_set_apart_for_validation() -> None:
    Path("data").mkdir()
    for number in range(6):
        parquet(Path(f"data/{number}.parquet"), range(10 * number, 10 * number + 10))
    make_index(Store("data"))
    assert shards("data").split("val") is None
    data = shards("data", val_shards=2)
    train, val = ([shard.name for shard in data.index.of(split)] for split in ("train", "val"))
    assert (len(train), len(val), len(data.split("val") or ())) == (4, 2, 20)
    assert sorted(train + val) == [f"{number}.parquet" for number in range(6)]
    assert set(train) == {shard.name for shard in shards("data", val_shards=2).index.of("train")}
    assert val != ["0.parquet", "1.parquet"]
    with pytest.raises(ValueError, match="val_shards is 6, and there are 6 for training: write fewer"):
        _ = shards("data", val_shards=6).index


# The index


def test_splits_are_named_by_folder_or_file() -> None:
    names = {"train/0.tar": "train", "validation/a.tar": "val", "val-00.parquet": "val", "x/test_3.tar": "test"}
    names |= {"val0001.tar": "val", "Test12/a.tar": "test", "0001.tar": "train", "valley-1.tar": "train"}
    assert {name: split_of(name) for name in names} == names
    assert split_of("0001.tar") == split_of("training-1.tar") == "train"


def test_alike() -> None:
    assert alike([{"a": 5}, {"b": 5}]) == 1
    assert alike([{"a": 5, "b": 5}, {"a": 2, "b": 2}]) == 0
    assert 0 < alike([{"a": 4, "b": 1}, {"a": 1, "b": 4}]) < 1
    assert alike([{"a": 3}]) == 0


def test_an_interrupted_index_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path("data"))
    whole, looked = Path("data/shards.json").read_bytes(), []
    Path("data/shards.json").unlink()
    look = shard_index._look

    def slow(store: Store, name: str, folder: Path) -> Any:
        looked.append(name)
        if len(looked) == 4:
            raise KeyboardInterrupt
        return look(store, name, folder)

    monkeypatch.setattr(shard_index, "_look", slow)
    monkeypatch.setattr(shard_index, "AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        make_index(Store("data"))
    assert not Path("data/shards.json").exists()
    first = looked[:3]
    looked[:] = [""] * 10
    make_index(Store("data"))
    assert set(looked[10:]).isdisjoint(first)
    assert Path("data/shards.json").read_bytes() == whole
    assert not Path("data/shards.json.part").exists()


def test_a_store_in_memory() -> None:
    folder, remote = make(Path("data")), Store("memory://there")
    for path in folder.iterdir():
        remote.write(path.name, path.read_bytes())
    assert read_index(remote) == read_index(Store("data")) == make_index(remote)
    assert torch.equal(examples(shards("memory://there"))[0], torch.from_numpy(PIXELS[:50, None]))


def test_shards_of_one_class_each_are_warned_of() -> None:
    Path("data").mkdir()
    for number in range(12):
        table = {"x": np.arange(20.0), "label": np.full(20, number % 3)}
        pq.write_table(pa.table(table), f"data/{number}.parquet")
    make_index(Store("data"))
    few, enough = (shards("data", inputs="x", order=BlockShuffled(window)) for window in (2, 12))
    with pytest.warns(UserWarning, match=r"'label' \(100% .* says as much as .*: write a window of \d+ or more"):
        few.setup("fit")
    with warnings.catch_warnings(action="error"):
        few.setup("fit")  # it is said once
    with warnings.catch_warnings(action="error"):
        enough.setup("fit")


# The cache


def files() -> dict[str, int]:
    return {path.name: path.stat().st_size for path in Path("cache").iterdir() if path.suffix != ".lock"}


def test_the_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    data = shards(make(Path("data"), ".parquet"), cache_gib=1.0)
    shelf = data.split("train")
    assert isinstance(shelf, Shelf)
    cache, five = shelf.dataset.cache, shelf.dataset.files
    sizes = []
    for shard in five[:3]:
        sizes.append(cache.open(shard)[0].stat().st_size)
    cache.limit = sum(sizes) + five[3].size // 2
    cache.open(five[0])  # so that the second one is the oldest
    cache.open(five[3])
    assert sum(files().values()) <= cache.limit
    assert [cache._path(shard).exists() for shard in five] == [True, False, True, True, False]
    assert torch.equal(examples(data)[0], torch.from_numpy(PIXELS[:50, None]))
    assert sum(files().values()) <= cache.limit


def test_what_a_killed_process_left_is_removed() -> None:
    data = shards(make(Path("data"), ".parquet"))
    shelf = data.split("train")
    assert isinstance(shelf, Shelf)
    own = shelf.dataset.cache._path(shelf.dataset.files[0]).name[:2]
    left, busy = [name for name in ("ab", "cd", "ef") if name != own][:2]
    for name in (f"{left}1.part", f"{left}1.raw", f"{left}1.room", f"{busy}2.part"):
        Path("cache", name).write_bytes(bytes(100))
    with FileLock(f"cache/{busy}.lock"):  # somebody is at work
        shelf.dataset.cache.open(shelf.dataset.files[0])
    assert {name for name in files() if not name.endswith(".arrow")} == {f"{busy}2.part"}


@pytest.mark.slow
def test_a_damaged_file_is_made_anew() -> None:
    data = shards(make(Path("data"), ".parquet"))
    examples(data)
    for path in Path("cache").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(examples(shards("data"))[0], torch.from_numpy(PIXELS[:50, None]))


def test_two_make_a_shard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, write = [], shard_cache.save_table
    monkeypatch.setattr(shard_cache, "save_table", lambda table, path: (made.append(path), write(table, path)))
    data = [shards(make(Path("data"), ".parquet")), shards("data")]
    threads = [threading.Thread(target=examples, args=(one,)) for one in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == 5


def test_an_arrow_file_is_used_where_it_is() -> None:
    examples(shards(make(Path("data"))))
    assert set(files().values()) == {0}


# What is wrong


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "sleep", lambda seconds: None)


def read(data: Shards) -> None:
    data.setup("fit")
    list(data.train_dataloader())


def broken(data: Shards, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        read(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("ending", [".arrow", ".parquet", ".tar"])
@pytest.mark.slow
def test_a_shard_that_is_missing_cut_short_or_another(ending: str, num_workers: int) -> None:
    target = "cls" if ending == ".tar" else "label"
    path = make(Path("data"), ending) / f"train-020{ending}"
    whole = path.read_bytes()

    def put(content: bytes) -> None:
        """Write another file in its place: what a process has mapped of the old one stays."""
        Path("other").write_bytes(content)
        Path("other").replace(path)

    def said() -> str:
        return broken(shards("data", target=target, num_workers=num_workers))

    path.unlink()
    assert f"shard train-020{ending} of data.path data is not there: put it back" in said()
    put(whole[:-7])
    assert f"shard train-020{ending} has {len(whole) - 7:,} bytes, and the index says {len(whole):,}" in said()
    put(whole[:100] + b"x" + whole[101:])
    assert f"shard train-020{ending} has changed" in said()
    put(whole)
    data = shards("data", target=target, num_workers=num_workers)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 7


def test_a_fault_that_passes_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    slept: list[float] = []
    monkeypatch.setattr(shard_cache, "sleep", slept.append)
    make(Path("data"), ".parquet")
    data, get, faults = shards("data"), Store.get, iter([TimeoutError(), OSError("503, Service Unavailable")] * 4)
    monkeypatch.setattr(data.store, "local", None)

    def unsure(self: Store, name: str, path: Path, each: Any) -> None:
        if "020" in name and (fault := next(faults, None)):
            raise fault
        get(self, name, path, each)

    monkeypatch.setattr(Store, "get", unsure)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 7
    out = capsys.readouterr().out
    assert "shard train-020.parquet cannot be read (TimeoutError): trying again in" in out
    assert "(503, Service Unavailable): trying again in 0.5 s" in out or "(TimeoutError): trying again in 0.5 s" in out
    assert slept == sorted(slept)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 0.01)  # a machine that halts for seconds does not count
    monkeypatch.setattr(shard_cache, "monotonic", clock.__next__)
    monkeypatch.setattr(shard_cache, "sleep", lambda seconds: None)
    make(Path("data"), ".parquet")
    data = shards("data", patience=0.05)
    monkeypatch.setattr(data.store, "local", None)

    def gone(*_: Any) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(Store, "get", gone)
    assert "could not be read for 0 s (connection refused): --ckpt_path last goes on" in broken(data)


@pytest.mark.slow
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path("data"), ".parquet")
    usage = os.statvfs("/") and shard_cache.shutil.disk_usage("/")
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    assert ": the disk is full; make room" in broken(shards("data"))


def test_a_cache_that_is_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for, as for a store that does not answer."""

    def closed(self: shard_cache.Cache, need: int, room: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(room))

    make(Path("data"), ".parquet")
    monkeypatch.setattr(shard_cache.Cache, "_reserve", closed)
    assert "cannot be written: write another folder" in broken(shards("data", patience=0.01))


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
def test_a_complete_cache_that_is_read_only_is_read(ending: str, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it belongs to another user, who alone may change the times of its files."""

    def closed(path: Path) -> None:
        raise OSError(error, os.strerror(error), str(path))

    read(shards(make(Path("data"), ending)))
    monkeypatch.setattr(shard_cache.os, "utime", closed)
    assert torch.equal(examples(shards("data"))[0], torch.from_numpy(PIXELS[:50, None]))


def test_a_broken_image_is_named_and_can_be_left_out() -> None:
    Path("data").mkdir()
    images = [png(pixels) for pixels in PIXELS[:20]]
    images[7] = b"no image"
    pq.write_table(pa.table({"image": images, "label": LABELS[:20]}), "data/0.parquet")
    make_index(Store("data"))
    assert "example 7 cannot be read" in broken(shards("data"))
    data = shards("data", max_unreadable=1)
    data.setup("fit")
    assert sum(len(batch) for batch in data.train_dataloader()) == 20


def test_settings_that_do_not_fit() -> None:
    make(Path("data"), ".parquet")
    assert "has no column 'picture': write data.inputs and data.target from image, label" in broken(
        shards("data", inputs="picture"), ValueError
    )
    assert "data.order BlockShuffled 16 needs 5 shards at once, and as many that come next" in broken(
        shards("data", cache_gib=1e-6), ValueError
    )
    assert "data.order Shuffled needs 5 shards at once" in broken(
        shards("data", cache_gib=1e-6, order=Shuffled()), ValueError
    )
    assert "data.inputs is empty" in broken_inputs([])
    assert "data.path nowhere has no shards.json: the command `shards nowhere` makes it" in broken(
        shards("nowhere"), ValueError
    )
    assert "is no address that can be read" in broken_address("what://is/this")
    text = Path("data/shards.json").read_text()
    Path("data/shards.json").write_text(text.replace('"format": 1', '"format": 9'))
    assert "is of version 9, and this reads 1" in broken(shards("data"), ValueError)
    Path("data/shards.json").write_text(text[:100])
    assert "is damaged" in broken(shards("data"), ValueError)


def broken_inputs(inputs: list[str]) -> str:
    with pytest.raises(ValueError, match=r"data\.inputs") as caught:
        shards("data", inputs=inputs)
    return str(caught.value)


def broken_address(address: str) -> str:
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        shards(address)
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"image": [1.0, None], "label": [0, 1]},
            "column 'image' of data.path data has values that are missing or not finite",
        ),
        ({"image": [1.0, float("nan")], "label": [0, 1]}, "first in shard 0.parquet (1 values)"),
        ({"image": [1.0, 2.0], "label": [0, None]}, "column 'label' of data.path data has values that are missing"),
        ({"image": [[1.0, 2.0], None], "label": [0, 1]}, "first in shard 0.parquet (1 values)"),
        ({"image": [[1.0, 2.0], [3.0]], "label": [0, 1]}, "holds arrays of 1 to 2 values: cut or pad them"),
        ({"image": [[], []], "label": [0, 1]}, "holds arrays of 0 to 0 values: cut or pad them"),
        ({"image": [[[1.0], None], [[2.0], [3.0]]], "label": [0, 1]}, "first in shard 0.parquet (1 values)"),
        ({"image": [timedelta(1)] * 2, "label": [0, 1]}, "holds duration[us], which is not read here"),
        ({"image": [1.0, 2.0], "label": [b"a", b"b"]}, "data.target 'label' holds bytes, which are no labels"),
        ({"image": [{"a": 1}, {"a": 2}], "label": [0, 1]}, "column 'image' of shard 0.parquet holds struct"),
        ({"image": [1.0, 2.0], "label": ["Yes", "yes"]}, "labels 'Yes' and 'yes', which look like one"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_bad_columns(table: dict, words: str) -> None:
    Path("data").mkdir()
    pq.write_table(pa.table(table), "data/0.parquet")
    make_index(Store("data"))
    with pytest.raises((ValueError, DataError)) as caught:
        read(shards("data"))
    assert words in str(caught.value)


def test_arrays_of_other_lengths_in_a_later_shard() -> None:
    """They are refused before training, and not in the step that reaches them."""
    Path("data").mkdir()
    for number, image in enumerate(([1.0, 2.0], [3.0, 4.0], [5.0])):
        pq.write_table(pa.table({"image": [image] * 20, "label": [0] * 20}), f"data/{number}.parquet")
    make_index(Store("data"))
    with pytest.raises(ValueError, match=r"first in shard 2\.parquet, holds arrays of 1 to 2 values"):
        shards("data").setup("fit")
    assert len(examples(shards("data", inputs="label", target=None))[0]) == 60  # nobody asks for the arrays


def test_shards_with_other_columns() -> None:
    Path("data").mkdir()
    pq.write_table(pa.table({"image": [1.0], "label": [0]}), "data/0.parquet")
    for other, words in (
        ({"image": [1.0]}, r"'label' \(int64 and none\)"),
        ({"image": [1.0], "label": [0], "more": [0]}, r"'more' \(none and int64\)"),
        ({"image": [1.0], "label": [0.5]}, r"'label' \(int64 and double\)"),
    ):
        pq.write_table(pa.table(other), "data/1.parquet")
        with pytest.raises(ValueError, match=rf"shards 0\.parquet and 1\.parquet have other columns, such as {words}"):
            make_index(Store("data"))


def test_categories_that_are_no_texts_and_times_of_nanoseconds() -> None:
    Path("data").mkdir()
    days = pa.array([date(1970, 1, 3), date(1970, 1, 2)]).dictionary_encode()
    moments = pa.array([86_400_000_000_001, 0], pa.timestamp("ns"))
    table = pa.table({"image": days, "label": moments})
    with pa.OSFile("data/0.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    make_index(Store("data"))
    inputs, targets = examples(shards("data"))
    assert inputs.tolist() == [[2], [1]]
    assert targets.tolist() == [1, 0]


# The command line


def test_files_that_need_no_copy_need_no_cache() -> None:
    data = shards(make(Path("data")), cache_gib=1e-6)
    read(data)
    assert set(files().values()) == {0}


@pytest.mark.weekly
def test_write_train_and_refuse_other_data(tmp_path: Path) -> None:
    settings = ("--data.inputs", "inputs", "--data.target", "targets")
    folder = ("--data.path", "digits", *settings, "--trainer.max_epochs", 1)
    assert run_here("shards", "--config", "configs/digits.yaml", "--path", "digits", "--mib", 0.02).code == 0
    again = run_here("shards", "--config", "configs/digits.yaml", "--path", "digits")
    assert (again.code, again.err) == (
        2,
        "error: path digits has files: write another folder, because nothing is replaced\n",
    )
    fit = run_here("fit", "--config", "configs/shards.yaml", *folder)
    assert fit.code == 0, fit.err
    assert "from 5 shards" in fit.out
    assert run_here("test", "--config", "configs/shards.yaml", *folder, "--ckpt_path", "best").code == 0
    Path("new").mkdir()
    images = pa.ipc.open_file("digits/test-00000.arrow").read_all().select(["inputs"])  # without targets
    pq.write_table(images, "new/a.parquet")
    assert run_here("shards", "new").code == 0
    shutil.move("digits", "elsewhere")  # `predict` needs no training data
    new = ("--data.predict_path", "new", "--ckpt_path", "best")
    predict = run_here("predict", "--config", "configs/shards.yaml", *folder, *new)
    assert predict.code == 0, predict.err
    shutil.move("elsewhere", "digits")
    with next(Path().glob("runs/**/predictions.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["shard"], row["row"]) for row in rows] == [("a.parquet", str(number)) for number in range(len(images))]
    more = pa.ipc.open_file("digits/train-00000.arrow").read_all()
    with pa.OSFile("digits/train-9.arrow", "wb") as file, pa.ipc.new_file(file, more.schema) as writer:
        writer.write_table(more)
    assert run_here("shards", "digits").out.startswith("train: 6 shards")
    resumed = run_here("fit", "--config", "configs/shards.yaml", *folder, "--ckpt_path", "last")
    assert resumed.code == 2
    assert "is of a training that differs (data.examples: " in resumed.err
    data = pa.table(
        {
            name: column.combine_chunks().take(pa.array(range(len(more))[::-1]))
            for name, column in zip(more.column_names, more.columns, strict=True)
        }
    )
    for name, content in (("train-9.arrow", None), ("train-00000.arrow", data)):
        Path("digits", name).unlink()
        if content is not None:
            with pa.OSFile(f"digits/{name}", "wb") as file, pa.ipc.new_file(file, more.schema) as writer:
                writer.write_table(content.cast(more.schema))
    assert run_here("shards", "digits").out.startswith("train: 5 shards")
    turned = run_here("fit", "--config", "configs/shards.yaml", *folder, "--ckpt_path", "last")
    assert turned.code == 2
    assert "the checkpoint was trained on other data: it has learnt shards" in turned.err


def test_the_command_for_an_index() -> None:
    def refused(result: Result) -> str:
        assert result.code == 2
        assert result.err.count("\n") == 1
        return result.err

    assert "nowhere has no shards: write a folder of files that end in .arrow" in refused(run_here("shards", "nowhere"))
    Path("bad").mkdir()
    Path("bad/0.parquet").write_bytes(b"no")
    assert "shard 0.parquet cannot be read" in refused(run_here("shards", "bad"))


def test_writing_that_is_interrupted_leaves_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the index would be made of a part of the data, and nobody would see it."""

    def full(table: pa.Table, path: Path) -> None:
        if "00003" in path.name:
            raise KeyboardInterrupt
        save_table(table, path)

    monkeypatch.setattr(shard_writing, "save_table", full)
    with pytest.raises(KeyboardInterrupt):
        write_shards(Digits(batch_size=64), Path("made"), 0.005)
    assert len(list(Path("made").iterdir())) == 3
    with pytest.raises(ValueError, match="made has no shards"):
        make_index(Store("made"))


def test_what_is_written_is_what_load_gives(tmp_path: Path) -> None:
    digits = Digits(batch_size=64)
    write_shards(digits, tmp_path / "made", 0.03)
    data = Shards(str(tmp_path / "made"), "inputs", "targets", batch_size=64)
    inputs, targets = examples(data)
    first = digits.load("train")
    assert first is not None

    def rows(images: torch.Tensor, numbers: torch.Tensor) -> list:
        return sorted(
            (*image.flatten().tolist(), number) for image, number in zip(images, numbers.tolist(), strict=True)
        )

    assert rows(inputs, targets) == rows(*first)
    assert not torch.equal(inputs, first[0])  # they are shuffled
