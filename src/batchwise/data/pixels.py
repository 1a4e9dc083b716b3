"""Pure functions of images [N, C, H, W], with one set of numbers for each image.

On a CPU the result for an image is the same to the bit, whatever other images are in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchwise.batching.device import widest


def flip(images: Tensor, which: Tensor) -> Tensor:
    """Mirror left and right the images that `which` selects, bool [N]."""
    return torch.where(_each(which), images.flip(3), images)


def shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift by whole pixels, int64 [N] each. The image is continued by its reflection, without repeating the edge."""
    count, channels, height, width = images.shape
    rows, columns = _reflected(height, down), _reflected(width, right)
    images = images.gather(2, rows[:, None, :, None].expand(count, channels, height, width))
    return images.gather(3, columns[:, None, None, :].expand(count, channels, height, width))


def boxes(images: Tensor, row: Tensor, column: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return which pixels lie in the box of each image, bool [N, 1, H, W].

    The box begins at (row, column) and has a height and a width, float64 [N] each, in pixels. A pixel lies where its
    centre lies.
    """

    def inside(size: int, start: Tensor, length: Tensor) -> Tensor:
        centres = torch.arange(size, device=images.device) + 0.5
        return (centres >= start[:, None]) & (centres < (start + length)[:, None])

    rows, columns = inside(images.shape[2], row, height), inside(images.shape[3], column, width)
    return rows[:, None, :, None] & columns[:, None, None, :]


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Multiply brightness, contrast (distance to the mean grey) and saturation (distance to the pixel's own grey).

    Grey is the luma of ITU-R BT.601 if there are three channels, else the mean of the channels. Bytes become floats
    from 0 to 255. Other numbers have no limits.

    Args:
        images: not normalised, with any number of channels.
        brightness: factors, [N].
        contrast: factors, [N].
        saturation: factors, [N].
    """
    values = _floats(images)
    brightness, contrast, saturation = (_each(factors).to(values) for factors in (brightness, contrast, saturation))
    values = values * brightness
    # In float64, because the rounding of a sum depends on the order of the terms.
    mean = _grey(values).to(widest(values.device)).mean((1, 2, 3), keepdim=True).to(values)
    values = torch.lerp(mean, values, contrast)
    values = torch.lerp(_grey(values), values, saturation)
    return (values if images.is_floating_point() else values.clamp(0, 255)).to(float_type(images))


def affine(images: Tensor, matrices: Tensor, nearest: bool = False) -> Tensor:
    """Resample bilinearly. Bytes become floats. The image is continued by its reflection.

    Args:
        images: [N, C, H, W].
        matrices: [N, 2, 3], from places in the result to places in the image, both (x, y) from -1 to 1.
        nearest: take the nearest pixel instead, and keep the type: for masks of whole numbers.
    """
    values = images.to(widest(images.device)) if nearest else _floats(images)
    if not values.numel():  # which torch refuses, though an image may have no masks
        return values.to(images.dtype if nearest else float_type(images))
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrices.to(values), list(images.shape), align_corners=False)
        mode = "nearest" if nearest else "bilinear"
        made = F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)
    return made.to(images.dtype if nearest else float_type(images))


def _each(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)


def _reflected(size: int, shift: Tensor) -> Tensor:
    """Return the source of the pixel at each of `size` places, int64 [N, size]."""
    places = (torch.arange(size, device=shift.device) - shift[:, None]).abs()
    return size - 1 - (size - 1 - places).abs()


def float_type(images: Tensor) -> torch.dtype:
    """Return the type of images that are floats, or else the type of floats that they may become."""
    return images.dtype if images.is_floating_point() else torch.get_default_dtype()


def _floats(images: Tensor) -> Tensor:
    dtype = float_type(images)
    return images.to(dtype if dtype.itemsize >= 4 else torch.float32)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
