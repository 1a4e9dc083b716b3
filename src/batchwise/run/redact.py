"""Secrets stay out of all that a run writes: its configuration, its checkpoints and its log."""

import re
from typing import Any

_NAMES = re.compile(
    r"(.*_)?(api_?key|secret|secret_key|private_key|password|passwd|credentials?|(access|api|auth|hf|hub)_token)|token",
    re.IGNORECASE,
)
HIDDEN = "***"

_known: set[str] = set()


def redact(config: Any, key: str = "") -> Any:
    """Return a configuration of plain types, with the values of keys such as `password` or `api_key` hidden."""
    if isinstance(config, dict):
        return {name: redact(value, str(name)) for name, value in config.items()}
    if isinstance(config, list):
        return [redact(value, key) for value in config]
    if isinstance(config, str) and config and _NAMES.fullmatch(key):
        _known.add(config)
        return HIDDEN
    return config


def hide(text: str) -> str:
    """Return a text without the secrets that `redact` has seen in this process."""
    for secret in _known:
        text = text.replace(secret, HIDDEN)
    return text
