"""Evaluation counts every example exactly once, on any number of devices; `predict` gives one row each, in order."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import Result, run_here, run_process

pytestmark = pytest.mark.slow

MODULE = """
import json
import os
from pathlib import Path
import torch
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification


class Few(Digits):
    "101 images to evaluate on."

    def load(self, split):
        images, digits = super().load(split)
        return (images, digits) if split == "train" else (images[:101], digits[:101])


class Confused(Classification):
    "Writes its confusion matrix."

    def record(self, values):
        for table in self._measures.tables.values():
            matrix = table.tolist()
            figures = {key: value.item() for key, value in values.items()}
            path = Path(os.environ["CONFUSION"], f"confusion.{self.global_rank}.json")
            path.write_text(json.dumps([matrix, figures]))
        super().record(values)
"""


@pytest.fixture(scope="module")
def evaluated(trained: Result, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple]]:
    """Test and predict with 1, 2 and 3 processes: confusion matrix, figures, rows of the predictions."""
    home, results = tmp_path_factory.mktemp("evaluation"), {}
    (home / "few_digits.py").write_text(MODULE)
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    config["data"]["class_path"] = "few_digits.Few"
    config["data"]["init_args"]["eval_batch_size"] = 20
    config["model"]["class_path"] = "few_digits.Confused"
    config["trainer"]["logger"] = False
    (home / "few.yaml").write_text(yaml.safe_dump(config))
    checkpoint = home / "last.ckpt"
    checkpoint.write_bytes((trained.folder / "checkpoints" / "last.ckpt").read_bytes())
    environment = {"PYTHONPATH": str(home), "CONFUSION": str(home), "OMP_NUM_THREADS": "1"}
    os.environ["CONFUSION"] = str(home)
    sys.path.insert(0, str(home))
    for devices, commands in {1: ("test", "predict"), 2: ("test",), 3: ("test", "predict")}.items():
        root = home / str(devices)
        split = ("--trainer.devices", devices, "--trainer.strategy", "ddp") if devices > 1 else ()
        common = ("--config", home / "few.yaml", "--ckpt_path", checkpoint, "--trainer.default_root_dir", root, *split)
        for command in commands:
            done = run_process(command, *common, **environment) if devices > 1 else run_here(command, *common)
            assert done.code == 0, done.err
        per_rank = [json.loads((home / f"confusion.{rank}.json").read_text()) for rank in range(devices)]
        assert all(found == per_rank[0] for found in per_rank)  # every device knows the same
        rows = [list(csv.DictReader(path.open())) for path in root.glob("*/*/predictions.csv")]
        results[devices] = (*per_rank[0], *rows)
    yield results
    sys.path.remove(str(home))


@pytest.mark.parametrize("devices", [2, 3])
def test_the_confusion_matrix_is_that_of_one_process(evaluated: dict[int, Any], devices: int) -> None:
    matrix, figures = evaluated[devices][:2]
    assert matrix == evaluated[1][0]
    assert sum(map(sum, matrix)) == 101
    assert figures == pytest.approx(evaluated[1][1], abs=1e-6)
    assert figures["test/accuracy"] == pytest.approx(sum(matrix[digit][digit] for digit in range(10)) / 101, abs=1e-7)


def test_predictions_have_one_row_per_example_in_order(evaluated: dict[int, Any]) -> None:
    one, three = evaluated[1][2], evaluated[3][2]
    assert [int(row["example"]) for row in one] == list(range(101))
    assert [(row["example"], row["predicted"]) for row in three] == [(row["example"], row["predicted"]) for row in one]
