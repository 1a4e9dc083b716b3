"""Model language: the next token; perplexity, accuracy, and text that the model writes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from batchwise.batching.loader import MicroBatch
from batchwise.batching.random import mix, uniform
from batchwise.data.module import DataModule
from batchwise.ranges import NonNegativeInt
from batchwise.tasks.task import Task

_STREAM = int.from_bytes(b"sample", "big")  # keeps these random numbers apart from others keyed by the same seed


class Language(Task):
    """Predict each next token. Targets are tokens [N, T], -1 where there is none; the network gives logits [N, T, V].

    Args:
        *args: those of `Task`.
        sample_length: most tokens of a text that the model writes after each validation; 0: it writes none.
        **kwargs: those of `Task`.
    """

    def __init__(self, *args: Any, sample_length: NonNegativeInt = 200, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sample_length = sample_length

    def losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """One cross-entropy per token [N, T], in nats, and whether it counts."""
        logits, targets = self(batch.inputs), batch.targets
        self.measure(logits.transpose(1, 2), targets)  # classes second
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return losses.view_as(targets), (targets >= 0).to(losses.dtype)

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The mean loss of a sequence's tokens [N], in nats, and how many they are [N]."""
        losses, counts = self.losses(batch)
        tokens = counts.sum(1)
        return {"loss": losses.sum(1) / tokens.clamp(min=1), "tokens": tokens.long()}

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """The share of tokens that are the most probable one."""
        accuracy = MulticlassAccuracy(outputs.shape[2], average="micro", ignore_index=-1, validate_args=False)
        return MetricCollection({"accuracy": accuracy})

    def metric_names(self) -> list[str]:
        """Add the perplexity."""
        return [*super().metric_names(), "val/perplexity"]

    def record(self, values: dict[str, Tensor]) -> None:
        """Add the perplexity to each mean loss: its exponential, so over all tokens on all devices."""
        losses = {name: loss for name, loss in values.items() if name in ("val/loss", "test/loss")}
        super().record(values | {name.replace("loss", "perplexity"): loss.exp() for name, loss in losses.items()})

    def write(self, number: int) -> str:
        """Return text `number` that the model writes: a function of its weights, the seed and the number."""
        data: Any = self.data
        key = mix(data.seed or 0, _STREAM, number)
        separator = torch.tensor([data.separator], device=self.device)
        return data.decode(generate(self.network, separator, self.sample_length, data.sequence_length, key))

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that the network gives logits for each token."""
        if outputs.ndim != 3:
            raise ValueError(f"model.network gives the shape {list(outputs.shape)}: logits [N, T, V] are needed")


@torch.no_grad()
def generate(network: nn.Module, separator: Tensor, length: int, context: int, key: int) -> Tensor:
    """Return a text that the network writes after a separator, until it writes another [at most length].

    Args:
        network: maps tokens [N, T] to logits [N, T, V].
        separator: the token before and after a document [1], on the device of the network.
        length: most tokens.
        context: most tokens that the network is given.
        key: of the random numbers: the same key and weights give the same text.
    """
    tokens = separator
    for draw in uniform(key, torch.arange(length)).tolist():
        weights = network(tokens[None, -context:])[0, -1].cpu().double().softmax(0).cumsum(0)
        token = torch.searchsorted(weights, draw * weights[-1:], right=True)
        tokens = torch.cat([tokens, token.to(tokens)])
        if tokens[-1] == separator:
            break
    return tokens[1:]
