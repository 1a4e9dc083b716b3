"""The engine stands alone: a project without the examples, their tests and their configurations breaks none of it."""

import shutil
from typing import Any

QUICK = (
    *("optim/test_groups.py", "callbacks/test_progress.py", "test_house.py::test_public_names"),
    "system/test_main_job.py::test_last_without_a_run_starts_afresh",
)


def test_without_examples(copy: Any) -> None:
    for path in (copy.root / "src" / copy.package).glob("*"):
        if path.name not in ("__init__.py", "__main__.py"):
            path.unlink()
    for folder in (f"tests/{copy.package}", "configs"):
        shutil.rmtree(copy.root / folder, ignore_errors=True)
    found = copy.pytest("--collect-only", "tests/batchwise")
    assert " error" not in found
    copy.pytest(*(f"tests/batchwise/{test}" for test in QUICK))
    fit = ("fit", "--config", "tests/batchwise/digits.yaml", "--trainer.max_epochs", 1, "--trainer.logger", "false")
    assert "epoch 1  average loss " in copy.python("-m", copy.package, *fit)
