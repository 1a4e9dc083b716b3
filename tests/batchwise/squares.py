"""A small data set, and requests of its examples."""

import torch
from torch.utils.data import Dataset

from batchwise.batching.fetch import Request

REQUESTS = [[3, 1], [0], [4, 4, 2], [1]]


class Squares(Dataset):
    """Example i is `make(i)`."""

    def __init__(self, make, length: int = 5) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int):
        return self.make(i)


def pair(i: int) -> tuple[torch.Tensor, int]:
    return torch.full((2, 3), float(i)), i * i


def asked(*requests: list[int]) -> list[Request]:
    """The micro-batches in requests of two."""
    pairs = [requests[i : i + 2] for i in range(0, len(requests), 2)]
    return [
        Request(
            torch.tensor([i for part in pair for i in part]),
            [len(part) for part in pair],
            [100 * number + place for place in range(len(pair))],
        )
        for number, pair in enumerate(pairs)
    ]


def read(fetch, requests=REQUESTS) -> list[tuple]:
    read = list(fetch.stream(asked(*requests)))
    assert all(weights is None for _, weights in read)
    return [fields for fields, _ in read]
