"""Draws the validation results of a classifier, and logs the pictures to the loggers that accept images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from batchwise.arguments import typed
from batchwise.models.kept import kept_modes
from batchwise.ranges import PositiveInt
from batchwise.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Pictures(Callback):
    """Logs two pictures at the end of training.

    `val/confusion` is the confusion matrix of the last validation, over all examples. `val/predictions` has a few
    images with their predicted classes, if the inputs are images.

    Args:
        count: images in the picture.
    """

    @typed
    def __init__(self, count: PositiveInt = 24) -> None:
        self.count = count

    def on_train_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Draw and log on the first device. All devices run the network, because it may be sharded."""
        counts = pl_module._measures.tables.get("val/confusion")
        takers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger) or hasattr(one, "log_image")]
        data = pl_module.data
        if not takers or data.split("val") is None:
            return
        if counts is not None and trainer.is_global_zero:
            _log(takers, "val/confusion", draw_confusion(counts.cpu()), trainer.global_step)
        batch = data.examples("val", self.count)
        images = batch.inputs
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            return
        if not isinstance(batch.targets, Tensor) or batch.targets.ndim != 1:
            return
        with torch.no_grad(), kept_modes(pl_module), trainer.precision_plugin.forward_context():
            pl_module.eval()
            predictions = pl_module.predictions(data.to_device(batch, pl_module.device, training=False))
        if trainer.is_global_zero and "probability" in predictions:
            picture = draw(images, predictions["probability"].cpu(), batch.targets)
            _log(takers, "val/predictions", picture, trainer.global_step)


def _log(loggers: Sequence[Logger], name: str, picture: np.ndarray, step: int) -> None:
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
        else:
            logger.log_image(name, [picture], step=step)  # type: ignore[attr-defined]


def draw_confusion(counts: Tensor) -> np.ndarray:
    """Return a confusion matrix as RGB bytes [height, width, 3]. Rows are true classes, columns predicted ones.

    Args:
        counts: examples, whole numbers [C, C]. A cell is as dark as its share of its row.
    """
    from matplotlib.figure import Figure

    classes = len(counts)
    side = max(3.0, min(12.0, 1 + 0.42 * classes))  # inches
    figure = Figure(figsize=(side, side), dpi=100)
    left, length = 0.6 / side, 1 - 0.7 / side  # set here, because to find the margins takes as long as to draw
    axis = figure.add_axes((left, left, length, length))
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    axis.imshow(shares.numpy(), cmap="Greys", vmin=0, vmax=1)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    if classes <= 30:  # more would not be legible
        axis.set_xticks(range(classes))
        axis.set_yticks(range(classes))
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=8, color=color)
    return _pixels(figure)


def draw(images: Tensor, probabilities: Tensor, targets: Tensor, columns: int = 8) -> np.ndarray:
    """Return a contact sheet as RGB bytes [height, width, 3]: each image with its class and the predicted one.

    Args:
        images: [N, 1 or 3, H, W], any range.
        probabilities: [N, C].
        targets: class numbers [N].
        columns: images in a row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * columns, 1.35 * -(-len(images) // columns)), dpi=100)
    pixels = images.float()
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    titles, colors = [], []
    for probability, target in zip(probabilities, targets.tolist(), strict=True):
        share, predicted = probability.max(0)
        right = int(predicted) == target
        titles.append(f"{target} ({share:.0%})" if right else f"{target}, not {int(predicted)} ({share:.0%})")
        colors.append("black" if right else "red")
    contact_sheet(figure.add_axes((0, 0, 1, 1)), pixels, titles, colors, columns)
    return _pixels(figure)


def contact_sheet(axis: "Axes", images: Tensor, titles: Sequence[str], colors: Sequence[str], columns: int) -> None:
    """Draw images in rows, each with its title over it, in cells of 1.1 by 1.35 units.

    All are in one pair of axes, because to lay out a pair for each takes half a second.

    Args:
        axis: where to draw.
        images: [N, 1 or 3, H, W], from 0 to 1.
        titles: [N].
        colors: of the titles, [N].
        columns: images in a row.
    """
    axis.axis("off")
    scale = min(1 / images.shape[3], 1.05 / images.shape[2])
    half, down = scale * images.shape[3] / 2, scale * images.shape[2]
    for number, image in enumerate(images.permute(0, 2, 3, 1).squeeze(-1).numpy()):
        middle, top = 1.1 * (number % columns + 0.5), 1.35 * (number // columns) + 0.25
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(middle - half, middle + half, top + down, top))
        title, color = titles[number], colors[number]
        axis.text(middle, top - 0.04, title, fontsize=8, color=color, ha="center", va="bottom")
    axis.set(xlim=(0, 1.1 * columns), ylim=(1.35 * -(-len(images) // columns), 0))


def _pixels(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
