"""The engine stands alone: a project without the examples, their tests and their configurations breaks none of it."""

import shutil
from typing import Any

import pytest

QUICK = "test_scaling.py or test_predictions.py or test_public_names"


@pytest.mark.weekly
def test_without_examples(copy: Any) -> None:
    for path in (copy.root / "src" / copy.package).glob("*"):
        if path.is_file() and path.name not in ("__init__.py", "__main__.py"):
            path.unlink()
    for folder in (f"tests/{copy.package}", "configs"):
        shutil.rmtree(copy.root / folder, ignore_errors=True)
    copy.pytest("tests/batchwise", "-k", QUICK)  # collects all tests, and fails if one cannot be imported
    fit = ("fit", "--config", "tests/batchwise/digits.yaml", "--trainer.max_epochs", 1, "--trainer.logger", "false")
    assert "epoch 1  average loss " in copy.python("-m", copy.package, *fit)
