"""What has places in an image, such as masks and boxes, moves with the image."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchwise.batching.structure import leaves, rebuild

Move = Callable[[Tensor, Tensor], Tensor]
"""Takes values of M examples and their numbers, [M, ...] each, and returns the values in their new places."""


class Places(NamedTuple):
    """Moves the masks and boxes of a micro-batch.

    A mask is a tensor [N, H, W] or [N, C, H, W] with the height and width of the images. Boxes are under the key
    `boxes`: [N, K, 4] or [N, 4], in pixels, as left, top, right, bottom. A row without area is padding, and stays. Both
    may also be in lists of one value per example, without N. Tensors [N] and [N, F] have no places.

    Args:
        who: name of the augmentation, for the error.
        size: height and width of the images.
        numbers: of each example, [N, ...].
        masks: moves masks [M, C, H, W].
        boxes: moves boxes [M, K, 4].
    """

    who: str
    size: tuple[int, int]
    numbers: Tensor
    masks: Move
    boxes: Move

    def __call__(self, value: Any, name: str) -> Any:
        """Return inputs or targets, called `name` in an error, with the masks and boxes moved.

        Raises:
            ValueError: something may have places, but which is not known.
        """
        if isinstance(value, dict):
            return {key: self(item, f"{name}[{key!r}]") for key, item in value.items()}
        if isinstance(value, tuple):
            items = [self(item, name) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            each = [self._replace(numbers=numbers[None]) for numbers in self.numbers]
            if len(value) != len(each):  # within an example, such as its polygons
                raise self._unknown(f"{name}, a list")
            return [_alone(item, lambda one, own=own: own(one, name)) for own, item in zip(each, value, strict=True)]
        return self._moved(value, name) if isinstance(value, Tensor) else value

    def _moved(self, values: Tensor, name: str) -> Tensor:
        if (kind := kind_of(values, name, self.size)) is None:
            return values
        if kind == "boxes":
            rows = values.view(len(values), -1, 4)
            real = (rows[..., 2:] > rows[..., :2]).all(-1, keepdim=True)
            return torch.where(real, self.boxes(rows, self.numbers).to(rows), rows).view(values.shape)
        if kind == "mask":
            return self.masks(values.view(len(values), -1, *self.size), self.numbers).view(values.shape)
        raise self._unknown(f"{name} {list(values.shape)}")

    def _unknown(self, name: str) -> ValueError:
        height, width = self.size
        return ValueError(
            f"{self.who} moves the images, but {name} is no mask of {height} x {width} pixels, and no boxes [N, K, 4] "
            f"under a key 'boxes': leave {self.who} out, or flatten what has no places"
        )


def _alone(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function for batches to the value of one example."""
    batch = rebuild(value, lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf)
    return rebuild(function(batch), lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf)


def kind_of(values: Tensor, name: str, size: tuple[int, int]) -> str | None:
    """Return "mask", "boxes", "unknown", or None for what has no places."""
    if name.endswith("['boxes']") and values.ndim in (2, 3) and values.shape[-1] == 4:
        return "boxes"
    if values.ndim in (3, 4) and tuple(values.shape[-2:]) == size:
        return "mask"
    return "unknown" if values.ndim >= 3 else None


def with_places(value: Any, name: str, size: tuple[int, int]) -> Iterator[str]:
    """Yield the names of what may have places in inputs or targets."""
    for place, leaf in leaves(value, name):
        if isinstance(leaf, list) and leaf:
            yield from _alone(leaf[0], lambda one, place=place: list(with_places(one, place, size)))
        elif isinstance(leaf, Tensor) and kind_of(leaf, place, size):
            yield f"{place} {list(leaf.shape)}"


def image_of(inputs: Any) -> Tensor | None:
    """Return the images [N, C, H, W] among the inputs; None: there are none, or several."""
    if isinstance(inputs, Tensor):
        return inputs if inputs.ndim == 4 else None
    found = [leaf for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim == 4]
    return found[0] if len(found) == 1 else None


def put(inputs: Any, image: Any, other: Any) -> Any:
    """Return the inputs with something else in the place of the images."""
    if inputs is image:
        return other
    return rebuild(inputs, lambda leaf: other if leaf is image else leaf, lambda values: values)


def flipped(boxes: Tensor, which: Tensor, width: int) -> Tensor:
    """Mirror left and right the boxes [M, K, 4] of the examples that `which` selects, bool [M]."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.where(which[:, None, None], torch.stack([width - right, top, width - left, bottom], -1), boxes)


def shifted(boxes: Tensor, down: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    """Shift boxes [M, K, 4] by whole pixels, int64 [M] each, and cut them at the edge of the image."""
    by = torch.stack([right, down, right, down], -1)[:, None]
    return _inside((boxes + by).to(boxes.dtype), size)


def transformed(boxes: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the smallest upright boxes around transformed boxes [M, K, 4], cut at the edge of the image.

    Args:
        boxes: in pixels.
        matrices: [M, 2, 3], from places in the result to places in the image, as for `pixels.affine`.
        size: height and width of the images.
    """
    sides = matrices.new_tensor([size[1], size[0]])
    corners = boxes[..., [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(-1, (4, 2)).to(matrices)  # [M, K, 4, 2]
    normalised = 2 * corners / sides - 1 - matrices[:, None, None, :, 2]
    placed = torch.linalg.solve(matrices[:, :, :2], normalised.flatten(1, 2).mT).mT.view(corners.shape)
    placed = (placed + 1) * sides / 2
    moved = _inside(torch.cat([placed.amin(2), placed.amax(2)], -1), size)
    return moved.to(boxes.dtype) if boxes.is_floating_point() else moved.round().to(boxes.dtype)


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    columns, rows = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([columns, rows], -1).flatten(-2)
