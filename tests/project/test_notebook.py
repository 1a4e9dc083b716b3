"""The notebook runs from top to bottom, in a kernel of its own, and shows what it says."""

import ast
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client import AsyncKernelManager

ROOT = Path(__file__).parents[2]


@pytest.mark.weekly
def test_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # figures age
    kernel = AsyncKernelManager(transport="ipc")  # no port
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": os.getcwd()}})
    client.execute()
    printed, results, pictures = [], [], 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.output_type == "stream":
            printed.append(output.text)
        elif output.output_type == "execute_result":
            results.append(output.data["text/plain"])
        pictures += "image/png" in output.get("data", {})
    shown = "".join(printed)
    assert len(re.findall("^ +batch_size  64$", shown, re.MULTILINE)) == 4
    assert "epoch 8  average loss" in shown
    measured, difference, wrong = map(ast.literal_eval, results)
    assert measured["test/accuracy"] > 0.9
    assert 0 < difference < 1e-9
    assert 0 < wrong < 0.1
    assert pictures == 1
    assert len(list(Path("runs/notebook").iterdir())) == 1
