"""The worth of pretrained weights with few examples: digits 5 to 9 from 10 images each, after digits 0 to 4.

Each seed has its own initial weights, order, split and images. Each alternative but "from scratch" begins with the
weights that were pretrained with its seed, and a new last layer. Accuracy is that of the last weights, on the test
images of 5 to 9 (about 134), in percent. All have the learning rate of transfer.yaml.

    python scripts/lab/study_transfer.py

The digits are so easy that pretraining is worth nothing for this perceptron, and freezing layers costs accuracy:

    mean and std over 10 seeds, after                       3 epochs   10 epochs   60 epochs
    from scratch                                          82.3  4.2   93.1  2.8   94.5  2.3
    pretrained, all layers learn                          78.2  8.2   92.8  2.0   94.0  2.1
    pretrained, first layers at 0.3 of the rate           70.1  7.5   90.1  3.4   93.9  2.1
    pretrained, first layers frozen                       63.0  7.3   86.7  3.4   91.5  3.1
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
from pathlib import Path

import torch

from batchwise.run.main import main as batchwise

CONFIG = str(Path(__file__).with_name("transfer.yaml"))
PRETRAIN = {
    "model.init_from": "null",
    "model.network.num_classes": "10",  # so that the last layer does not fit, and begins anew
    "data.classes": "[0, 1, 2, 3, 4]",
    "data.examples_per_class": "null",
    "data.batch_size": "64",
    "trainer.max_epochs": "15",
}
ALTERNATIVES = {
    "from scratch": {"model.init_from": "null"},
    "pretrained, all layers learn": {},
    "pretrained, first layers at 0.3 of the rate": {"model.lr_factors": "{'layers.[12]': 0.3}"},
    "pretrained, first layers frozen": {"model.freeze": "['layers.[12]']"},
}


def run(verb: str, **settings: str) -> str:
    """Run a command; return its output."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = batchwise("batchwise", [verb, "--config", CONFIG, *flags])
    if code:
        raise SystemExit(code)
    return out.getvalue()


def study(seeds: int, epochs: list[int]) -> dict[str, list[list[float]]]:
    """Return the test accuracies of each alternative in percent, as lists [epochs][seeds]."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in epochs] for name in ALTERNATIVES}
    for seed in range(seeds):
        common = {"seed_everything": str(seed), "data.split_seed": str(seed)}
        run("fit", name="pretrain", **common, **PRETRAIN)
        for name, settings in ALTERNATIVES.items():
            for length, column in zip(epochs, found[name], strict=True):
                given = {"name": "fine", **common, **settings, "trainer.max_epochs": str(length)}
                run("fit", **given)
                measured = run("test", ckpt_path="last", **given)
                column.append(100 * float(re.findall(r"test/accuracy ([\d.]+)", measured)[0]))
    return found


def main() -> None:
    """Run the study and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[3, 10, 60], help="lengths of the training after pretraining"
    )
    parser.add_argument("--json", type=Path, help="file for the accuracies")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = study(given.seeds, given.epochs)
    print(f"{f'mean and std over {given.seeds} seeds, after':<52}", *(f"{n:>5} epochs" for n in given.epochs))
    for name, columns in found.items():
        cells = [
            f"{statistics.mean(each):>6.1f} {statistics.stdev(each) if len(each) > 1 else 0:>4.1f} " for each in columns
        ]
        print(f"{name:<52}", *cells)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
