"""How soon a round shows something: strokes to first preview and first step, in two rounds.

    python tools/measure/rounds.py [--threads 2]

LiteMedSAM with the preset `fast` on a 512 x 512 part of the sandstone sample (enlarged) with its
strokes. The second round has one stroke more and the cache of the first. Seconds are counted from
calling `adapt` on; the backbone is loaded before.
"""

from __future__ import annotations

import argparse
import time
from importlib.resources import files

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage.io import imread
from skimage.transform import resize

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.control import RunControl
from napari_convlora.events import Finished, Preview, Step
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.training import adapt

_SIDE = 512


def sample() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1, 512, 512, 1) and strokes (1, 512, 512)."""
    folder = files("napari_convlora") / "widget" / "samples"
    image, strokes = (imread(str(folder / f"sandstone{end}.png")) for end in ("", "_strokes"))
    image = resize(image, (_SIDE, _SIDE), preserve_range=True).astype(np.uint8)
    strokes = resize(strokes, (_SIDE, _SIDE), order=0, preserve_range=True).astype(np.int32)
    return image.reshape(1, _SIDE, _SIDE, 1), strokes[None]


def begin(
    backbone: Backbone, image: np.ndarray, strokes: np.ndarray, cache: FeatureCache
) -> dict[str, float]:
    """Seconds to the first preview, the first step, and between the first steps, of one round."""
    control, seconds = RunControl(), dict[str, float]()
    start = time.perf_counter()
    config = TrainConfig(max_steps=6)
    scene = [LabelledImage(image, strokes)]
    for event in adapt(
        backbone, scene, default_classes(4), config=config, control=control, cache=cache
    ):
        now = time.perf_counter() - start
        if isinstance(event, Preview):
            seconds.setdefault("first preview", now)
        elif isinstance(event, Step):
            seconds.setdefault("first step", now)
        elif isinstance(event, Finished):
            seconds["six steps"] = now
    return seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    backbone, cache = load_backbone("litemedsam"), FeatureCache()
    image, strokes = sample()
    first = begin(backbone, image, strokes, cache)
    strokes[0, 40:46, 100:180] = 2
    second = begin(backbone, image, strokes, cache)
    table = Table("", "first round", "second round", "second / first")
    for name, seconds in first.items():
        table.add_row(
            name, f"{seconds:.1f} s", f"{second[name]:.1f} s", f"{second[name] / seconds:.2f}x"
        )
    console = Console()
    console.print(table)
    console.print(f"{len(cache)} features and embeddings kept, {cache.nbytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
