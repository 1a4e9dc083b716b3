"""Secrets are in nothing that a run leaves behind."""

from pathlib import Path

import pytest
from helpers import DIGITS, run_process, wandb_records

from batchwise.run import redact

SECRETS = {"WANDB_API_KEY": "a1b2" * 10, "password": "hunter2hunter2", "api_key": "sk-0123456789"}
LOADER = """
from batchwise.sources.digits import Digits

class Remote(Digits):
    def __init__(self, password: str, options: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        assert password == "hunter2hunter2" and options["api_key"] == "sk-0123456789"
"""


@pytest.mark.parametrize("key", ["token", "password", "api_key", "apikey", "db_password", "HF_TOKEN", "client_secret"])
def test_names_of_secrets(key: str) -> None:
    assert redact.redact({"a": [{key: "x y"}]}) == {"a": [{key: redact.HIDDEN}]}
    assert redact.hide("no x y here") == "no *** here"


@pytest.mark.parametrize("key", ["pad_token", "tokens", "tokenizer", "key", "keys", "num_tokens", "secretary"])
def test_names_of_other_things(key: str) -> None:
    assert redact.redact({key: "x"}) == {key: "x"}


@pytest.mark.slow
def test_no_secret_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "remote.py").write_text(LOADER)
    settings = ("--data", "remote.Remote", "--data.batch_size", 64, "--data.options", '{"api_key": "sk-0123456789"}')
    run = ("fit", *DIGITS, *settings, "--data.password", SECRETS["password"], "--trainer.max_steps")
    environment = {"PYTHONPATH": str(tmp_path), "WANDB_API_KEY": SECRETS["WANDB_API_KEY"]}
    first = run_process(*run, 2, **environment)
    assert first.code == 0, first.err
    resumed = run_process(*run, 4, "--ckpt_path", "last", **environment)
    assert resumed.code == 0, resumed.err
    files = [path for path in first.folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt"} <= {path.name for path in files}
    (log, _) = sorted(path for path in files if path.suffix == ".wandb" and "latest" not in str(path))
    kept = [record.environment.args for record in wandb_records(log) if record.HasField("environment")]
    assert "--data.password ***" in " ".join(kept[0])  # of the command line, which W&B keeps
    for secret in SECRETS.values():
        assert secret not in first.out + first.err + resumed.out + resumed.err
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert "password: '***'" in (first.folder / "config.yaml").read_text()
