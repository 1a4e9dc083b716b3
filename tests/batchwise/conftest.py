import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data._utils import worker

sys.path.insert(0, str(Path(__file__).parent))
from helpers import DIGITS, Result, run_here

from batchwise.host import set_threads

os.environ["WANDB_MODE"] = "offline"
# Sums in one order, so that floats can be compared. And threads of several processes would wait for each other.
set_threads(1)
worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds, not 5: so long a process that reads outlives a loader in a cycle


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Forget what Lightning tells the processes of a test by the environment, such as a port."""
    before = dict(os.environ)
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The default run on the digits, as README's first command makes it."""
    root = tmp_path_factory.mktemp("trained")
    result = run_here("fit", *DIGITS, "--trainer.default_root_dir", root)
    assert result.code == 0, result.err
    return result
