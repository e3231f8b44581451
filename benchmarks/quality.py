"""Quality of one fast round against a random forest on the same labels.

Two tasks per set: ``unseen`` learns from three fully annotated images and is scored on the set's
test images; ``strokes`` learns from about five per cent of one image and is scored on all of it.

    python benchmarks/quality.py --data DIR --sets wbc_blood_smear --tasks unseen strokes

Every set under DIR holds images/, masks/ (class ids from 0) and meta.json with a suggested split.
The forest is ilastik's way: 100 trees on scikit-image's multiscale_basic_features.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_erosion
from sklearn.ensemble import RandomForestClassifier

from napari_convlora import LabelledImage, ModelConfig, TrainConfig, adapt, load_backbone, predict
from napari_convlora.annotations import default_classes
from napari_convlora.backbones import Backbone
from napari_convlora.data import Normalizer
from napari_convlora.detail import filter_bank
from napari_convlora.events import Failed, Finished
from napari_convlora.files import read_image, read_labels
from napari_convlora.metrics import confusion, scores
from napari_convlora.prediction import Returning

_FOREST_PIXELS = 50_000


@dataclass(frozen=True)
class Sample:
    """An image (1, H, W, C) and its truth (1, H, W), ids from 1, 0 = void."""

    image: np.ndarray
    truth: np.ndarray


def read_set(folder: Path, stems: list[str]) -> Iterator[Sample]:
    """Read images of a set; ids are shifted so that 0 means void, unless 0 already does."""
    names = json.loads((folder / "meta.json").read_text())["classes"]
    shift = 0 if "void" in str(names.get("0", "")) else 1
    for stem in stems:
        (path,) = (folder / "images").glob(f"{stem}.*")
        yield Sample(read_image(path), read_labels(folder / "masks" / f"{stem}.png") + shift)


def strokes(truth: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Paint straight strokes, 3 pixels wide, over about `share` of every class."""
    rng = np.random.default_rng(seed)
    painted = np.zeros_like(truth)
    for c in np.unique(truth[truth > 0]):
        region = truth[0] == c
        core = binary_erosion(region, iterations=2)
        core = core if core.any() else region
        points, own = np.argwhere(core), np.zeros_like(region)
        for _ in range(500):
            if own.sum() >= share * region.sum():
                break
            row, column = points[rng.integers(len(points))]
            angle = rng.uniform(0, np.pi)
            for t in np.arange(-20, 20, 0.5):
                y, x = int(row + t * np.sin(angle)), int(column + t * np.cos(angle))
                if 1 <= y < len(region) - 1 and 1 <= x < region.shape[1] - 1 and core[y, x]:
                    near = np.s_[y - 1 : y + 2, x - 1 : x + 2]
                    own[near] |= region[near]
        painted[0][own] = c
    return painted


def ours(
    backbone: Backbone, train: list[LabelledImage], test: list[Sample], n: int, options
) -> tuple[float, float]:
    """Mean IoU on `test` after one round, and the seconds the round took."""
    start = time.perf_counter()
    last = None
    config = TrainConfig(preset=options.preset, seed=options.seed, max_steps=options.max_steps)
    for last in adapt(backbone, train, default_classes(n), ModelConfig(options.method), config):
        if isinstance(last, Failed):
            raise SystemExit(last.message)
    assert isinstance(last, Finished)
    seconds = time.perf_counter() - start
    total = np.zeros((n, n), np.int64)
    for sample in test:
        steps = Returning(predict(last.adapter, backbone, sample.image))
        for _ in steps:
            pass
        total += confusion(steps.value.labels, sample.truth, n)
    return float(scores(total, range(1, n + 1)).mean_iou), seconds


def forest(
    train: list[LabelledImage], test: list[Sample], n: int, seed: int
) -> tuple[float, float]:
    """Mean IoU of a random forest on the same labels, and the seconds it took to fit."""
    start = time.perf_counter()
    normalizer = Normalizer.fit([image.image for image in train])
    features, labels = [], []
    for image in train:
        labelled = image.annotations[0] > 0
        features.append(filter_bank(normalizer(image.image[0]))[labelled])
        labels.append(image.annotations[0][labelled])
    x, y = np.concatenate(features), np.concatenate(labels)
    pick = np.random.default_rng(seed).permutation(len(y))[:_FOREST_PIXELS]
    trees = RandomForestClassifier(100, n_jobs=-1, random_state=seed).fit(x[pick], y[pick])
    seconds = time.perf_counter() - start
    total = np.zeros((n, n), np.int64)
    for sample in test:
        found = filter_bank(normalizer(sample.image[0]))
        labels_found = trees.predict(found.reshape(-1, found.shape[-1]))
        labels_found = labels_found.reshape(sample.truth.shape).astype(np.int32)
        total += confusion(labels_found, sample.truth, n)
    return float(scores(total, range(1, n + 1)).mean_iou), seconds


def main() -> None:
    """Print one line per set and task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("NAPARI_CONVLORA_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--tasks", nargs="+", choices=("unseen", "strokes"), default=["unseen"])
    parser.add_argument("--images", type=int, default=3, help="annotated images for 'unseen'")
    parser.add_argument("--test-images", type=int, help="default: all of the test split")
    parser.add_argument("--share", type=float, default=0.05, help="painted share for 'strokes'")
    parser.add_argument("--backbone", default="litemedsam")
    parser.add_argument("--method", default="conv_lora")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--max-steps", type=int, default=TrainConfig().max_steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    backbone = load_backbone(options.backbone)
    print(
        f"{'set':28} {'task':8} {options.method:>10} {'forest':>8} {'seconds':>8} {'forest s':>8}"
    )
    for name in options.sets:
        split = json.loads((options.data / name / "meta.json").read_text())["suggested_split"]
        for task in options.tasks:
            if task == "unseen":
                known = list(read_set(options.data / name, split["train"][: options.images]))
                train = [LabelledImage(s.image, s.truth) for s in known]
                test = list(read_set(options.data / name, split["test"][: options.test_images]))
            else:
                test = list(read_set(options.data / name, split["train"][:1]))
                painted = strokes(test[0].truth, options.share, options.seed)
                train = [LabelledImage(test[0].image, painted)]
            n = max(int(a.max()) for a in [s.truth for s in test] + [i.annotations for i in train])
            score, seconds = ours(backbone, train, test, n, options)
            base, base_seconds = forest(train, test, n, options.seed)
            print(
                f"{name:28} {task:8} {score:10.3f} {base:8.3f} {seconds:8.0f} {base_seconds:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
