"""Make data/digits/, a folder of images with a sub-folder per class: scikit-learn's handwritten digits as PNG files.

python scripts/make_folder.py [--folder data/digits]
"""

import argparse
from collections import Counter
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def main() -> None:
    """Write the 1,797 images, as data/digits/<digit>/<number>.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/digits"))
    folder = parser.parse_args().folder
    digits = load_digits()
    count: Counter[int] = Counter()
    for image, digit in zip(digits.images, digits.target, strict=True):  # type: ignore[attr-defined]
        path = folder / str(digit) / f"{count[digit]:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(path)
        count[digit] += 1
    print(f"{folder}: {count.total():,} images in {len(count)} folders")


if __name__ == "__main__":
    main()
