"""CIFAR-10: 60,000 colour images of 32 x 32 pixels in 10 classes, from a local archive or a download.

PYTHONPATH=scripts/lab python -m batchwise fit --config scripts/lab/cifar10.yaml --data.download true
"""

import codecs
import hashlib
import io
import os
import pickle
import tarfile
import urllib.request
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.loader import MicroBatch
from batchwise.data.module import DataModule

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
MEAN, STD = (125.31, 122.95, 113.87), (62.99, 62.09, 66.70)
"""Mean and std of red, green and blue over the training images, in values from 0 to 255."""


class CIFAR10(DataModule):
    """Planes, cars, birds and so on (Krizhevsky 2009, "Learning multiple layers of features from tiny images").

    Inputs are [N, 3, 32, 32], normalised; targets are class numbers [N]. All images are in memory, as bytes (180 MB).

    Args:
        folder: contains cifar-10-python.tar.gz or cifar-10-binary.tar.gz, which is read without unpacking.
        download: download the former (170 MB) into the folder, if it contains neither, and check its SHA-256.
        val_examples: number of random training images that are kept for validation; 0: train on all images.
        split_seed: draws these images.
        **kwargs: those of `DataModule`.
    """

    def __init__(
        self,
        folder: str = "data/cifar10",
        download: bool = False,
        val_examples: int = 5000,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.folder, self.download = Path(folder), download
        self.val_examples, self.split_seed = val_examples, split_seed

    def prepare_data(self) -> None:
        """Download the archive, if asked to. One process per machine does this."""
        if self.download and not any((self.folder / name).exists() for name in ARCHIVES):
            fetch(URL, SHA256, self.folder / ARCHIVES[0])

    def load(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Return images uint8 [N, 3, 32, 32] and class numbers int64 [N]."""
        images, labels = self._all["test" if split == "test" else "train"]
        if split == "test":
            return images, labels
        if not 0 <= self.val_examples < len(labels):
            raise ValueError(
                f"data.val_examples is {self.val_examples}, but there are {len(labels)} training images: write fewer"
            )
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        index = shuffled[: self.val_examples] if split == "val" else shuffled[self.val_examples :]
        return (images[index], labels[index]) if len(index) else None

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Normalise on the device, so that bytes and not floats travel there."""
        images = batch.inputs if batch.inputs.is_floating_point() else batch.inputs.to(torch.get_default_dtype())
        mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
        return replace(batch, inputs=(images - mean).div_(std))

    @cached_property
    def _all(self) -> dict[str, tuple[Tensor, Tensor]]:
        path = next((self.folder / name for name in ARCHIVES if (self.folder / name).exists()), None)
        if path is None:
            raise ValueError(
                f"data.folder {self.folder} has no CIFAR-10: put {' or '.join(ARCHIVES)} there, from "
                f"{URL.rpartition('/')[0]}; or write data.download true"
            )
        return read(path)


def read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images uint8 [N, 3, 32, 32] and class numbers int64 [N] of "train" and "test" from an archive.

    Raises:
        ValueError: it is not CIFAR-10, or damaged.
    """
    parse = _from_binary if "binary" in path.name else _from_pickle
    found: dict[str, tuple[Any, Any]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).stem
                if name.startswith("data_batch") or name == "test_batch":
                    found[name] = parse(archive.extractfile(member).read())  # type: ignore[union-attr]
        parts = {"train": [found[f"data_batch_{number}"] for number in range(1, 6)], "test": [found["test_batch"]]}
        return {split: _joined(each) for split, each in parts.items()}
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not CIFAR-10, or is damaged ({error}): fetch it again") from error


def _joined(parts: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(np.concatenate(fields)) for fields in zip(*parts, strict=True))
    return images.view(-1, 3, 32, 32), labels.long()


def _from_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read records of one label byte and 3,072 pixel bytes."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _from_pickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
    return batch[b"data"], np.array(batch[b"labels"])


class _Arrays(pickle.Unpickler):
    """Reads arrays alone. A pickle can name, and so run, any function: all others are refused."""

    known: dict[str, Any] = {  # noqa: RUF012
        "_reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.known[name]


def fetch(url: str, sha256: str, path: Path) -> None:
    """Download a file. Nothing is kept unless all of it has arrived unaltered.

    Raises:
        ValueError: the file has another SHA-256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = path.with_name(f"{path.name}.part"), hashlib.sha256()
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=60) as source, part.open("wb") as file:
        while block := source.read(2**20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha256:
        part.unlink()
        raise ValueError(f"{url} gave a file with SHA-256 {digest.hexdigest()} and not {sha256}: nothing was kept")
    os.replace(part, path)
