"""The picture of a batch as the network will see it: images or columns, its classes, its values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from batchwise.callbacks.pictures import contact_sheet
from batchwise.choosing.classes import Classes
from batchwise.host import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES, PANELS, ACROSS = 32, 12, 8
OBLONG = 16
"""Inputs whose one side has more than so many times the values of the other are no images, but signals."""


def draw(path: Path, inputs: Tensor, targets: Tensor | None, classes: Classes | None, lengths: Sequence[int]) -> None:
    """Draw a PNG.

    Args:
        path: path of the file.
        inputs: examples after `transform`: a table [N, F] or images [N, C, H, W] or [N, H, W]; of others, the values.
        targets: written over the images if they are one number each, [N].
        classes: of the data set and of the batches; None: there are none.
        lengths: of sequences; empty if the inputs are not tokens.
    """
    from matplotlib.figure import Figure

    images = inputs.ndim in (3, 4) and max(inputs.shape[-2:]) <= OBLONG * min(inputs.shape[-2:])
    inputs = inputs.flatten() if lengths else inputs
    count = min(len(inputs), IMAGES) if images else min(inputs.shape[1], PANELS) if inputs.ndim == 2 else 0
    across = ACROSS if images else 4
    rows = -(-count // across)
    heights = [(1.4 if images else 1.9) * rows, 2.6]
    figure = Figure(figsize=(9, sum(heights) + 0.3), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[max(heights[0], 0.01), heights[1]]).flat
    if count and images:
        _pictures(top.subplots(), inputs[:IMAGES], targets)
    elif count:
        _columns(list(top.subplots(rows, across, squeeze=False).flat), inputs)
    left, right = bottom.subplots(1, 2)
    _classes(left, classes)
    if lengths:
        right.hist(lengths, bins=50, color="tab:blue")
        right.set(xlabel="tokens of a sequence", ylabel="sequences")
    else:
        finite = inputs[inputs.isfinite()].double().numpy()
        right.hist(finite, bins=50, color="tab:blue")
        right.set(xlabel="value, as the network sees it", ylabel="values", yscale="log" if len(finite) else "linear")
    with whole(path) as part:
        figure.savefig(part, format="png")


def _pictures(axis: "Axes", images: Tensor, targets: Tensor | None) -> None:
    images = images[:, None] if images.ndim == 3 else images
    images = images if images.shape[1] == 3 else images[:, :1]
    finite = images[images.isfinite()].double()  # one scale for all, so that a blank image looks blank
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    titles = targets.tolist() if targets is not None and targets.ndim == 1 else [""] * len(images)
    shown = [f"{title:.4g}" if isinstance(title, float) else str(title) for title in titles]
    contact_sheet(axis, (images.double() - low) / max(high - low, 1e-12), shown, ["black"] * len(images), ACROSS)


def _columns(axes: "list[Axes]", table: Tensor) -> None:
    for number, (axis, column) in enumerate(zip(axes, table.double().T, strict=False)):
        axis.hist(column[column.isfinite()].numpy(), bins=30, color="tab:blue")
        axis.set_title(f"column {number}", fontsize=9, pad=2)
        axis.set_ylabel("" if number % 4 else "examples", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[table.shape[1] :]:
        axis.axis("off")


def _classes(axis: "Axes", classes: Classes | None) -> None:
    if classes is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "targets are not classes", ha="center")
        return
    places, mean = np.arange(len(classes.names)), classes.batches.mean(0)
    spread = [mean - classes.batches.min(0), classes.batches.max(0) - mean]
    axis.stairs(classes.data, np.arange(len(classes.names) + 1) - 0.5, fill=True, color="lightgray", label="data set")
    axis.errorbar(places, mean, spread, fmt=".", capsize=3, color="tab:blue", label="batches: mean, lowest, highest")
    axis.set(
        xlabel="class", ylabel="share of examples", ylim=(0, 1.25 * max(classes.data.max(), classes.batches.max()))
    )
    if len(classes.names) <= 20:
        axis.set_xticks(places, [str(name) for name in classes.names])
    axis.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
