"""CIFAR-10 from archives like the published ones, and their download."""

import hashlib
import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import cifar10
import numpy as np
import pytest
import torch
from cifar10 import CIFAR10, read
from helpers import ROOT, run_here

pytestmark = pytest.mark.weekly
FIT = ("fit", "--config", ROOT / "scripts" / "lab" / "cifar10.yaml", "--trainer.max_epochs", 1)


def make_cifar10(folder: Path, form: str = "python") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write an archive in a form of CIFAR-10, with ten random images in each of its six files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, parts = np.random.default_rng(0), {}
    with tarfile.open(folder / f"cifar-10-{form}.tar.gz", "w:gz") as archive:
        for name in ["batches.meta", *(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
            images = draw.integers(256, size=(10, 3072), dtype=np.uint8)
            labels = draw.integers(10, size=10)
            if form == "python":
                batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"training batch"}
                content, folder_name = pickle.dumps(batch, protocol=2), "cifar-10-batches-py"
            else:
                content = np.column_stack([labels.astype(np.uint8), images]).tobytes()
                name, folder_name = f"{name}.bin", "cifar-10-batches-bin"
            member = tarfile.TarInfo(f"{folder_name}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            parts[name.removesuffix(".bin")] = torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels)
    train = [parts[f"data_batch_{number}"] for number in range(1, 6)]
    joined = tuple(torch.cat(fields) for fields in zip(*train, strict=True))
    return {"train": joined, "test": parts["test_batch"]}  # type: ignore[dict-item]


@pytest.mark.parametrize("form", ["python", "binary"])
def test_both_forms_are_read(form: str) -> None:
    expected = make_cifar10(Path("data/cifar10"), form)
    found = read(Path(f"data/cifar10/cifar-10-{form}.tar.gz"))
    for split, (images, labels) in expected.items():
        assert images.dtype == torch.uint8
        assert torch.equal(found[split][0], images)
        assert torch.equal(found[split][1], labels)


def test_splits_are_apart_and_fixed() -> None:
    images, labels = make_cifar10(Path("data/cifar10"))["train"]
    data = CIFAR10(batch_size=8, val_examples=20)
    parts = [data.load(split) for split in ("train", "val", "test")]
    assert [len(part[1]) for part in parts] == [30, 20, 10]
    again = torch.cat([parts[0][0], parts[1][0]]).flatten(1)
    assert torch.equal(again[again[:, 0].argsort()].sum(0), images.flatten(1).sum(0))
    assert len(torch.unique(again, dim=0)) == 50
    assert torch.equal(CIFAR10(batch_size=16, val_examples=20).load("val")[0], parts[1][0])
    assert CIFAR10(val_examples=0).load("val") is None
    assert torch.equal(CIFAR10(val_examples=0).load("train")[1].sort().values, labels.sort().values)
    with pytest.raises(ValueError, match=r"val_examples is 50, but there are 50 training images: write fewer"):
        CIFAR10(val_examples=50).load("train")
    batch = data.to_device(data.examples("train", 5), torch.device("cpu"), training=False)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (cifar10.MEAN, cifar10.STD))
    assert torch.allclose(batch.inputs * std + mean, parts[0][0][:5].float(), atol=1e-3)


def test_the_configuration_trains() -> None:
    make_cifar10(Path("data/cifar10"))
    result = run_here(*FIT, "--data.val_examples", 10)
    assert result.code == 0, result.err
    assert "epoch 1  average loss " in result.out


def test_without_data_one_line_says_what_to_do() -> None:
    result = run_here(*FIT)
    assert result.code == 2
    assert re.search(r"data/cifar10 has no CIFAR-10: put cifar-10-python.tar.gz or .* data.download true", result.err)
    assert len(result.err.splitlines()) == 1


def test_download_is_checked_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(Path("server"))
    file = Path("server/cifar-10-python.tar.gz").absolute()
    monkeypatch.setattr(cifar10, "URL", file.as_uri())
    result = run_here(*FIT, "--data.download", "true")
    assert result.code == 2
    assert "nothing was kept" in result.err
    assert os.listdir("data/cifar10") == []
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    data = CIFAR10(download=True, val_examples=10)
    data.prepare_data()
    assert os.listdir("data/cifar10") == ["cifar-10-python.tar.gz"]
    assert len(data.load("train")[1]) == 40
    file.unlink()
    data.prepare_data()  # it is there


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


def test_a_pickle_runs_nothing() -> None:
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as archive:
        content = pickle.dumps({b"data": Harmful()}, protocol=2)
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"is damaged \(it names (posix|nt).mkdir\)"):
        read(Path("cifar-10-python.tar.gz"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("form", ["python", "binary"])
def test_damaged_archives(form: str) -> None:
    make_cifar10(Path(), form)
    path = Path(f"cifar-10-{form}.tar.gz")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"nothing", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not CIFAR-10, or is damaged"):
            read(path)
