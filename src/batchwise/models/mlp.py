"""A multi-layer perceptron."""

from collections.abc import Sequence

from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.models.dropout import Dropout
from batchwise.ranges import PositiveInt


class MLP(nn.Module):
    """Linear layers with a norm, ReLU and dropout between them.

    Args:
        in_features: numbers per example, after flattening.
        num_classes: outputs per example.
        hidden_features: width of each hidden layer; without any, the model is linear (softmax regression).
        norm: "none", "layer" or "batch".
        dropout: probability that a hidden value is zeroed in training.
    """

    @typed
    def __init__(
        self,
        in_features: PositiveInt = 64,
        num_classes: PositiveInt = 10,
        hidden_features: Sequence[PositiveInt] = (128,),
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for hidden in hidden_features:
            # No bias before a norm, because the norm removes it.
            linear = nn.Linear(width, hidden, bias=norm == "none")
            layers += [linear, make_norm(norm, hidden), nn.ReLU(), Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, ...] with `in_features` numbers per example to logits [N, num_classes]."""
        return self.layers(inputs)


def make_norm(name: str, features: int) -> nn.Module:
    """Return a norm over `features` for activations [N, features]."""
    norms = {"none": lambda _: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    if name not in norms:
        raise ValueError(f"norm is '{name}': write one of {', '.join(norms)}")
    return norms[name](features)
