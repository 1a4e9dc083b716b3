"""A small transformer: a decoder for language, or an encoder that classifies sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.models.dropout import Dropout
from batchwise.ranges import NonNegativeInt, PositiveInt


class Transformer(nn.Module):
    """Blocks of attention and SwiGLU, each after a root-mean-square norm, with rotary positions.

    With `num_classes`, each place sees the whole sequence, and the mean over the sequence is classified. Without it,
    each place sees the places before it, and gives logits for the next token by the weights of the embedding (Press and
    Wolf 2017).

    Token -1 is padding. It comes last and does not change the rest. The outputs at its places mean nothing.

    Args:
        vocab_size: tokens are 0 to vocab_size - 1.
        width: numbers per token.
        depth: blocks.
        heads: attention heads; width / heads must be an even number.
        dropout: probability, in training, that a value of what a layer adds is zeroed.
        num_classes: outputs per sequence; null: `vocab_size` outputs per token.
    """

    @typed
    def __init__(
        self,
        vocab_size: PositiveInt = 257,
        width: PositiveInt = 128,
        depth: NonNegativeInt = 4,
        heads: PositiveInt = 4,
        dropout: float = 0.0,
        num_classes: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            below = width // (2 * heads) * 2 * heads
            raise ValueError(f"width is {width} for {heads} heads: write {below or 2 * heads} or {below + 2 * heads}")
        self.vocab_size, self.head_size = vocab_size, width // heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = None if num_classes is None else nn.Linear(width, num_classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # as in GPT-2: the layers that add to the values get smaller with depth
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if name.endswith("out.weight") else 0.02)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Map tokens [N, T] to logits [N, T, vocab_size], or [N, num_classes].

        Args:
            tokens: whole numbers; -1 past the end.
            documents: number of each token's document [N, T]. A token then sees its own document alone. Positions are
                relative, so they need no reset at the beginning of a document.
        """
        there = tokens >= 0
        mask = None if self.head is None else there[:, None, None]
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None]
            mask = same.tril() if mask is None else same & mask
        values = self.embedding(tokens.clamp(min=0))
        rotation = rotary(tokens.shape[1], self.head_size, values)
        for block in self.blocks:
            values = block(values, rotation, mask)
        values = self.norm(values)
        if self.head is None:
            return F.linear(values, self.embedding.weight)
        mean = (values * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.head(mean.to(values.dtype))


class Block(nn.Module):
    """Attention, then a gated layer per token. Each adds to its inputs.

    Args:
        width: numbers per token.
        heads: attention heads.
        dropout: probability, in training, that a value of what is added is zeroed.
    """

    @typed
    def __init__(self, width: PositiveInt, heads: PositiveInt, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = 16 * round(width / 6)  # two thirds of 4 x width, since SwiGLU (Shazeer 2020) has three matrices
        self.attention_norm, self.gated_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate_and_value = nn.Linear(width, 2 * hidden, bias=False)
        self.gated_out = nn.Linear(hidden, width, bias=False)
        self.attention_dropout, self.gated_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, values: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Map [N, T, width] to [N, T, width]. Without a mask, each place sees itself and the places before it."""
        heads = self.query_key_value(self.attention_norm(values)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        seen = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        values = values + self.attention_dropout(self.attention_out(seen.transpose(1, 2).flatten(2)))
        gate, value = self.gate_and_value(self.gated_norm(values)).chunk(2, dim=2)
        return values + self.gated_dropout(self.gated_out(F.silu(gate) * value))


def rotary(length: int, size: int, like: Tensor, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [length, size / 2] of the angles of rotary positions (Su et al. 2021, arXiv 2104.09864).

    The product of a rotated query at place i and a rotated key at place j depends on i - j alone.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    rates = base ** (torch.arange(0, size, 2, device=like.device, dtype=dtype) / -size)
    angles = torch.arange(length, device=like.device, dtype=dtype)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of [..., T, size] by its angle."""
    first, second = values.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(values.dtype)
