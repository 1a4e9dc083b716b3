"""Language models: prediction of the next token, perplexity, accuracy, and generated text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.batching.random import mix, uniform
from batchwise.data.module import DataModule
from batchwise.ranges import NonNegativeInt
from batchwise.tasks.task import Task

_STREAM = int.from_bytes(b"sample", "big")  # separates these random numbers from others with the same seed


class Language(Task):
    """Predict each next token. Targets are tokens [N, T], or -1 for none; the network gives logits [N, T, V].

    Args:
        *args: arguments of `Task`.
        sample_length: maximum number of tokens in the text that is generated after each validation; 0: no text.
        **kwargs: arguments of `Task`.
    """

    @typed
    def __init__(self, *args: Any, sample_length: NonNegativeInt = 200, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sample_length = sample_length

    def losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """One cross-entropy per token [N, T], in nats, and its weight: 1 if there is a target, else 0."""
        logits, targets = self(batch.inputs), batch.targets
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        self.measure(logits.transpose(1, 2), targets)  # classes second
        return losses.view_as(targets), (targets >= 0).to(losses.dtype)

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The mean loss per token of each sequence [N], in nats, and its number of tokens [N]."""
        losses, _ = self.losses(batch)
        tokens = (batch.targets >= 0).sum(1)  # whole, because bfloat16 has no 257
        return {"loss": losses.sum(1) / tokens.clamp(min=1), "tokens": tokens}

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """Accuracy: the share of tokens for which the most probable token is right."""
        accuracy = MulticlassAccuracy(outputs.shape[2], average="micro", ignore_index=-1, validate_args=False)
        return MetricCollection({"accuracy": accuracy})

    def metric_names(self) -> list[str]:
        """Add the perplexity."""
        return [*super().metric_names(), "val/perplexity"]

    def record(self, values: dict[str, Tensor]) -> None:
        """Add the perplexity: the exponential of the mean loss over all tokens on all devices."""
        losses = {name: loss for name, loss in values.items() if name in ("val/loss", "test/loss")}
        super().record(values | {name.replace("loss", "perplexity"): loss.exp() for name, loss in losses.items()})

    def write(self, number: int) -> str:
        """Return generated text `number`: a function of the weights, the seed and the number."""
        data: Any = self.data
        key = mix(data.seed or 0, _STREAM, number)
        separator = torch.full((1,), data.separator, device=self.device)
        return data.decode(generate(self.network, separator, self.sample_length, data.sequence_length, key))

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that the network gives logits for each token."""
        if outputs.ndim != 3:
            raise ValueError(f"model.network gives the shape {list(outputs.shape)}: logits [N, T, V] are needed")


@torch.no_grad()
def generate(network: nn.Module, separator: Tensor, length: int, context: int, key: int) -> Tensor:
    """Generate text after a separator, up to the next separator; return its tokens [at most length].

    Args:
        network: maps tokens [N, T] to logits [N, T, V].
        separator: the token before and after a document [1], on the device of the network.
        length: maximum number of tokens.
        context: maximum number of tokens that the network gets.
        key: key of the random numbers. The same key and weights give the same text.
    """
    tokens = separator
    for draw in uniform(key, torch.arange(length)).tolist():
        weights = network(tokens[None, -context:])[0, -1].cpu().double().softmax(0).cumsum(0)
        token = torch.searchsorted(weights, draw * weights[-1:], right=True)
        tokens = torch.cat([tokens, token.to(tokens)])
        if tokens[-1] == separator:
            break
    return tokens[1:]
