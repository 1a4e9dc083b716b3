"""Documents as arrays of tokens in a folder. The folder is written once, complete or not at all."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from batchwise.batching.packing import best_fit
from batchwise.batching.ragged import PADDING
from batchwise.data.labels import check_alike, sorted_labels
from batchwise.sources.documents import Document, key_of, read, split_keys
from batchwise.sources.vocabulary import Vocabulary, make_vocabulary

FORMAT = 2
"""Version of the folder's format; a new version makes new folders."""


@dataclass(frozen=True)
class Tokens:
    """How arrays of tokens are made from files.

    The arguments are those of `batchwise.sources.text.Text`, except for these:

    Args:
        files: the files of each split. Those of "train" are shared with "val" and "test" by the fractions.
        fractions: share of the documents of `files["train"]` for "val" and "test".
    """

    files: dict[str, list[str]]
    fractions: dict[str, float]
    vocabulary: str
    sequence_length: int
    packing: str | None
    text_column: str
    label_column: str | None
    delimiter: str | None
    split_seed: int

    def folder(self, root: Path) -> Path:
        """Return the folder with the arrays, in `root`. It is written if there is none.

        Raises:
            ValueError: it cannot be written, or the documents cannot be read.
        """
        names = [name for names in self.files.values() for name in names] + [self.vocabulary]
        stats = [os.stat(name) for name in names if os.path.isfile(name)]
        content = [FORMAT, asdict(self), [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
        folder = root / f"text-{blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()}"
        if not folder.exists():
            try:
                self._make(root, folder)
            except OSError as error:
                if error.filename in names:  # a text or the tokenizer, and not the cache
                    raise
                raise ValueError(
                    f"data.cache {root} cannot be written ({error.strerror}): make room, or write another folder"
                ) from error
        return folder

    def _make(self, root: Path, folder: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".text-", dir=root, ignore_cleanup_errors=True) as part:
            self._write(Path(part))
            try:
                os.rename(part, folder)
            except OSError:  # another process was faster, with the same content
                if not folder.exists():
                    raise

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yield each document with its split."""
        for split, document in self._read():
            key = key_of(document.text, self.split_seed) if split == "train" and self._borders else None
            found = (name for name, border in self._borders.items() if key is not None and key < border)
            yield next(found, split), document

    def _read(self) -> Iterator[tuple[str, Document]]:
        for split, names in self.files.items():
            for name in names:
                for document in read(Path(name), self.text_column, self.label_column, self.delimiter):
                    yield split, document

    @cached_property
    def _borders(self) -> dict[str, int]:
        if not any(self.fractions.values()):
            return {}
        texts = (document.text for split, document in self._read() if split == "train")
        return split_keys({key_of(text, self.split_seed) for text in texts}, self.fractions)

    def _write(self, folder: Path) -> None:
        characters, classes = self._scan()
        vocabulary = make_vocabulary(self.vocabulary, characters)
        dtype = "int16" if vocabulary.size < 2**15 else "int32"
        parts = {split: _Split(folder / split, dtype) for split in ("train", "val", "test")}
        for split, document in self.documents():
            label = None if document.label is None else classes.index(document.label)
            parts[split].add(*self.sequences(document, vocabulary), label)
        splits = {}
        for split, part in parts.items():
            blocks = part.finish(self.packing, self.sequence_length)
            if not blocks and split in self.files:
                key = "data.files" if split == "train" else f"data.{split}_files"
                raise ValueError(f"{key} have no text: write files that have some")
            if blocks:
                tokens = sum(part.lengths)
                splits[split] = {"tokens": tokens, "sequences": len(part.lengths)}
                filled = f", packed into {blocks:,} blocks filled to {tokens / (blocks * self.sequence_length):.2%}"
                text = f"{split} text: {tokens:,} tokens in {len(part.lengths):,} sequences"
                print(text + filled * (self.packing is not None), flush=True)
        meta = {"dtype": dtype, "characters": characters, "classes": classes, "splits": splits}
        (folder / "meta.json").write_text(json.dumps(meta))

    def _scan(self) -> tuple[str, list[str]]:
        """Return the characters and the labels, if they are needed: this takes a pass over the documents."""
        if self.vocabulary != "characters" and self.label_column is None:
            return "", []
        characters, labels = set[str](), set[str]()
        for split, document in self.documents():
            characters |= set(document.text) if split == "train" else set()
            labels |= {document.label} if document.label is not None else set()
        check_alike(labels, f"column '{self.label_column}'")
        return "".join(sorted(characters)), sorted_labels(labels)

    def sequences(self, document: Document, vocabulary: Vocabulary) -> tuple[np.ndarray, list[int]]:
        """Return the tokens of a document with the separator, and the lengths of its sequences."""
        tokens, separator, most = vocabulary.encode(document.text), np.array([vocabulary.size]), self.sequence_length
        if document.label is not None:
            tokens = np.concatenate([separator, tokens])[:most]
            return tokens, [len(tokens)]
        whole, rest = divmod(len(tokens) + 1, most)
        return np.concatenate([tokens, separator]), [most] * whole + [rest] * (rest > 0)


class _Split:
    """Writes the sequences of one split.

    Args:
        path: path of its files, without their endings.
        dtype: type of the tokens.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.file = path.with_suffix(".tokens").open("wb")
        self.lengths: list[int] = []
        self.labels: list[int] = []

    def add(self, tokens: np.ndarray, lengths: list[int], label: int | None) -> None:
        """Write the sequences of a document, one after the other."""
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.lengths += lengths
        self.labels += [] if label is None else [label]

    def finish(self, packing: str | None, capacity: int) -> int:
        """Pack the sequences, or write their lengths and labels. Return the number of blocks, or of sequences."""
        lengths = np.array(self.lengths, np.int64)
        blocks = len(lengths)
        if packing == "cut":
            self.file.write(self._padding(-int(lengths.sum()) % capacity))
            blocks = -(-int(lengths.sum()) // capacity)
        self.file.close()
        if packing is None:
            np.save(self.path.with_suffix(".lengths.npy"), lengths)
            np.save(self.path.with_suffix(".labels.npy"), np.array(self.labels, np.int64))
        if packing == "best_fit" and blocks:
            blocks = self._pack(lengths, best_fit(self.lengths, capacity), capacity)
        return blocks

    def _pack(self, lengths: np.ndarray, blocks: list[list[int]], capacity: int) -> int:
        path, firsts = self.path.with_suffix(".tokens"), lengths.cumsum() - lengths
        tokens = np.asarray(np.memmap(path, self.dtype, "r"))  # a slice of it costs less than one of a memory map
        with path.with_suffix(".packed").open("wb") as file:
            for block in blocks:
                for number in block:
                    file.write(tokens[firsts[number] : firsts[number] + lengths[number]].tobytes())
                file.write(self._padding(capacity - lengths[block].sum()))
        path.with_suffix(".packed").replace(path)
        return len(blocks)

    def _padding(self, count: int) -> bytes:
        return np.full(count, PADDING, self.dtype).tobytes()
