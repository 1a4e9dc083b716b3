"""Batches over several sources of examples, in given proportions."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.order import Blocks
from batchwise.batching.permutation import Permutation
from batchwise.batching.random import mix
from batchwise.batching.sampling import shuffle_within
from batchwise.ranges import PositiveInt

_STREAM = int.from_bytes(b"mixture", "big")  # salt that separates these random numbers from others of the same seed
_FINEST = 10_000  # longest cycle of turns, which takes a tenth of a second to compute
_AT_ONCE = 2**14  # most examples of a source that are shuffled in one piece


class Mixture(Blocks):
    """Examples of several sources in given proportions, in every batch.

    After t examples of the training, a source with the share p has had t p of them, rounded down or up. This holds
    after every batch, so the rounding of one batch is made up for by the next. If `batch_size * p` is a whole number,
    every batch has exactly so many. The sources take turns: each turn goes to the source whose next example is due
    first, of those that have had less than their share. (Earliest deadline first, Baruah et al. 1996, "Proportionate
    progress: a notion of fairness in resource allocation".) The turns repeat after one cycle, so that any turn is found
    by arithmetic.

    All examples of a source come before any comes again, each time in a new order. Epochs do not matter to it: an epoch
    goes on where the last one ended. The order in a batch is random.

    Args:
        proportions: share of each source, by name. They need not sum to one. Shares of their sum of up to four
            decimals are exact; others are rounded to 1/10000. A source with 0 is left out.
        epoch_examples: positions in an epoch; null: as many as all sources together have examples.

    Raises:
        ValueError: the proportions do not name the sources, or are negative, not finite, too small, or all zero; or a
            source has no examples.
    """

    @typed
    def __init__(self, proportions: Mapping[str, float], epoch_examples: PositiveInt | None = None) -> None:
        known = [share for share in proportions.values() if 0 <= share < math.inf]
        if len(known) < len(proportions) or not any(known):
            raise ValueError(f"proportions are {proportions}: write numbers of at least 0, and one above 0")
        self.proportions, self.epoch_examples = dict(proportions), epoch_examples

    def __len__(self) -> int:
        return self.epoch_examples or sum(len(self._sources[name]) for name in self._shares)

    def __str__(self) -> str:
        """Return the class and its proportions: training goes on only with the same."""
        return f"Mixture {self.proportions}"

    def summary(self, batch_size: int) -> str:
        """Return the share of each source, and how often an epoch has its examples."""
        parts = []
        for name, turns in self._shares.items():
            share, examples = turns / self._cycle, len(self._sources[name])
            mean, passes = f"{share * batch_size:.4g} of {batch_size}", f"{share * len(self) / examples:.2g}"
            parts.append(f"{name} {share:.4g} ({mean} per batch, {passes} passes per epoch)")
        return "mixture: " + ", ".join(parts)

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return one block."""
        times = epoch * len(self) + positions  # since the training began
        cycle, turn = times // self._cycle, times % self._cycle
        source, nth = self._turns[turn], self._nth[turn]
        order = torch.empty_like(positions)
        for number, (name, turns) in enumerate(self._shares.items()):
            places = (source == number).nonzero().flatten()
            order[places] = self._draw(name, cycle[places] * turns + nth[places])
        return order[shuffle_within(mix(self._key(epoch), 2), positions, positions // self.batch_size)]

    def _draw(self, name: str, draws: Tensor) -> Tensor:
        """Return the examples of a source's draws [N], which count from the beginning of the training, in order."""
        examples = self._sources[name]
        size = len(examples)
        passes, places = draws // size, draws % size
        starts, which = passes.unique_consecutive(return_inverse=True)
        keys = mix(self.seed, _STREAM, list(self._sources).index(name), starts)
        if size <= _AT_ONCE:
            drawn = mix(keys[:, None], torch.arange(size, device="cpu")).argsort()[which, places]
        else:  # few passes
            drawn = places.clone()
            for row, key in enumerate(keys.tolist()):
                drawn[which == row] = Permutation(key, size)(places[which == row])
        return drawn + examples.start if isinstance(examples, range) else examples[drawn]

    def _setup(self) -> None:
        super()._setup()
        sources = self._sources = self.sources or {}
        if not sources:
            raise ValueError("Mixture needs sources: write sources() in the data module, or take Shuffled")
        if sources.keys() != self.proportions.keys():
            raise ValueError(
                f"proportions name {', '.join(self.proportions)}, but the sources are {', '.join(sources)}: write one "
                "for each source (0 leaves it out)"
            )
        for name, share in self.proportions.items():
            if share and not len(sources[name]):
                raise ValueError(f"source {name} has no examples: check where it is read from, or write proportion 0")
        self._shares = _whole({name: share for name, share in self.proportions.items() if share})
        self._cycle = sum(self._shares.values())
        self._turns = torch.tensor(_turns(list(self._shares.values())))
        nth = torch.empty_like(self._turns)
        for number, turns in enumerate(self._shares.values()):
            nth[self._turns == number] = torch.arange(turns)
        self._nth = nth


def _whole(shares: dict[str, float]) -> dict[str, int]:
    """Return whole numbers with the same proportions, which sum to at most `_FINEST`. If need be, they are rounded."""
    exact = {name: Fraction(str(share)) for name, share in shares.items()}  # as it was written: 0.1 is 1/10
    total = sum(exact.values())
    exact = {name: share / total for name, share in exact.items()}
    cycle = math.lcm(*(share.denominator for share in exact.values()))
    if cycle <= _FINEST:
        return {name: int(share * cycle) for name, share in exact.items()}
    turns = {name: int(share * _FINEST) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: turns[name] - exact[name] * _FINEST)
    for name in by_remainder[: _FINEST - sum(turns.values())]:
        turns[name] += 1
    for name, count in turns.items():
        if not count:
            raise ValueError(f"proportion of {name} is {float(exact[name]):.2g} of all: write at least 0.0001, or 0")
    return turns


def _turns(shares: list[int]) -> list[int]:
    """Return the number of the source at each turn of a cycle, in which source i has shares[i] turns."""
    cycle, had, turns = sum(shares), [0] * len(shares), []
    for turn in range(1, cycle + 1):
        waiting = [i for i, share in enumerate(shares) if had[i] * cycle < turn * share]
        source = min(waiting, key=lambda i: -((had[i] + 1) * -cycle // shares[i]))
        had[source] += 1
        turns.append(source)
    return turns
