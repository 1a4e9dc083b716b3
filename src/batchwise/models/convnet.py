"""A small convolutional network for small images."""

from collections.abc import Sequence
from math import gcd

from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.models.dropout import Dropout
from batchwise.ranges import PositiveInt


class ConvNet(nn.Module):
    """Stages of two 3 x 3 convolutions, then a global mean. Each stage but the first halves height and width.

    Args:
        in_channels: channels of the images.
        num_classes: outputs per image.
        channels: channels of each stage.
        norm: "none", "batch", "group" (8 groups, if the number of channels divides by 8) or "instance".
        dropout: probability that a feature is zeroed before the last layer, in training.
    """

    @typed
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (32, 64),
        norm: str = "group",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for stage, features in enumerate(channels):
            for stride in (1 if stage == 0 else 2, 1):
                # No bias before a norm, because the norm removes it.
                layers += [nn.Conv2d(width, features, 3, stride, padding=1, bias=norm == "none")]
                layers += [make_norm2d(norm, features), nn.ReLU()]
                width = features
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.head(self.features(images).mean(dim=(2, 3)))


def make_norm2d(name: str, channels: int) -> nn.Module:
    """Return a norm over `channels` for activations [N, channels, H, W]."""
    norms = {
        "none": lambda _: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(gcd(8, channels), channels),
        "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    }
    if name not in norms:
        raise ValueError(f"norm is '{name}': write one of {', '.join(norms)}")
    return norms[name](channels)
