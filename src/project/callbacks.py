"""Your callbacks: what happens besides training. Name them under `trainer.callbacks` in the configuration.

A callback is Lightning's: its methods are called at the points of training that their names say.
"""

import torch
from lightning.pytorch import Callback, Trainer

from batchwise import DataModule, Task
from batchwise.models.kept import kept_modes

SHADES = " .:-=+*#%@"  # from dark to bright


class Mistakes(Callback):
    """When training ends, prints the validation examples that the model is most certain of and wrong about.

    Args:
        count: the most examples to print.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:
        """Draw with characters: this works over ssh, too."""
        data: DataModule = pl_module.data  # a task knows its data module
        if data.split("val") is None:
            return  # there is no validation
        batch = data.examples("val", 1000)  # the first 1,000, on the CPU, as `load` gives them
        with kept_modes(pl_module):
            pl_module.eval()  # without dropout
            predicted = pl_module.predictions(data.to_device(batch, pl_module.device, training=False))
        if "probability" not in predicted or not trainer.is_global_zero:
            return  # a task without classes; or another device, which computes and does not print
        certainty, digit = predicted["probability"].cpu().max(dim=1)
        wrong = (digit != batch.targets).nonzero().squeeze(1)
        for number in wrong[certainty[wrong].argsort(descending=True)][: self.count].tolist():
            print(f"validation example {number} is a {batch.targets[number]}, taken for a {digit[number]}:")
            image = batch.inputs[number].float()
            if image.ndim == 3:  # draw its first channel
                for row in (image[0] * 9 / image.max().clamp(min=1)).int().tolist():
                    print("   ", "".join(SHADES[value] * 2 for value in row))
