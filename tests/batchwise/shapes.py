"""A small problem with a class and a box for each image, in each shape that data may have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from batchwise import DataModule, MicroBatch, Task
from batchwise.batching.ragged import Ragged

EXAMPLES = 96
made = torch.Generator().manual_seed(0)
PIXELS = torch.rand(EXAMPLES, 3, 8, 8, generator=made)
AGE = torch.rand(EXAMPLES, generator=made).double().numpy()
CLASS, BOX = torch.arange(EXAMPLES) % 3, torch.rand(EXAMPLES, 4, generator=made)
MANY = [torch.rand(number % 4, 4, generator=made) for number in range(EXAMPLES)]
SERIES = [torch.rand(2 + number % 5, 6, generator=made) for number in range(EXAMPLES)]
TARGETS = {"class": CLASS, "box": BOX}


class Dicts(DataModule):
    def load(self, split: str) -> Any:
        return {"pixels": PIXELS, "age": AGE}, TARGETS


class Tuples(DataModule):
    def load(self, split: str) -> Any:
        return PIXELS, AGE, (CLASS, {"box": BOX})


class Lists(DataModule):
    def load(self, split: str) -> Any:
        return {"pixels": PIXELS, "age": AGE, "many": MANY}, {**TARGETS, "boxes": MANY}


class Series(DataModule):
    """The inputs of an example are of a length of their own."""

    def load(self, split: str) -> Any:
        return SERIES, TARGETS


class Tokens(DataModule):
    """Sequences of whole numbers, of unequal length, which nobody can decode."""

    def load(self, split: str) -> Any:
        lengths = 2 + torch.arange(EXAMPLES) % 5
        values = torch.cat([torch.arange(number, number + length) for number, length in enumerate(lengths.tolist())])
        return Ragged(values, F.pad(lengths.cumsum(0), (1, 0)), TARGETS)


class Items(Dataset):
    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, number: int) -> dict[str, Any]:
        inputs = {"pixels": PIXELS[number], "age": AGE[number], "many": MANY[number]}
        return inputs | {"class": int(CLASS[number]), "box": BOX[number], "file": f"{number}.png"}


class Collated(DataModule):
    def load(self, split: str) -> Any:
        return Items()

    def collate(self, examples: list[dict[str, Any]]) -> tuple[dict, dict]:
        inputs = {
            "pixels": torch.stack([example["pixels"] for example in examples]),
            "age": torch.tensor([example["age"] for example in examples]),
            "many": [example["many"] for example in examples],
        }
        classes = torch.tensor([example["class"] for example in examples])
        boxes = torch.stack([example["box"] for example in examples])
        return inputs, {"class": classes, "box": boxes, "file": [example["file"] for example in examples]}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.classes, self.box = nn.Conv2d(3, 4, 3), nn.Linear(5, 3), nn.Linear(4, 4)

    def forward(self, pixels: Tensor, age: Tensor, many: list[Tensor] | None = None) -> dict[str, Tensor]:
        hidden = self.layers(pixels).mean((2, 3))
        return {"class": self.classes(torch.cat([hidden, age[:, None]], 1)), "box": self.box(hidden)}


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 7)

    def forward(self, series: list[Tensor]) -> dict[str, Tensor]:
        outputs = torch.stack([self.layer(each).mean(0) for each in series])
        return {"class": outputs[:, :3], "box": outputs[:, 3:]}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(EXAMPLES + 8, 7, padding_idx=EXAMPLES + 7)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        outputs = self.layer(tokens.where(tokens >= 0, EXAMPLES + 7))
        return {"class": outputs[:, :3], "box": outputs[:, 3:]}


class Both(Task):
    """The class and the box."""

    def losses(self, batch: MicroBatch) -> Tensor:
        targets, outputs = batch.targets, self(batch.inputs)
        if isinstance(targets, tuple):
            targets = {"class": targets[0], **targets[1]}
        boxes = F.mse_loss(outputs["box"], targets["box"], reduction="none").mean(1)
        return F.cross_entropy(outputs["class"], targets["class"], reduction="none") + boxes

    def predictions(self, batch: MicroBatch) -> dict[str, Any]:
        outputs = self(batch.inputs)
        found = [boxes[None].expand(number % 3, 4) for number, boxes in zip(batch.index, outputs["box"], strict=True)]
        return {"output": outputs, "found": found}
