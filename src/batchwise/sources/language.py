"""Tokens as a language model takes them: shifted by one place, with a separator between documents."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.ragged import PADDING

END = "<|end|>"
"""The separator as text."""


class Tokenized:
    """What data modules of tokens [N, T] have in common. Past the end of a sequence stands -1."""

    vocabulary: Any
    """The `Vocabulary`: text to tokens and back."""
    document_mask: bool
    """Whether the inputs are `(tokens, documents)`, where documents are counted."""
    labelled = False
    """Whether each sequence has a label, and is not for a language model."""

    @property
    def separator(self) -> int:
        """The token between documents."""
        return self.vocabulary.size

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Make the inputs and targets [N, T] of a language model: the separator stands in front of the inputs."""
        if self.labelled:
            return batch
        separator, targets = self.separator, batch.inputs.long()
        inputs = F.pad(targets[:, :-1], (1, 0), value=separator).where(targets >= 0, PADDING)
        documents = (inputs == separator).cumsum(1)
        return replace(batch, inputs=(inputs, documents) if self.document_mask else inputs, targets=targets)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens [T], with `<|end|>` for the separator and nothing for padding."""
        parts: list[list[int]] = [[]]
        separator = self.separator
        for token in tokens.tolist():
            if token == separator:
                parts.append([])
            elif token >= 0:
                parts[-1].append(token)
        return END.join(self.vocabulary.decode(part) for part in parts)

    def check(self, network: nn.Module) -> None:
        """Check that the network knows all tokens.

        Raises:
            ValueError: it knows fewer.
        """
        tokens = self.separator + 1
        known = getattr(network, "vocab_size", tokens)
        if known < tokens:
            raise ValueError(
                f"model.network knows {known} tokens, but the data has {tokens}, with the separator: "
                f"write vocab_size {tokens}"
            )
