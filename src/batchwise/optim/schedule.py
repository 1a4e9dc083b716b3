"""The learning rate as a function of the examples seen, which makes it independent of the batch size."""

import math
from dataclasses import dataclass
from typing import Literal

from batchwise.arguments import taken


@dataclass(frozen=True)
class Schedule:
    """A factor on the optimizer's learning rate: linear warm-up, then one shape down to `floor`.

    Args:
        shape: constant, cosine (Loshchilov and Hutter 2017, without restarts), linear, or inverse_sqrt. The last holds
            the rate and then divides it by the square root of the examples seen, whatever the length of the training
            (Vaswani et al. 2017, arXiv 1706.03762; Zhai et al. 2022, arXiv 2106.04560).
        warmup: share of the training in which the rate rises to its full value.
        warmup_examples: the same as a number of examples. It takes precedence over `warmup`.
        floor: the factor at the end, as a share of the full rate; with inverse_sqrt, the least factor.
        hold_examples: with inverse_sqrt, examples from the start of the training until the rate begins to fall; None:
            those of the warm-up.

    Raises:
        ValueError: a number makes no sense, or does not go with the shape.
    """

    shape: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    warmup: float = 0.0
    warmup_examples: int | None = None
    floor: float = 0.0
    hold_examples: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "cosine", "linear", "inverse_sqrt"):
            raise ValueError(f"schedule.shape is {self.shape}: write constant, cosine, linear or inverse_sqrt")
        taken(Schedule.__init__, vars(self), "schedule.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"schedule.warmup is {self.warmup}: write a share of the training, from 0 to 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"schedule.floor is {self.floor}: write a share of the full rate, from 0 to 1")
        if self.warmup_examples is not None and self.warmup_examples < 0:
            raise ValueError(f"schedule.warmup_examples is {self.warmup_examples}: write a number of examples")
        if self.hold_examples is not None and (self.hold_examples < 1 or self.shape != "inverse_sqrt"):
            raise ValueError(
                f"schedule.hold_examples is {self.hold_examples}, with shape {self.shape}: "
                "write a number of examples of at least 1, with shape: inverse_sqrt"
            )
        if self.shape == "inverse_sqrt" and not (self.hold_examples or self.warmup_examples or self.warmup):
            raise ValueError("schedule.shape is inverse_sqrt: write hold_examples, after which the rate falls")

    @property
    def needs_end(self) -> bool:
        """Whether the schedule depends on how long training is."""
        return self.shape in ("cosine", "linear") or (self.warmup > 0 and self.warmup_examples is None)

    @property
    def is_constant(self) -> bool:
        """Whether the factor is one at every step."""
        return self.shape == "constant" and not self.warmup and not self.warmup_examples

    def factor(self, before: int, after: int, total: float) -> float:
        """Return the factor for one optimizer step.

        Args:
            before: examples seen before the step.
            after: examples seen after the step. The warm-up counts these, so that its first step has a rate above 0.
            total: examples in the whole training.
        """
        warmup = self.warmup * total if self.warmup_examples is None and self.warmup else self.warmup_examples or 0
        if after < warmup:
            return after / warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "inverse_sqrt":
            hold = max(warmup, self.hold_examples or 0)
            return max(self.floor, math.sqrt(hold / max(hold, before)))
        done = min(1.0, max(0.0, (before - warmup) / max(1.0, total - warmup)))
        left = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * left
