"""Text, for language models and for classification: in packed blocks, or in sequences of unequal length."""

import json
from functools import cached_property
from hashlib import sha256
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.ragged import Ragged
from batchwise.data.examples import Source
from batchwise.data.labels import shown
from batchwise.data.learnt import same
from batchwise.data.split import Fractions
from batchwise.sources.documents import Document, find_files, read
from batchwise.sources.language import Tokenized
from batchwise.sources.tokens import Tokens
from batchwise.sources.vocabulary import Vocabulary, make_vocabulary


class Text(Tokenized, Fractions):
    """Documents as tokens.

    The separator is the token after those of the vocabulary. Past the end of a sequence stands -1.

    - Language model: the targets [N, T] are a document's tokens and then the separator. The inputs [N, T] are the same,
      shifted by one place, with a separator in front. Each token of the data is a target exactly once.
    - Classification: the inputs [N, T] are the separator and then the tokens. The targets [N] are the numbers of the
      labels.

    The tokens are memory maps in a folder of `cache`. The name of the folder is a hash of the settings and of the files
    (path, size, time of change), so that a change of either makes a new folder.

    Args:
        files: paths and patterns of plain text, or of CSV, TSV, JSON lines or Parquet with a document in each row;
            `stdlib` is the source of Python's own standard library.
        vocabulary: bytes, characters (of the training documents), or the path of a `tokenizer.json`.
        sequence_length: the most tokens of a sequence, and the tokens of a packed block. For a language model a longer
            document becomes several sequences. For classification its beginning is taken.
        packing: how a language model's sequences become blocks. cut: documents one after the other, cut into blocks.
            best_fit: whole sequences are put into blocks, with little room left. null: each sequence is an example.
        document_mask: keep documents in a block apart: the network gets `(tokens, documents)`.
        text_column: the column of the text.
        label_column: the column of the label; null: there are no labels, because the text is for a language model.
        delimiter: what separates two documents of a plain text; null: each file is one document.
        val_files: files for validation; null: a share of the documents.
        test_files: files for the test; null: a share of the documents.
        val_fraction: share of the documents for validation (at least one), drawn by a hash of their texts.
        test_fraction: share of the documents for the test.
        split_seed: decides which documents are in which split.
        predict_path: paths and patterns of the texts to predict, of which labels are not read; null: the test split.
        cache: folder for the tokens.
        **kwargs: those of `DataModule`.
    """

    shares_learnt = True

    @typed
    def __init__(
        self,
        files: str | list[str],
        vocabulary: str = "bytes",
        sequence_length: int = 256,
        packing: Literal["cut", "best_fit"] | None = None,
        document_mask: bool = False,
        text_column: str = "text",
        label_column: str | None = None,
        delimiter: str | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_seed: int = 0,
        predict_path: str | list[str] | None = None,
        cache: str = ".cache",
        **kwargs,
    ) -> None:
        super().__init__(val_fraction, test_fraction, split_seed, **kwargs)
        if sequence_length < 2:
            raise ValueError(f"data.sequence_length is {sequence_length}: write a number of tokens of at least 2")
        if label_column is not None and packing is not None:
            raise ValueError(f"data.packing is {packing}, but each text has a label of its own: write packing: null")
        if document_mask and packing is None:
            raise ValueError("data.document_mask is set, but sequences are not packed: write packing: best_fit or cut")
        self.vocabulary_name, self.cache = expanduser(vocabulary), expanduser(cache)
        self.arguments = {
            "vocabulary": self.vocabulary_name,
            "sequence_length": sequence_length,
            "packing": packing,
            "text_column": text_column,
            "label_column": label_column,
            "delimiter": delimiter,
            "split_seed": split_seed,
        }
        self.patterns = {"train": files, "val": val_files, "test": test_files}
        self.sequence_length, self.packing = sequence_length, packing
        self.predict_path, self.has_predict_split = predict_path, predict_path is not None
        self.document_mask, self.labelled = document_mask, label_column is not None

    # What the network is given

    def load(self, split: str) -> Source | None:
        """Return blocks [N, T]; or sequences and, if there are labels, their numbers [N]."""
        if split == "predict":
            tokens = Tokens({}, {}, **self.arguments)
            found = [tokens.sequences(document, self.vocabulary) for document in self._to_predict]
            lengths = np.array([0, *(length for _, lengths in found for length in lengths)])
            return Ragged(np.concatenate([values for values, _ in found]).astype(np.int32), lengths.cumsum())
        if split not in self.meta["splits"]:
            return None
        if self.recalled and not same(self.learn(), self.learnt):
            known, now = (
                f"{len(one['characters'])} characters, labels {shown(one['classes'])}"
                for one in (self.learnt, self.learn())
            )
            raise ValueError(
                f"training has learnt from its texts: {known}; and data.files now give: {now}: use the same"
            )
        tokens = np.memmap(self.folder / f"{split}.tokens", self.meta["dtype"], "r")
        if self.packing is not None:
            return (tokens.reshape(-1, self.sequence_length),)
        lengths, labels = (np.load(self.folder / f"{split}.{name}.npy") for name in ("lengths", "labels"))
        return Ragged(tokens, np.concatenate([[0], lengths.cumsum()]), *[labels][: self.labelled])

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return the texts that are classified, if they are those of `predict_path`."""
        if not (self.has_predict_split and self.labelled):
            return {}
        return {"text": [self._to_predict[number].text for number in index.tolist()]}

    @cached_property
    def _to_predict(self) -> list[Document]:
        files = find_files("data.predict_path", self.predict_path or [])
        label = "" if self.labelled else None  # which only says that a text is one sequence
        columns = self.arguments["text_column"], None, self.arguments["delimiter"]
        # Of texts with labels, an empty one has a label too, as in training: predictions are of each row.
        texts = [document.text for path in files for document in read(path, *columns, keep_empty=self.labelled)]
        found = [Document(text, label) for text in texts]
        if not found:
            raise ValueError(f"data.predict_path {self.predict_path} has no text: write files that have some")
        return found

    def learn(self) -> dict[str, Any]:
        """The characters and the labels that there are, in order, and a hash of the tokenizer's file."""
        path = Path(self.vocabulary_name)
        tokenizer = sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
        return {"characters": self.meta["characters"], "classes": self.meta["classes"], "tokenizer": tokenizer}

    @property
    def class_names(self) -> list[str] | None:
        """The labels, in the order of their numbers."""
        return self.learnt["classes"] or None

    # The tokens on disk

    def prepare_data(self) -> None:
        """Write the tokens, unless they are there."""
        _ = self.folder

    @cached_property
    def folder(self) -> Path:
        """The folder with the tokens, which is written if there is none."""
        keys = {"train": "data.files", "val": "data.val_files", "test": "data.test_files"}
        files = {
            split: [str(path.absolute()) for path in find_files(keys[split], patterns)]
            for split, patterns in self.patterns.items()
            if patterns is not None
        }
        fractions = {split: 0.0 if split in files else share for split, share in self.fractions.items()}
        self._note_division(fractions)
        return Tokens(files, fractions, **self.arguments).folder(Path(self.cache))

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The description in the folder: splits, type of the tokens, characters and classes."""
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Text to tokens and back."""
        return make_vocabulary(self.vocabulary_name, self.learnt["characters"])
