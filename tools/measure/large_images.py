"""Memory and time per pixel of predicting images of growing size, with a tiny random backbone.

    python tools/measure/large_images.py --sizes 5120 10240 20480 [--at-most 900]

Every image is a zarr of random uint8, predicted in a process of its own into a tiled TIFF. Memory
is the peak above what that process held before, with everything imported and the model loaded.
The floor is the time that the tiles and the filter responses take that no way of cutting the image
into blocks can do without, measured on a sample: each tile once, each pixel's filters once.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from common_large import save_adapter, save_image

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.control import RunControl
from napari_convlora.formats.opening import open_image
from napari_convlora.images.regions import plan_blocks
from napari_convlora.images.tiles import Tile
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.detail_branch import filter_bank
from napari_convlora.prediction import to_file
from napari_convlora.prediction.predict import ready_scorer
from napari_convlora.prediction.region_scorer import Scorer


def floor_seconds(scorer: Scorer) -> float:
    """Seconds that the necessary tiles and filters of the whole image take."""
    blocks = plan_blocks(scorer.image.shape)
    corners = sorted({corner for b in blocks for corner in scorer.corners(b)})
    plane = scorer.image[0]
    start = time.perf_counter()
    sample = corners[:: max(1, len(corners) // 40)]
    for corner in sample:
        found = scorer._tile(plane, corner, ("head", "context"))
    tiles = (time.perf_counter() - start) / len(sample) * len(corners)
    assert scorer.model.detail is not None
    start = time.perf_counter()
    sample_blocks = blocks[:: max(1, len(blocks) // 8)]
    for block in sample_blocks:
        features = filter_bank(scorer.normalizer(plane[block.rows, block.columns]))
        context = [Tile(*c, scorer.side, found["context"]) for c in scorer.corners(block)]
        scorer.model.detail.logits(features, context, block.rows, block.columns)
    return tiles + (time.perf_counter() - start) / len(sample_blocks) * len(blocks)


def measure(folder: Path, side: int, at_most: float) -> None:
    """Predict one image and print what it took as JSON; runs in a process of its own."""
    torch.set_num_threads(1)
    paths = folder / "a.safetensors", folder / f"{side}.zarr"
    adapter, backbone, image = Adapter.load(paths[0]), random_backbone(), open_image(paths[1])
    task = to_file.task(*paths, "random_tiny", "cpu")
    scorer = ready_scorer(adapter, backbone, image, device="cpu")
    necessary = len({c for b in plan_blocks(image.shape) for c in scorer.corners(b)})
    idle = psutil.Process().memory_info().rss
    start = time.perf_counter()
    control, computed, share = RunControl(), 0, 0.0
    for step in to_file.predict_file(task, adapter, backbone, image, folder / "out.tif", control):
        computed, share = computed + 1, step.done / step.total
        if time.perf_counter() - start > at_most:
            control.stop()
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    floor = floor_seconds(scorer)
    print(json.dumps([share, seconds, share * floor, peak / 1e6, computed / share / necessary]))


def main() -> None:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5120, 10240, 20480])
    parser.add_argument(
        "--at-most", type=float, default=float("inf"), metavar="S", help="seconds for each size"
    )
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder, options.measure, options.at_most)
        return
    print("| side | part | s | s per Mpx | floor, s per Mpx | MB above idle | tiles / necessary |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(folder / "a.safetensors")
        for side in options.sizes:
            save_image(folder / f"{side}.zarr", side)
            command = [sys.executable, __file__, "--measure", str(side), "--folder", name]
            command += ["--at-most", str(options.at_most)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            share, seconds, floor, peak, ratio = json.loads(done.stdout)
            mega = share * side**2 / 1e6
            print(
                f"| {side} | {share:.0%} | {seconds:.0f} | {seconds / mega:.2f} "
                f"| {floor / mega:.2f} | {peak:.0f} | {ratio:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
