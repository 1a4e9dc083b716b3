"""Trains the points as one of several processes, and keeps the weights: python process.py ARGUMENTS_AS_JSON."""

import json
import sys
from typing import Any

import small
import torch
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from batchwise.batching.gradients import full


def main(kind: str, backend: str, path: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if kind == "ddp":
        strategy: Any = DDPStrategy(process_group_backend=backend)
    else:
        processes = settings["devices"] * settings["num_nodes"]
        strategy = ModelParallelStrategy(
            processes, tensor_parallel_size=1, process_group_backend=backend, save_distributed_checkpoint=False
        )
        settings |= {"precision": None, "plugins": [DoublePrecision()]}  # because it refuses the name 64-true
    weights: dict[str, Any] = {}

    class Keeps(small.Classify):
        def on_train_end(self) -> None:
            weights.update({name: full(value.detach()).cpu() for name, value in self.state_dict().items()})

    task = Keeps(small.network(), optimizer=small.adamw)
    _, trainer = small.fit(task, small.Points(micro_batch_size=3), strategy=strategy, **settings)
    if trainer.is_global_zero:
        loss = trainer.callback_metrics["val/loss"].double().cpu()
        torch.save({"weights": weights, "loss": loss, "world": trainer.world_size}, path)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
