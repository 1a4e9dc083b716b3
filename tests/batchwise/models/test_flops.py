"""Operations of a forward pass, against those by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from batchwise.models.flops import count_flops
from batchwise.models.mlp import MLP

LAYER = 2 * (10 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 10 * 10 * 64)


class Attention(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(inputs, inputs, inputs)


@pytest.mark.parametrize(
    ("network", "shape", "per_example"),
    [
        (MLP(64, 10, [512]), (8, 8), 2 * (64 * 512 + 512 * 10)),
        (nn.Conv2d(3, 8, 3), (3, 16, 16), 2 * 14 * 14 * 8 * 27),
        (Attention(), (4, 10, 16), 2 * 2 * 4 * 10 * 10 * 16),
        (nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), (10, 64), LAYER),
        (nn.LayerNorm(8), (8,), None),
    ],
)
def test_flops_by_hand(network: nn.Module, shape: tuple[int, ...], per_example: int | None) -> None:
    inputs = torch.randn(2, *shape)
    network.eval()
    with torch.no_grad():
        outputs, counted = count_flops(lambda: network(inputs))
        assert counted == (per_example and 2 * per_example)
        assert torch.allclose(outputs, network(inputs), atol=1e-6)


def test_a_compiled_network_is_counted_and_still_compiles() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    network = MLP(64, 10, [512])
    network.compile(backend=backend)
    assert count_flops(lambda: network(torch.randn(2, 64)))[1] == 2 * 2 * (64 * 512 + 512 * 10)
    assert not compiled
    network(torch.randn(2, 64))
    assert compiled


def test_what_cannot_be_counted_runs_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise NotImplementedError("this tensor subclass")

    monkeypatch.setattr(FlopCounterMode, "__enter__", fail)
    forward: Callable[[], int] = lambda: 7  # noqa: E731
    assert count_flops(forward) == (7, None)


def test_an_error_of_the_network_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_flops(lambda: nn.Linear(3, 2)(torch.ones(2, 4)))
