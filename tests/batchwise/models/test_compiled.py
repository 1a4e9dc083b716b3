"""`torch.compile` for a network."""

import copy

import pytest
import torch
from torch import nn

from batchwise.models import compiled
from batchwise.models.mlp import MLP


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Linear(64, 4), nn.ReLU()), nn.Linear(64, 4), MLP(64, 10, [16])],
    ids=lambda n: type(n).__name__,
)
def test_every_network_is_compiled(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a layer of PyTorch itself, of which `Module.compile` compiles nothing."""
    graphs: list[torch.fx.GraphModule] = []
    real = torch.compile

    def compile_(function: object) -> object:
        return real(function, backend=lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiled.shutil, "which", lambda _: "/usr/bin/g++")
    inputs, names = torch.randn(3, 64), list(network.state_dict())
    expected = network(inputs)
    assert compiled.compile_network(network, torch.device("cpu"))
    assert torch.allclose(network(inputs), expected)
    assert len(graphs) == 1
    assert list(network.state_dict()) == names
    assert torch.allclose(copy.deepcopy(network)(inputs), expected)  # a copy is not compiled, and has its own weights
    assert len(graphs) == 1


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    assert not compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))
    assert "there is no C++ compiler" in capsys.readouterr().out
