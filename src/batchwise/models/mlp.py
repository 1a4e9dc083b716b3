"""A multi-layer perceptron."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from batchwise.models.dropout import Dropout


class MLP(nn.Module):
    """Linear layers with a norm, ReLU and dropout between them.

    Args:
        in_features: numbers per example, after flattening.
        num_classes: outputs per example.
        hidden_features: width of each hidden layer; none gives a linear model (softmax regression).
        norm: "none", "layer" or "batch".
        dropout: probability that a hidden value is zeroed in training.
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        hidden_features: Sequence[int] = (128,),
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = norm
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for hidden in hidden_features:
            # No bias before a norm: the norm takes it out again.
            linear = nn.Linear(width, hidden, bias=norm == "none")
            layers += [linear, make_norm(norm, hidden), nn.ReLU(), Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def parallelize(self, mesh: Any) -> None:
        """Cut the matrices over the devices of a mesh, by rows; each has the outputs of all (Shoeybi et al. 2019,
        arXiv 1909.08053, "column parallel"), so dropout is what it was.

        Raises:
            ValueError: there are norms, whose weights would stay whole, and optimizers do not take both kinds.
        """
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        if self.norm != "none":
            raise ValueError(f"MLP cannot cut its layers with norm {self.norm}: write norm none")
        names = [name for name, layer in self.layers.named_children() if isinstance(layer, nn.Linear)]
        parallelize_module(self.layers, mesh, {name: ColwiseParallel(output_layouts=Replicate()) for name in names})

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, ...] with `in_features` numbers per example to logits [N, num_classes]."""
        return self.layers(inputs)


def make_norm(name: str, features: int) -> nn.Module:
    """Return a norm over `features` for activations [N, features]."""
    norms = {"none": lambda _: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    if name not in norms:
        raise ValueError(f"norm is '{name}': write one of {', '.join(norms)}")
    return norms[name](features)
