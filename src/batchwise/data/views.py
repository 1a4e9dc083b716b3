"""Makes several augmented views of each example. A contrastive loss then makes these views similar to each other."""

from dataclasses import replace

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.batching.random import mix
from batchwise.data.augmentation import Augmentation, Draws, Geometric
from batchwise.data.places import with_places
from batchwise.ranges import PositiveInt


class Views(Augmentation):
    """Augment each example several times, independently. The inputs become a tuple of views, [N, ...] each.

    It must be the last augmentation. In evaluation there is one view, as the data module gives it.

    Args:
        steps: augmentations that each view goes through, in order, after the data module's `transform`.
        count: number of views.

    Raises:
        ValueError: one of the augmentations mixes examples.
    """

    after_transform = True
    for_images = False

    @typed
    def __init__(self, steps: list[Augmentation], count: PositiveInt = 2) -> None:
        for step in steps:
            if step.in_pairs:
                raise ValueError(f"Views.steps has {type(step).__name__}, which mixes examples: leave it out")
        self.steps, self.count = steps, count

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Make the views."""
        for step in self.steps:
            if step.for_images and batch.inputs.ndim != 4:
                shape = list(batch.inputs.shape)
                raise ValueError(f"{type(step).__name__} takes images [N, C, H, W], but the inputs are {shape}")
            if isinstance(step, Geometric):
                for found in with_places(batch.targets, "targets", tuple(batch.inputs.shape[2:])):
                    raise ValueError(f"Views moves each view in its own way, but {found} has places: leave it out")
        views = []
        for view in range(self.count):
            seen = batch
            for number, step in enumerate(self.steps):
                seen = step(seen, replace(draws, key=mix(draws.key, view, number)))
            views.append(seen.inputs)
        return replace(batch, inputs=tuple(views))
