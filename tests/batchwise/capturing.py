"""Trainings whose steps can be captured, and some whose steps cannot."""

import random
from typing import Any

import numpy as np
import small
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.batching.schedule import Milestones
from batchwise.optim.schedule import Schedule


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)


def make(task: Any = small.Classify, optimizer: Any = adamw, network: Any = small.network, **settings: Any) -> Any:
    return task(network(), optimizer=optimizer, **settings)


def norms() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double()


class Weighted(small.Classify):
    """Weights of the targets, and noise."""

    def losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        noise = batch.randn("x", 5) + batch.rand("y", 5)
        losses = F.cross_entropy(self(batch.inputs + 0.1 * noise), batch.targets, reduction="none")
        return losses, 1.0 + batch.targets


class Thaw(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network[0].requires_grad_(trainer.current_epoch > 0)
        pl_module.network[2].p = 0.1 * trainer.current_epoch


class Planted(small.Points):
    """One example is infinite."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.x[17] = float("inf")


class RateInATensor(small.Classify):
    """PyTorch's schedulers change it in place."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.05), fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


RIGHT: dict[str, Any] = {
    "adamw": lambda: ({}, {}, {}),
    "micro-batches": lambda: ({}, {"micro_batch_size": 3}, {}),
    "sgd": lambda: ({"optimizer": sgd}, {"micro_batch_size": 4}, {}),
    "schedule": lambda: ({"schedule": Schedule("cosine", warmup=0.2)}, {}, {}),
    "clipping": lambda: ({}, {}, {"gradient_clip_val": 0.1}),
    "batch norm": lambda: ({"network": norms}, {}, {}),
    "ghost batch norm": lambda: ({"network": norms, "ghost_batch_size": 4}, {"micro_batch_size": 4}, {}),
    "weights": lambda: ({"task": Weighted}, {"micro_batch_size": 3}, {}),
    "thaw": lambda: ({}, {}, {"callbacks": [Thaw()]}),
    "larger batches": lambda: (
        {"reference_batch_size": 64},
        {"batch_size_schedule": Milestones([24], [0.5]), "micro_batch_size": 4},
        {},
    ),
    "rate in a tensor": lambda: ({"task": RateInATensor}, {}, {}),
    "reference": lambda: ({"reference_batch_size": 64, "decay_matrices_only": True}, {}, {}),
}


class ReadsTheEpoch(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * (1 + self.current_epoch)


class ReadsTheEpochOfTheBatch(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * (1 + batch.epoch)


class Logs(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        losses = super().losses(batch)
        self.log("mine", losses.mean(), on_step=False, on_epoch=True)
        return losses


class Counts(small.Classify):
    calls = 0

    def losses(self, batch: MicroBatch) -> Tensor:
        self.calls += 1
        return super().losses(batch) / self.calls**0.01


class Centred(small.Classify):
    """It makes another tensor in place of its buffer. A graph would read the first one again and again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

    def losses(self, batch: MicroBatch) -> Tensor:
        outputs = self(batch.inputs)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        return F.cross_entropy(outputs - self.centre, batch.targets, reduction="none")


class CentredByItself(Centred):
    """The same, and the tensor is no buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.centre
        self.centre = 0.0  # type: ignore[assignment]


class Listens(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        pass


class Draws(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * (1 + random.random())


class DrawsFromNumPy(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * (1 + np.random.rand())


def plain_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, foreach=True)


UNFIT: dict[str, Any] = {
    "self.trainer.current_epoch": ({"task": ReadsTheEpoch}, {}),
    "batch.epoch": ({"task": ReadsTheEpochOfTheBatch}, {}),
    "logs values": ({"task": Logs}, {}),
    "changes its attribute calls": ({"task": Counts}, {}),
    "draws from the generator": ({"task": Draws}, {}),
    "the generator of Python or NumPy": ({"task": DrawsFromNumPy}, {}),
    "changes its attribute centre": ({"task": Centred}, {}),
    "network, changes its attribute centre": ({"task": CentredByItself}, {}),
    "listens to steps": ({}, {"callbacks": [Listens()]}),
    "AdamW is not fused": ({"optimizer": plain_adamw}, {}),
}
