"""What is wrong with the optimizers and schedulers that a user's `configure_optimizers` returns, as one line."""

import traceback
import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException

UNREADABLE = (MisconfigurationException, RuntimeError, RuntimeWarning, LookupError, AttributeError, TypeError)
"""What Lightning raises where it cannot read them."""
REMEDY = "return an optimizer, or {'optimizer': ..., 'lr_scheduler': {'scheduler': ..., 'interval': 'step'}}"


def refuse_unknown_keys() -> None:
    """Let a misspelt key be an error. Lightning warns of it and goes on without what was meant."""
    warnings.filterwarnings("error", "Found unsupported keys in the (lr scheduler dict|optimizer configuration)")


def wrong_optimizers(error: Exception) -> str | None:
    """Return one line about what Lightning could not read of `configure_optimizers`; None: it is another error.

    An error within `configure_optimizers` is a bug in it, and needs its traceback.
    """
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if "_init_optimizers_and_lr_schedulers" not in calls or "_call_lightning_module_hook" in calls:
        return None
    if "multiple optimizers" in str(error):
        return (
            "configure_optimizers gives several optimizers: write a batchwise.tasks.adversarial.Adversarial, whose "
            "optimizer is one for each part of the network"
        )
    said = " ".join(str(error).replace(" HINT: remove them from the output of `configure_optimizers`.", "").split())
    if isinstance(error, MisconfigurationException):
        return f"configure_optimizers: {said}"
    if not isinstance(error, RuntimeWarning):
        said = f"what it returns cannot be read ({type(error).__name__}: {said})"
    return f"configure_optimizers: {said.rstrip('.')}: {REMEDY}"
