"""`torch.compile` for a network, if there is a compiler."""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile a network in place, and keep its names. Without a compiler, say so and return False."""
    if device.type == "cuda":
        missing = None if find_spec("triton") else "triton is not installed"
    else:
        compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)]
        missing = None if compilers else "there is no C++ compiler (g++ or clang++)"
    if missing:
        print(f"trainer.compile is true, but {missing}: training goes on without", flush=True)
        return False
    call = network._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # What `network.compile()` does, in a function of our own: PyTorch leaves out those of its own layers, so for an
    # `nn.Sequential` it compiles nothing, and does not say so.
    network._compiled_call_impl = torch.compile(run)
    return True
