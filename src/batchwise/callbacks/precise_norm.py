"""Precise batch norm: statistics of the training examples, for the weights that are evaluated."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from batchwise.batching.fetch import Fetch, Request
from batchwise.batching.loader import make_batch
from batchwise.batching.plan import cut
from batchwise.batching.random import mix, permute
from batchwise.batching.workers import Workers
from batchwise.models.norm import batchnorms, set_precise_statistics

DRAWS = 0x7072656369


class PreciseNorm(Callback):
    """Before each validation, recomputes the running statistics of batch norms, from training examples.

    Running averages lag behind weights that move, and fit no average of weights; with `EMA`, the statistics are those
    of the averaged weights. They are over the examples as they are evaluated (no augmentation), over all devices, and
    do not depend on how those are run: see `batchwise.models.norm.set_precise_statistics`. Frozen batch norms keep
    theirs. Checkpoints hold them: `best.ckpt` those that were validated.

    Args:
        examples: how many training examples, drawn once by the seed; null: all. A thousand to ten thousand are enough
            (Wu and Johnson 2021). Each batch norm costs a pass over them up to that layer.
    """

    def __init__(self, examples: int | None = None) -> None:
        if examples is not None and examples < 2:
            raise ValueError(f"PreciseNorm examples is {examples}: write at least 2, or null for all")
        self.examples = examples
        self._workers: Fetch | None = None

    # After `EMA` has put the average in place, in `on_validation_start`, wherever in the list of callbacks it stands.
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Recompute, if this is part of a training."""
        if trainer.state.fn != "fit":
            return  # the checkpoint has them
        frozen = {id(layer) for layer in pl_module.frozen_norms()}
        layers = [layer for _, layer in batchnorms(pl_module.network) if id(layer) not in frozen]
        # A compiled network could not be left in the middle.
        eager = torch.compiler.set_stance("force_eager") if getattr(trainer, "compile", False) else nullcontext()
        with eager, trainer.precision_plugin.forward_context():
            set_precise_statistics(layers, partial(self._forwards, pl_module), pl_module.reduce)

    def _forwards(self, task: Any) -> Iterator[Callable]:
        data = task.data
        fetch = data.feed("train")
        if isinstance(fetch, Workers):  # training may be in the middle of what they read
            self._workers = self._workers or Workers(fetch.dataset, fetch.num_workers, fetch.max_unreadable)
            fetch = self._workers
        devices, rank = data.replicas
        examples = min(max(self.examples or len(fetch), devices), len(fetch))
        shards = cut(examples, devices)
        places = torch.arange(shards[rank], shards[rank + 1])
        index = permute(mix(data.seed, DRAWS), len(fetch), places) if examples < len(fetch) else places
        requests = [Request.one(part) for part in index.split(data.plan.largest_micro_batch) if len(part)]
        for request, (fields, weights) in zip(requests, fetch.stream(iter(requests)), strict=True):
            batch = make_batch(fields, request.index)
            if weights is not None:  # zero for what cannot be read
                batch = batch.take(weights.nonzero().squeeze(1))
            yield partial(task, data.to_device(batch, task.device, training=False).inputs)
