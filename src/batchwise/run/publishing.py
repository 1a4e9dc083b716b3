"""Publishes an exported model with a card and its configuration: on the Hugging Face hub, or in a folder."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batchwise.batching.structure import shape
from batchwise.errors import optional
from batchwise.host import check_writable, naming

USE = {
    ".pt2": """import torch

model = torch.export.load("{file}").module()
""",
    ".onnx": """import onnxruntime

model = onnxruntime.InferenceSession("{file}")
""",
}
CARD = """---
library_name: {library}
tags: [batchwise]
---

# {name}

`{file}` takes inputs of shape {shape}, any number of them, and gives {outputs}. The `transform` of the data is in it,
and as `learnt.json` what training has learnt from them. `config.yaml` is the configuration of the training.

{scores}
```python
{use}```
"""


def check(where: str) -> None:
    """Raise ValueError if nothing can be published there. Make the folder around one that is to be written."""
    if is_folder(where):
        if os.path.exists(os.path.expanduser(where)):
            raise ValueError(f"push {where} exists: write a folder that does not")
        check_writable("push", Path(where).expanduser())
    elif where.count("/") != 1 or not all(where.split("/")):
        raise ValueError(f"push is {where}: write OWNER/NAME of the Hugging Face hub, or a folder such as ./{where}")
    elif optional("huggingface_hub", "hub").get_token() is None:
        raise ValueError(f"push {where}: there is no token of the hub: write HF_TOKEN=..., or run `hf auth login`")


def is_folder(where: str) -> bool:
    """Return whether this is the path of a folder, and not a repository of the hub."""
    return where.startswith((".", "/", "~"))


def publish(file: Path, config: Path, checkpoint: dict[str, Any], inputs: Any, outputs: list[str], where: str) -> str:
    """Publish the file with a card and the configuration. A repository that is new is private.

    Args:
        file: exported from the checkpoint.
        config: the configuration of its run, if there is such a file.
        checkpoint: the content of its file, which has the best scores.
        inputs: examples, whose shape the card tells.
        outputs: names of the columns.
        where: OWNER/NAME of the hub, or the path of a folder.

    Returns:
        Where it can be found.

    Raises:
        ValueError: the hub does not take it.
    """
    target = Path(where).expanduser() if is_folder(where) else None
    with TemporaryDirectory(dir=target and target.parent, prefix=".") as name:
        folder = Path(name, "card")
        folder.mkdir()
        for one in (file, config) if config.exists() else (file,):
            with naming((target or folder) / one.name):
                shutil.copy(one, folder)
        card = CARD.format(
            library="pytorch" if file.suffix == ".pt2" else "onnx",
            name=Path(where).name,
            file=file.name,
            shape=shape(inputs),
            outputs=", ".join(f"`{output}`" for output in outputs),
            scores=_scores(checkpoint),
            use=USE[file.suffix].format(file=file.name),
        )
        (folder / "README.md").write_text(card)
        if target:
            folder.rename(target)
            return os.path.expanduser(where)
        try:
            api = optional("huggingface_hub", "hub").HfApi()
            api.create_repo(where, private=True, exist_ok=True)
            return str(
                api.upload_folder(repo_id=where, folder_path=folder, commit_message=f"Export {file.name}").commit_url
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"push {where}: {lines[0]}; {file} is written") from error


def _scores(checkpoint: dict[str, Any]) -> str:
    """Return a table of the best scores in training."""
    states = [state for state in checkpoint["callbacks"].values() if state.get("best_model_score") is not None]
    rows = [f"| {state['monitor']} | {float(state['best_model_score']):.4f} |" for state in states]
    return "\n".join(["| best in training | |", "|---|---|", *rows, ""]) if rows else ""
