"""How well SAM's prompts find objects, and how long an answer takes.

For objects of the truth in a folder of image sets: the IoU of what a tight box finds, and of what
one click somewhere in the object's inner half finds; seconds of the first and of a later prompt.

    python tools/measure/prompts.py --data my_sets
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage.measure import label, regionprops

from napari_convlora.backbones import load_backbone
from napari_convlora.benchmark.sets import find_sets, open_set, read_sample
from napari_convlora.prediction.prompter import Prompter
from napari_convlora.prediction.prompts import Box, Click, Prompt, choose_window

_MIN_PIXELS = 80
_MIN_SOLIDITY = 0.6  # below it, a mask is rather a texture than an object


def objects(truth: np.ndarray, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Return masks (H, W) of up to `count` compact objects of any class but the first."""
    regions = label(truth * (truth > 1))
    compact = [
        r for r in regionprops(regions) if r.area >= _MIN_PIXELS and r.solidity > _MIN_SOLIDITY
    ]
    chosen = rng.permutation(len(compact))[:count]
    return [regions == compact[i].label for i in chosen]


def prompts_for(mask: np.ndarray, rng: np.random.Generator) -> dict[str, Prompt]:
    """Return a tight box around an object, and a click somewhere in its inner half."""
    rows, columns = np.nonzero(mask)
    low, high = (rows.min() - 0.5, columns.min() - 0.5), (rows.max() + 0.5, columns.max() + 0.5)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    inner = np.argwhere(depth >= depth.max() / 2)
    row, column = inner[rng.integers(len(inner))]
    click = Click(float(row), float(column))
    return {"box": Prompt(box=Box(*low, *high)), "click": Prompt((click,))}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--sets", nargs="*", help="all in the folder if absent")
    parser.add_argument("--backbone", default="litemedsam")
    parser.add_argument("--images", type=int, default=4, help="per set")
    parser.add_argument("--objects", type=int, default=4, help="per image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    backbone = load_backbone(options.backbone)
    print(f"{'set':28}{'objects':>8}{'box':>8}{'click':>8}{'first s':>9}{'box s':>8}{'click s':>8}")
    for name in options.sets or find_sets(options.data):
        rng = np.random.default_rng(options.seed)
        found = open_set(options.data / name)
        ious: dict[str, list[float]] = {"box": [], "click": []}
        seconds: dict[str, list[float]] = {"first": [], "box": [], "click": []}
        for stem in found.test[: options.images]:
            sample = read_sample(found, stem)
            prompter = Prompter(backbone, options.device)
            seen = set()
            for mask in objects(sample.truth[0], rng, options.objects):
                for kind, prompt in prompts_for(mask, rng).items():
                    window = choose_window(mask.shape, prompt.bounds, prompter.tile)
                    start = time.perf_counter()
                    answer = prompter.mask(sample.image[0][window.region], window, prompt)
                    took = time.perf_counter() - start
                    seconds[kind if window in seen else "first"].append(took)
                    seen.add(window)
                    whole = np.zeros_like(mask)
                    whole[window.region] = answer
                    ious[kind].append((whole & mask).sum() / (whole | mask).sum())
        if ious["box"]:
            numbers = [np.mean(ious[k]) for k in ("box", "click")]
            times = [np.median(seconds[k] or [np.nan]) for k in ("first", "box", "click")]
            cells = "".join(f"{x:8.2f}" for x in numbers) + f"{times[0]:9.2f}"
            cells += "".join(f"{x:8.2f}" for x in times[1:])
            print(f"{name:28}{len(ious['box']):8}{cells}", flush=True)


if __name__ == "__main__":
    main()
