"""W&B never stops training."""

import socket
from pathlib import Path
from typing import Any

import pytest
from helpers import DIGITS, run_here

import project.logger

ONLINE = (*DIGITS, "--config", "configs/overlays/wandb_online.yaml", "--trainer.max_epochs", 1)


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def goes_offline(*words: str) -> None:
    result = run_here("fit", *ONLINE)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("W&B: ")]
    assert "logging offline" in line
    assert all(word in line for word in words)
    assert "epoch 1 " in result.out
    assert len(list(result.folder.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_without_a_key() -> None:
    goes_offline("API key")


def test_with_a_key_and_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(project.logger, "INIT_TIMEOUT", 2)
        goes_offline()


def test_a_failure_in_training_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger.log_metrics", fail)
    result = run_here("fit", *DIGITS, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert result.out.count("W&B failed (No space left on device): training goes on") == 1
    assert "epoch 2 " in result.out
