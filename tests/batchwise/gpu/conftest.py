"""Tests on a CUDA device. `BATCHWISE_GPU_TESTS_ON=cpu` runs most of them on a CPU, for work on the tests themselves."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

ON_CPU = os.environ.get("BATCHWISE_GPU_TESTS_ON") == "cpu"


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The device under test. Float32 is float32 on it, also in convolutions."""
    if not ON_CPU and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def on(device: torch.device) -> dict[str, Any]:
    """The trainer's settings for the device under test."""
    return {"accelerator": device.type, "devices": 1}


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only CUDA has this")
    return device
