"""`export --push`: what is published is the file, a card and the configuration; the hub's own client sends it."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from helpers import DIGITS, Result, run_here
from huggingface_hub import constants, hf_api

from batchwise.sources.digits import Digits


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks for, and what was sent to it."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.send_response(401)
            self.send_header("x-error-message", "Invalid username or password.")
            self.end_headers()
            return
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            answer = {"url": "http://127.0.0.1/me/digits", "id": "me/digits"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"success": True, "commitUrl": "http://127.0.0.1/me/digits/commit/1", "commitOid": "1"}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    Hub.files, Hub.created = {}, []
    yield Hub
    server.shutdown()


def push(trained: Result, where: str, *more: str) -> Result:
    checkpoint = trained.folder / "checkpoints" / "best.ckpt"
    return run_here("export", *DIGITS, "--ckpt_path", checkpoint, "--push", where, "--path", "digits.pt2", *more)


def is_whole(files: dict[str, bytes]) -> None:
    assert files.keys() == {"digits.pt2", "config.yaml", "README.md"}
    Path("again.pt2").write_bytes(files["digits.pt2"])
    pixels, digits = Digits().load("test")  # type: ignore[misc]
    found = torch.export.load("again.pt2").module()(pixels)["predicted"]
    assert (found == digits).float().mean() > 0.95
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "pytorch", "tags": ["batchwise"]}
    assert "inputs of shape [1, 8, 8]" in card
    assert "gives `predicted`, `probability`" in card
    assert "| val/accuracy | 0.9" in card
    assert yaml.safe_load(files["config.yaml"])["name"] == "digits"


@pytest.mark.slow
def test_a_folder(trained: Result) -> None:
    result = push(trained, "./published/digits")
    assert result.code == 0, result.err
    assert "published: ./published/digits" in result.out
    is_whole({path.name: path.read_bytes() for path in Path("published/digits").iterdir()})
    again = push(trained, "./published/digits", "--force", "true")
    assert again.code == 2
    assert "push ./published/digits exists: write a folder that does not" in again.err


@pytest.mark.slow
def test_the_hub(trained: Result, hub: type[Hub]) -> None:
    result = push(trained, "me/digits")
    assert result.code == 0, result.err
    assert "published: http://127.0.0.1/me/digits/commit/1" in result.out
    (created,) = hub.created
    assert created["name"] == "digits"
    assert created.get("visibility") == "private" or created.get("private") is True
    is_whole(hub.files)


@pytest.mark.slow
def test_a_wrong_token(trained: Result, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = push(trained, "me/digits")
    assert result.code == 2
    assert result.err.startswith("error: push me/digits: ")
    assert result.err.endswith("; digits.pt2 is written\n")
    assert len(result.err.splitlines()) == 1
    assert hub.files == {}


def test_where_it_cannot_go(trained: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    for where, words in (
        ("digits", r"push is digits: write OWNER/NAME of the Hugging Face hub, or a folder such as ./digits"),
        ("me/digits", r"push me/digits: there is no token of the hub: write HF_TOKEN=..., or run `hf auth login`"),
    ):
        result = push(trained, where)
        assert (result.code, result.err) == (2, f"error: {words}\n")
    assert not Path("digits.pt2").exists()
