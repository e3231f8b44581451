"""What the benchmarks of large images share: a tiny model of random weights, and test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import TrainConfig
from napari_convlora.events import Finished
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.training import adapt


def save_adapter(path: Path) -> None:
    """Save an adapter with three classes and tiles of 256 px, which a moment taught."""
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 1), np.uint8)
    labels = (1 + image[..., 0] // 86).astype(np.int32)
    config = TrainConfig(max_steps=2, views=2, detail_steps=50, device="cpu")
    classes = default_classes(3)
    *_, last = adapt(random_backbone(), [LabelledImage(image, labels)], classes, config=config)
    assert isinstance(last, Finished)
    adapter: Adapter = last.adapter
    replace(adapter, pixel_scale=0.25).save(path)


def save_image(path: Path, side: int) -> None:
    """Write a grey uint8 zarr of smooth blobs and noise, block by block."""
    array = zarr.create_array(path, shape=(side, side), dtype=np.uint8, chunks=(512, 512))
    rng = np.random.default_rng(side)
    columns = np.arange(side)
    for top in range(0, side, 512):
        rows = np.arange(top, min(top + 512, side))[:, None]
        waves = 128 + 80 * np.sin(rows / 37) * np.cos(columns / 53)
        noisy = waves + rng.integers(-30, 30, waves.shape)
        array[top : top + len(rows)] = noisy.clip(0, 255).astype(np.uint8)
