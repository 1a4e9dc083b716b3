"""A short ResNet for images of 32 x 32 pixels, as in the fast CIFAR-10 records."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.models.convnet import make_norm2d
from batchwise.ranges import PositiveInt


class ResNet(nn.Module):
    """A convolution, stages that halve height and width by max pooling, a global maximum, a scaled linear layer.

    Each stage is a convolution, the pooling, and a residual block of two convolutions. Three stages make eleven layers.
    It follows David Page, "How to train your ResNet" (2018), with a block in every stage and GELU, as in Jordan 2024
    (arXiv 2404.00498).

    Args:
        in_channels: channels of the images.
        num_classes: outputs per image.
        channels: channels of the first convolution and of each stage.
        norm: "batch", "group", "instance" or "none".
        scale: factor of the logits. Below one, it keeps the loss of an untrained network near log(num_classes).
    """

    @typed
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (64, 128, 256, 256),
        norm: str = "batch",
        scale: float = 0.125,
    ) -> None:
        super().__init__()
        if not len(channels):
            raise ValueError("channels is []: write those of the first convolution and of each stage")
        self.stem = _layer(in_channels, channels[0], norm)
        self.stages = nn.Sequential(*(_Stage(width, features, norm) for width, features in pairwise(channels)))
        self.head = nn.Linear(channels[-1], num_classes, bias=False)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]; H and W are at least 2**stages."""
        return self.head(self.stages(self.stem(images)).amax((2, 3))) * self.scale


class _Stage(nn.Module):
    def __init__(self, width: int, features: int, norm: str) -> None:
        super().__init__()
        self.first = _layer(width, features, norm, nn.MaxPool2d(2))
        self.residual = nn.Sequential(_layer(features, features, norm), _layer(features, features, norm))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return hidden + self.residual(hidden)


def _layer(width: int, features: int, norm: str, *pooling: nn.Module) -> nn.Sequential:
    # No bias before a norm, because the norm removes it.
    convolution = nn.Conv2d(width, features, 3, padding=1, bias=norm == "none")
    return nn.Sequential(convolution, *pooling, make_norm2d(norm, features), nn.GELU())
