"""`torch.compile` for a network."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import small
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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The compiled graphs, by a backend that needs no compiler."""
    found: list[torch.fx.GraphModule] = []
    real = torch.compile

    def compile_(function: object, **_: object) -> object:
        return real(function, backend=lambda graph, _: found.append(graph) or graph.forward)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    return found


@pytest.mark.slow
def test_a_later_trainer_that_does_not_compile_does_not(graphs: list[torch.fx.GraphModule]) -> None:
    task, _ = small.fit(max_epochs=1, compile=True)
    assert graphs
    assert task.network._compiled_call_impl is not None
    graphs.clear()
    small.fit(task, max_epochs=1)
    assert task.network._compiled_call_impl is None
    assert not graphs
    own = small.Classify(small.network(), optimizer=small.adamw)
    own.network.compile(backend="eager")
    small.fit(own, max_epochs=1)
    assert own.network._compiled_call_impl is not None  # the user has compiled it


@pytest.mark.slow
def test_many_networks_are_compiled_in_one_process(graphs: list[torch.fx.GraphModule]) -> None:
    """PyTorch gives up a function that it has compiled eight times."""
    for width in range(1, 13):
        network = nn.Linear(3, width)
        assert compiled.compile_network(network, torch.device("cpu"))
        network(torch.zeros(2, 3))
        assert len(graphs) == width


class Apart(nn.Module):
    """Two parts, of which tasks call one, both or neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(inputs))


def called(calls: Callable[[Apart, torch.Tensor], torch.Tensor]) -> list[str]:
    """What is said about a task that applies its network in some way."""

    class Calls(small.Classify):
        def forward(self, inputs: Any) -> Any:
            assert isinstance(self.network, Apart)
            return calls(self.network, inputs)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        small.fit(Calls(Apart(), optimizer=small.adamw), max_epochs=1, compile=True)
    return [str(one.message) for one in said if "trainer.compile" in str(one.message)]


def test_parts_that_are_called_by_themselves_are_named(graphs: list[torch.fx.GraphModule]) -> None:
    assert not called(lambda network, x: network(x))
    assert graphs
    before = "trainer.compile compiles the forward of model.network, but Calls.losses "
    for calls, words in (
        (lambda network, x: network.head(network.encoder(x)), "calls network.encoder and network.head by itself"),
        (lambda network, x: network(x) + network.head(x[:, :4]), "calls network.head by itself, which is not compiled"),
        (lambda network, x: x[:, :4] @ network.head.weight.T, "does not call it, which is not compiled"),
    ):
        (line,) = called(calls)
        assert line.startswith(before + words)


def test_pytorch_takes_the_compiler_that_cxx_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled.sys, "platform", "linux")
    there: list[str] = ["g++"]
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setenv("CXX", "nosuch++")
    assert not compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))
    assert capsys.readouterr().out == (
        "trainer.compile is true, but there is no compiler nosuch++, which the variable CXX names: "
        "training goes on without\n"
    )
    monkeypatch.delenv("CXX")
    assert compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))
    there[:] = ["clang++"]  # which PyTorch takes only if it is told to
    assert not compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))
    assert "there is no g++ (write CXX=clang++)" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "clang++")
    assert compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    assert not compiled.compile_network(nn.Linear(1, 1), torch.device("cpu"))
    assert "there is no C++ compiler" in capsys.readouterr().out
