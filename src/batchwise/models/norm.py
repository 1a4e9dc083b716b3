"""Batch norm that does not depend on how the batch is executed, in training and in evaluation."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchwise.arguments import typed
from batchwise.errors import Mistake
from batchwise.models import place
from batchwise.ranges import PositiveInt


class GhostBatchNorm(nn.Module):
    """Batch norm over ghost batches: a fixed number of examples, cut from the global batch.

    Hoffer, Hubara and Soudry 2017, "Train longer, generalize better" (arXiv 1705.08741). A micro-batch holds whole
    ghost batches. So the statistics do not depend on the number of micro-batches or devices, and the forward pass needs
    no communication. A `Task` moves the running statistics once per optimizer step, by the mean over all ghost batches
    of the global batch. Do not put a bias before this layer: its gradient is nothing but rounding.

    Args:
        num_features: channels C of the input [N, C, ...].
        ghost_batch_size: examples per ghost batch.
        eps: added to the variance.
        momentum: weight of the new statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor
    sums: Tensor = None  # type: ignore[assignment]

    @typed
    def __init__(
        self, num_features: PositiveInt, ghost_batch_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        if ghost_batch_size < 2:
            raise ValueError(f"ghost_batch_size is {ghost_batch_size}: write at least 2 examples")
        self.ghost_batch_size, self.eps, self.momentum = ghost_batch_size, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.zero_sums()

    def zero_sums(self) -> None:
        """Forget the statistics of the step so far."""
        # Rows: sum of means, sum of variances, number of ghost batches. Not part of the state.
        like = {"dtype": _wide(self.running_mean), "device": self.weight.device}
        self.sums = (
            torch.zeros(3, len(self.running_mean), **like) if self.sums is None else self.sums.zero_().to(**like)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C, ...] to the same shape."""
        if not self.training:
            return self._normalise(inputs[None], self.running_mean[None], self.running_var[None])[0]
        size = self.ghost_batch_size
        whole, rest = divmod(len(inputs), size)
        # As in `BatchPlan`, a remainder of half a ghost batch or more is one, and a smaller remainder joins the last.
        alike = whole if rest == 0 or 2 * rest >= size else max(0, whole - 1)
        outputs = []
        for part in (inputs[: alike * size].unflatten(0, (alike, size)), inputs[alike * size :][None]):
            if part.numel():
                outputs.append(self._ghosts(part).flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _ghosts(self, inputs: Tensor) -> Tensor:
        """Normalise ghost batches [G, size, C, ...], each by itself."""
        over = [1, *range(3, inputs.ndim)]
        # In half precision, the statistics would be rounded, and no more than 256 ghost batches counted.
        var, mean = torch.var_mean(inputs.to(_wide(inputs)), over, correction=0)  # [G, C]
        if place.current is None or place.current.counts:
            values = inputs[0].numel() // inputs.shape[2]
            unbiased = var.detach() * (values / max(1, values - 1))
            count = torch.full_like(mean[0], len(mean))
            self.sums += torch.stack([mean.detach().sum(0), unbiased.sum(0), count]).to(self.sums)
        return self._normalise(inputs, mean, var)

    def _normalise(self, inputs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        shape = [len(mean), 1, -1, *[1] * (inputs.ndim - 3)]
        scale = self.weight * torch.rsqrt(var + self.eps)
        outputs = (inputs - mean.view(shape)) * scale.view(shape) + self.bias.view(shape[1:])
        return outputs.to(torch.promote_types(inputs.dtype, self.weight.dtype))

    def move_running(self, sums: Tensor, made: Tensor | bool = True) -> None:
        """Move the running statistics by the sums of one optimizer step over all devices, [3, C], if it is made."""
        moves = (sums[2] > 0) & made  # on the device, so that nothing waits
        for running, total in ((self.running_mean, sums[0]), (self.running_var, sums[1])):
            wide = running.to(total)
            running.copy_(torch.where(moves, wide.lerp(total / sums[2], self.momentum), wide))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{len(self.weight)}, ghost_batch_size={self.ghost_batch_size}"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def convert_batchnorm(network: nn.Module, ghost_batch_size: int) -> int:
    """Replace all batch norms of a network by ghost batch norms with the same weights, and return their number."""
    count = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, _BatchNorm):
                if not layer.affine or not layer.track_running_stats or layer.momentum is None:
                    raise ValueError(f"ghost_batch_size: the batch norm {name} has no weights or running statistics")
                ghost = GhostBatchNorm(layer.num_features, ghost_batch_size, layer.eps, layer.momentum).to(layer.weight)
                ghost.load_state_dict(layer.state_dict(), strict=False)
                ghost.train(layer.training)
                ghost.weight.requires_grad_(layer.weight.requires_grad)
                ghost.bias.requires_grad_(layer.bias.requires_grad)
                setattr(parent, name, ghost)
                count += 1
    return count


def ghosts_of(module: nn.Module) -> list[GhostBatchNorm]:
    """Return the ghost batch norms of a module."""
    return [layer for layer in module.modules() if isinstance(layer, GhostBatchNorm)]


def unit_of(task: nn.Module, network: nn.Module) -> int:
    """Return the number of examples that must stay together.

    Args:
        task: has the network, and perhaps other parts. A teacher in evaluation mode keeps none together.
        network: counts in any mode, because frozen parts may learn later.

    Raises:
        Mistake: ghost batches differ in size.
    """
    own = set(network.modules())
    sizes = {layer.ghost_batch_size for layer in ghosts_of(task) if layer in own or layer.training}
    if len(sizes) > 1:
        raise Mistake(f"the network has ghost batches of {sorted(sizes)} examples: write one size")
    return sizes.pop() if sizes else 1


def has_batchnorm(module: nn.Module) -> bool:
    """Return whether a module has batch norms whose statistics are over a micro-batch in training."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return any(layer.training or layer.running_mean is None for layer in norms)


def batchnorms(network: nn.Module) -> Iterator[tuple[str, _BatchNorm | GhostBatchNorm]]:
    """Yield the batch norms (and ghost batch norms) of a network that have running statistics, with their names."""
    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm | GhostBatchNorm) and layer.running_mean is not None:
            yield name, layer
