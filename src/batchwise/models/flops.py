"""Floating-point operations of a network's forward pass."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten
UNKNOWN_TO_TORCH: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    aten.mkldnn_rnn_layer: lambda inputs, weight, recurrent, *_, **__: (
        2 * prod(inputs[:2]) * (prod(weight) + prod(recurrent))
    ),
}
"""What PyTorch runs on a CPU, where a network is first tried, and does not count: formulas of the arguments' shapes."""


def count_flops(forward: Callable[[], Any]) -> tuple[Any, int | None]:
    """Return what `forward` gives, and the operations of its matrix products, convolutions and attention.

    They are None where the network runs on what cannot be counted.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whole transformer layers in one call, which is not counted
    counting = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    try:
        # Seen by the counter, a compiled network would never be compiled again.
        with torch.compiler.set_stance("force_eager"), counting:
            outputs = forward()
        return outputs, counting.get_total_flops() or None
    except Exception:  # of the counter, or of the network, which then raises it again
        return forward(), None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
