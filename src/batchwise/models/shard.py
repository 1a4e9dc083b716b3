"""Parameters, gradients and optimizer state cut over devices (FSDP2: Zhao et al. 2023, arXiv 2304.11277)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each child that has parameters, then the rest. A child's parameters are gathered only while it runs.

    Args:
        network: is changed in place.
        mesh: Lightning's device mesh, with the dimension "data_parallel".
    """
    if mesh["data_parallel"].size() > 1:
        for child in network.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh["data_parallel"])
        fully_shard(network, mesh=mesh["data_parallel"])
