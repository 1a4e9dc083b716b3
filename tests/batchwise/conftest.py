import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers import DIGITS, Result, run_here

os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)  # sums in one order, so that floats can be compared


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The default run on the digits, as README's first command makes it."""
    root = tmp_path_factory.mktemp("trained")
    result = run_here("fit", *DIGITS, "--trainer.default_root_dir", root)
    assert result.code == 0, result.err
    return result
