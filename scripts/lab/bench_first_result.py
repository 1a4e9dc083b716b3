"""The time to a first result, from the shell prompt to the exit: 20 epochs on the digits, in whole processes.

Against a careful user's plain PyTorch script with the same network, batch and optimizer, scikit-learn's MLPClassifier,
and Keras on PyTorch (where it is installed). Ours also validates, logs and keeps checkpoints.

    python scripts/lab/bench_first_result.py
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec

import bench

PLAIN = """
import torch
from sklearn.datasets import load_digits
from torch import nn
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(digits)
order = torch.randperm(len(x))
train, val = order[:1259], order[1259:1528]
x = (x - x[train].mean()) / x[train].std()
network = nn.Sequential(nn.Linear(64, 512), nn.LayerNorm(512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(network.parameters(), lr=0.003, weight_decay=0.05, fused=True)
for epoch in range({epochs}):
    network.train()
    for index in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(network(x[index]), y[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        print(epoch, loss.item(), (network(x[val]).argmax(1) == y[val]).float().mean().item())
torch.save(network.state_dict(), "network.pt")
"""
SKLEARN = """
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
images, digits = load_digits(return_X_y=True)
network = MLPClassifier((512,), batch_size=64, learning_rate_init=0.003, max_iter={epochs}, n_iter_no_change=99)
network.fit(images[:1259] / 16, digits[:1259])
print(network.score(images[1259:1528] / 16, digits[1259:1528]))
"""
KERAS = """
import keras
from sklearn.datasets import load_digits
images, digits = load_digits(return_X_y=True)
layers = keras.layers
network = keras.Sequential(
    [layers.Dense(512), layers.LayerNormalization(), layers.ReLU(), layers.Dropout(0.2), layers.Dense(10)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
network.compile(optimizer=keras.optimizers.AdamW(0.003, weight_decay=0.05), loss=loss, metrics=["accuracy"])
network.fit(
    images[:1259] / 16, digits[:1259], batch_size=64, epochs={epochs}, verbose=2,
    validation_data=(images[1259:1528] / 16, digits[1259:1528]),
)
"""


def process(*command: str) -> Callable[[], float]:
    """Return a function that runs a process in a folder of its own and returns its seconds."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            environment = os.environ | {"KERAS_BACKEND": "torch", "WANDB_MODE": "offline"}
            subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True)
            return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    epochs = max(1, int(20 * given.scale))
    fit = (*bench.FIT, "--trainer.max_epochs", str(epochs))
    alternatives = {
        "plain PyTorch script": process("-c", PLAIN.format(epochs=epochs)),
        "import lightning.pytorch, and nothing else": process("-c", "import lightning.pytorch"),
        "ours, CSV log": process(*fit, *bench.CSV),
        "ours, W&B offline (the default)": process(*fit),
        "scikit-learn's MLPClassifier": process("-c", SKLEARN.format(epochs=epochs)),
    }
    if find_spec("keras"):
        alternatives["Keras on PyTorch"] = process("-c", KERAS.format(epochs=epochs))
    measured = bench.interleave(alternatives, given.pairs)
    title = f"{epochs} epochs on the digits, from prompt to exit"
    bench.save(given.json, {title: bench.report(title, "seconds", measured, "plain PyTorch script")})


if __name__ == "__main__":
    main()
