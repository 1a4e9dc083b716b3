"""Texts that a language model writes after each validation, printed and as a table for W&B."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from batchwise.arguments import typed
from batchwise.ranges import PositiveInt
from batchwise.tasks.language import Language


class Samples(Callback):
    """Prints one text that the model writes, and logs several as the table `val/samples`.

    Args:
        count: texts in the table.
    """

    @typed
    def __init__(self, count: PositiveInt = 4) -> None:
        self.count = count

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write on all devices, because the network may be sharded. The first device prints and logs."""
        if trainer.sanity_checking or not isinstance(pl_module, Language):
            return
        if not pl_module.sample_length or not hasattr(pl_module.data, "decode"):
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            texts = [pl_module.write(number) for number in range(self.count if loggers else 1)]
        if not trainer.is_global_zero:
            return
        # An untrained model writes control characters, which a terminal would obey.
        plain = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in texts[0])
        print(f"step {trainer.global_step}, the model writes:", *("  " + line for line in plain.split("\n")), sep="\n")
        for logger in loggers:
            logger.log_text("val/samples", ["text"], [[text] for text in texts], step=trainer.global_step)
