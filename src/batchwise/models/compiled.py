"""`torch.compile` for a network, if there is a compiler."""

import os
import shutil
from importlib.util import find_spec

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
    network.compile()
    return True
