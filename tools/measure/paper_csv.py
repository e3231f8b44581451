"""Write train.csv, val.csv and test.csv for ``napari-convlora benchmark paper``.

    python tools/measure/paper_csv.py SET --out DIR

SET holds images/, masks/ (the same stems) and meta.json with a suggested split into train and
test; every fourth training image becomes validation. Without meta.json, images are dealt out 8:1:1
in a random order that --seed chooses.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from pathlib import Path


def split_stems(folder: Path, stems: list[str], seed: int) -> dict[str, list[str]]:
    """Return the stems of each split."""
    meta = folder / "meta.json"
    if meta.exists():
        split = json.loads(meta.read_text())["suggested_split"]
        train = [s for i, s in enumerate(split["train"]) if i % 4 != 3]
        return {"train": train, "val": split["train"][3::4], "test": split["test"]}
    stems = random.Random(seed).sample(sorted(stems), len(stems))
    tenth = len(stems) // 10
    return {"val": stems[:tenth], "test": stems[tenth : 2 * tenth], "train": stems[2 * tenth :]}


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = {path.stem: path for path in (options.set / "images").iterdir()}
    masks = {path.stem: path for path in (options.set / "masks").iterdir()}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, stems in split_stems(options.set, list(images), options.seed).items():
        with (options.out / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "label"])
            for stem in stems:
                pair = images[stem], masks[stem]
                table.writerow([os.path.relpath(p, options.out) for p in pair])
        print(f"{name}: {len(stems)} images")


if __name__ == "__main__":
    main()
