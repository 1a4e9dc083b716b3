"""The picture of a batch as the network will see it: images or columns, its classes, its values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

IMAGES, PANELS, ACROSS = 32, 12, 8


def draw(path: Path, inputs: Tensor, targets: Tensor | None, mix: Any, lengths: Sequence[int] = ()) -> None:
    """Draw a PNG.

    Args:
        path: of the file.
        inputs: examples after `transform`; [N, F] a table, [N, C, H, W] or [N, H, W] images, else only their values.
        targets: written over the images where they are one number each, [N].
        lengths: of sequences, where the inputs are tokens.
        mix: `names` of the classes, their shares in the `data` set and in each of the `batches`; None: no classes.
    """
    from matplotlib.figure import Figure

    images = inputs.ndim in (3, 4)
    inputs = inputs.flatten() if lengths else inputs
    count = min(len(inputs), IMAGES) if images else min(inputs.shape[1], PANELS) if inputs.ndim == 2 else 0
    across = ACROSS if images else 4
    rows = -(-count // across)
    heights = [(1.2 if images else 1.9) * rows, 2.6]
    figure = Figure(figsize=(9, sum(heights) + 0.3), dpi=120, layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[max(heights[0], 0.01), heights[1]])
    top, bottom = panels
    if count:
        axes = list(top.subplots(rows, across, squeeze=False).flat)
        (_pictures if images else _columns)(axes, inputs[: IMAGES if images else None], targets)
        for axis in axes[count:]:
            axis.axis("off")
    left, right = bottom.subplots(1, 2)
    _classes(left, mix)
    if lengths:
        right.hist(lengths, bins=50, color="tab:blue")
        right.set(xlabel="tokens of a sequence", ylabel="sequences")
    else:
        finite = inputs[inputs.isfinite()].double().numpy()
        right.hist(finite, bins=50, color="tab:blue")
        right.set(xlabel="value, as the network sees it", ylabel="values", yscale="log" if len(finite) else "linear")
    figure.savefig(path)


def _pictures(axes: list[Any], images: Tensor, targets: Tensor | None) -> None:
    images = images[:, None] if images.ndim == 3 else images
    images = images if images.shape[1] == 3 else images[:, :1]
    finite = images[images.isfinite()].double()  # one scale for all, so that a blank image looks blank
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    scaled = ((images.double() - low) / max(high - low, 1e-12)).permute(0, 2, 3, 1).squeeze(-1).numpy()
    titles = targets.tolist() if targets is not None and targets.ndim == 1 else [""] * len(scaled)
    for axis, image, title in zip(axes, scaled, titles, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{title:.4g}" if isinstance(title, float) else title, fontsize=9, pad=2)
        axis.axis("off")


def _columns(axes: list[Any], table: Tensor, targets: Tensor | None) -> None:
    for number, (axis, column) in enumerate(zip(axes, table.double().T, strict=False)):
        axis.hist(column[column.isfinite()].numpy(), bins=30, color="tab:blue")
        axis.set_title(f"column {number}", fontsize=9, pad=2)
        axis.set_ylabel("" if number % 4 else "examples", fontsize=8)
        axis.tick_params(labelsize=7)


def _classes(axis: Any, mix: Any) -> None:
    if mix is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "targets are not classes", ha="center")
        return
    places, mean = np.arange(len(mix.names)), mix.batches.mean(0)
    spread = [mean - mix.batches.min(0), mix.batches.max(0) - mean]
    axis.stairs(mix.data, np.arange(len(mix.names) + 1) - 0.5, fill=True, color="lightgray", label="data set")
    axis.errorbar(places, mean, spread, fmt=".", capsize=3, color="tab:blue", label="batches: mean, lowest, highest")
    axis.set(xlabel="class", ylabel="share of examples", ylim=(0, 1.25 * max(mix.data.max(), mix.batches.max())))
    if len(mix.names) <= 20:
        axis.set_xticks(places, [str(name) for name in mix.names])
    axis.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
