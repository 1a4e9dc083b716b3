"""The share of padding, and the useful tokens per second, for several kinds of batches of sequences.

Lengths are log-normal (median 60, at most 512). A batch has 256 examples, or as many tokens as these have on average. A
plain loop over the training loader trains one small causal transformer with AdamW, so that only the batches differ.
Time is processor time, because other work on the machine adds little to it. All batches but those of "bucketed" are
random samples. "packed" has complete sequences in blocks of 512 tokens, and as many blocks per batch as give the same
tokens.

    python scripts/lab/bench_sequences.py
"""

import time
from collections.abc import Callable
from itertools import count

import bench
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.batching.fetch import Fetch, InMemory
from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Order, Shuffled
from batchwise.batching.packing import best_fit
from batchwise.batching.plan import BatchPlan
from batchwise.batching.ragged import Ragged
from batchwise.batching.sampling import Bucketed
from batchwise.batching.tokens import SequencePlan

EXAMPLES, LONGEST, BATCH, MICRO_BATCH, MICRO_BATCH_TOKENS, WIDTH = 1024, 512, 256, 32, 4096, 64


class Transformer(nn.Module):
    """A transformer over bytes with one causal layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(257, WIDTH), nn.Linear(WIDTH, 256)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T] to logits [N, T, 256]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.last(self.layer(self.embedding(tokens + 1), mask, is_causal=True))


def epochs(plan: BatchPlan, order: Order, fetch: Fetch) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two functions: one trains an epoch and returns useful tokens per second, one returns the padding share."""
    torch.manual_seed(0)
    network, epoch, padding = Transformer(), count(), []
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    loader = TrainLoader(plan, order, fetch, 0, lambda: plan.first_step(next(epoch)))

    def run() -> float:
        start, useful, all_of_them = time.process_time(), 0, 0
        for share in loader:
            counted = sum(int((part.inputs >= 0).sum()) for part in share.micro_batches)
            for part in share.micro_batches:
                targets = F.pad(part.inputs[:, 1:], (0, 1), value=-1).long()
                loss = F.cross_entropy(
                    network(part.inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
                )
                (loss / counted).backward()
                all_of_them += part.inputs.numel()
            optimizer.step()
            optimizer.zero_grad()
            useful += counted
        padding.append(1 - useful / all_of_them)
        return useful / (time.process_time() - start)

    return run, lambda: padding[-1]


def packed(fetch: Ragged) -> InMemory:
    """Return the sequences in blocks of `LONGEST` tokens."""
    blocks = best_fit(fetch.lengths.tolist(), LONGEST)
    tokens = torch.full((len(blocks), LONGEST), -1, dtype=torch.int32)
    for row, block in zip(tokens, blocks, strict=True):
        parts = torch.cat([torch.as_tensor(fetch.values[fetch.offsets[i] : fetch.offsets[i + 1]]) for i in block])
        row[: len(parts)] = parts
    return InMemory([tokens])


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__, pairs=3)
    generator = torch.Generator().manual_seed(0)
    examples = max(16, int(EXAMPLES * given.scale))
    lengths = (60 * torch.randn(examples, generator=generator).exp()).long().clamp(1, LONGEST)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    fetch = Ragged(torch.randint(0, 256, (int(offsets[-1]),), generator=generator).to(torch.uint8), offsets)
    batch_tokens = max(LONGEST, BATCH * int(lengths.sum()) // examples)

    def order(kind: Order) -> Order:
        return kind.prepare(examples, BATCH, 0, None, lengths)

    def plan(order: Order, **tokens: int) -> SequencePlan:
        return SequencePlan.of(
            BatchPlan(examples, BATCH, micro_batch_size=None if tokens else MICRO_BATCH), lengths, order, **tokens
        )

    shuffled, bucketed = order(Shuffled()), order(Bucketed())
    plans: dict[str, tuple[BatchPlan, Order]] = {
        "random": (BatchPlan(examples, BATCH, micro_batch_size=MICRO_BATCH), shuffled),
        "sorted within the batch": (plan(shuffled), shuffled),
        "sorted, micro-batches in tokens": (plan(shuffled, micro_batch_tokens=MICRO_BATCH_TOKENS), shuffled),
        "batches and micro-batches in tokens": (
            plan(shuffled, batch_tokens=batch_tokens, micro_batch_tokens=MICRO_BATCH_TOKENS),
            shuffled,
        ),
        "bucketed": (plan(bucketed), bucketed),
    }
    runs = {name: epochs(*ways, fetch) for name, ways in plans.items()}
    blocks = packed(fetch)
    size = max(1, round(BATCH * len(blocks) / examples))
    block_plan = BatchPlan(len(blocks), size, micro_batch_size=MICRO_BATCH_TOKENS // LONGEST)
    runs["packed"] = epochs(block_plan, Shuffled().prepare(len(blocks), size, 0), blocks)
    speed = bench.interleave({name: run for name, (run, _) in runs.items()}, given.pairs)
    padding = {name: [share()] * len(speed[name]) for name, (_, share) in runs.items()}
    figures = {
        "useful tokens": bench.report("useful tokens", "tokens per second of the processor", speed, "random"),
        "padding": bench.report("padding", "share of the tokens that are run", padding, "random"),
    }
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
