"""Make data/wine.csv and data/diabetes.csv, real tables that come with scikit-learn: a class, and a number to predict.

python scripts/make_table.py [--folder data]
"""

import argparse
import csv
from pathlib import Path

from sklearn.datasets import load_diabetes, load_wine


def main() -> None:
    """Write the two files, with the names of the columns in the first line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    wine, diabetes = load_wine(), load_diabetes(scaled=False)
    cultivars = [f"cultivar {number}" for number in "ABC"]
    tables = {
        "wine.csv": (wine, "cultivar", [cultivars[number] for number in wine.target]),  # type: ignore[attr-defined]
        "diabetes.csv": (diabetes, "progression", diabetes.target),  # type: ignore[attr-defined]
    }
    for name, (data, target, values) in tables.items():
        with (folder / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([*data.feature_names, target])
            rows.writerows([*row, value] for row, value in zip(data.data, values, strict=True))
        print(f"{folder / name}: {len(values)} rows")


if __name__ == "__main__":
    main()
