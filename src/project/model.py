"""Your network: any `nn.Module`. Its arguments are the keys under `model.network` in the configuration."""

from torch import Tensor, nn

from batchwise.models.dropout import Dropout


class Network(nn.Module):
    """A perceptron with one hidden layer. Put your layers here.

    Args:
        in_features: numbers per image: 8 x 8 pixels.
        hidden_features: width of the hidden layer.
        num_classes: outputs per image.
        dropout: probability that a hidden value is zeroed in training.
    """

    def __init__(
        self, in_features: int = 64, hidden_features: int = 512, num_classes: int = 10, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_features, hidden_features, bias=False),  # the norm has a bias of its own
            nn.LayerNorm(hidden_features),  # batch norm would mix the examples: see README, "What it does not do"
            nn.ReLU(),
            Dropout(dropout),  # unlike nn.Dropout, it draws the same on any number of devices
            nn.Linear(hidden_features, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 1, 8, 8] to logits [N, num_classes]."""
        return self.layers(images)
