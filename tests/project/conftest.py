import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "batchwise"))  # its helpers

os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)  # sums in one order, so that floats can be compared


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
