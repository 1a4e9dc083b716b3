"""Parameters, gradients and optimizer state cut over devices (FSDP2: Zhao et al. 2023, arXiv 2304.11277)."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard each child that has parameters, then the rest; each is gathered when it runs, and let go.

    Args:
        network: is changed in place.
        mesh: Lightning's device mesh, with the dimensions "data_parallel" and "tensor_parallel".

    Raises:
        ValueError: layers are to be cut over devices, and the network does not say how.
    """
    if mesh["tensor_parallel"].size() > 1:
        if not hasattr(network, "parallelize"):
            raise ValueError(
                f"trainer.strategy cuts layers (tensor_parallel_size), but {type(network).__name__} does not say how: "
                "write tensor_parallel_size 1, or give the network a method parallelize(mesh)"
            )
        network.parallelize(mesh["tensor_parallel"])  # pyright: ignore[reportCallIssue]
    if mesh["data_parallel"].size() > 1:
        for child in network.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh["data_parallel"])
        fully_shard(network, mesh=mesh["data_parallel"])
