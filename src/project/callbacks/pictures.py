"""A picture of a few validation images with what the network says they are, for loggers that take pictures."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Pictures(Callback):
    """Logs `val/predictions` at the end of training, where inputs are images and the task classifies them.

    Args:
        count: images in the picture.
    """

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw and log."""
        takers = [logger for logger in trainer.loggers if hasattr(logger, "log_image") or _is_tensorboard(logger)]
        data = pl_module.data
        if not takers or not trainer.is_global_zero or data.split("val") is None:
            return
        batch = data.examples("val", self.count)
        images = batch.inputs
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            return
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            predictions = pl_module.predictions(data.to_device(batch, pl_module.device, training=False))
        pl_module.train()
        picture = draw(images, predictions["probability"].cpu(), batch.targets)
        for logger in takers:
            if _is_tensorboard(logger):
                logger.experiment.add_image("val/predictions", picture, trainer.global_step, dataformats="HWC")  # type: ignore[union-attr]
            else:
                logger.log_image("val/predictions", [picture], step=trainer.global_step)  # type: ignore[union-attr]


def _is_tensorboard(logger: Any) -> bool:
    return hasattr(logger.experiment, "add_image") if type(logger).__name__ == "TensorBoardLogger" else False


def draw(images: Tensor, probabilities: Tensor, targets: Tensor, columns: int = 8) -> np.ndarray:
    """Return a contact sheet as RGB bytes [height, width, 3]: each image with its class and the predicted one.

    Args:
        images: [N, 1 or 3, H, W], any range.
        probabilities: [N, C].
        targets: class numbers [N].
        columns: images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.1 * columns, 1.35 * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, probability, target in zip(axes, images, probabilities, targets.tolist(), strict=False):
        pixels = image.float()
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
        axis.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        share, predicted = probability.max(0)
        right = int(predicted) == target
        title = f"{target}" if right else f"{target}, not {int(predicted)}"
        axis.set_title(f"{title} ({share:.0%})", fontsize=8, color="black" if right else "red", pad=2)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
