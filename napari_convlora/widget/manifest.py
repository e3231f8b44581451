"""What the manifest names besides the widget: the labels writer and the sample data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from napari.utils.notifications import show_info
from PIL import Image

from napari_convlora.config import CLASSES_FILE, MAX_CLASSES, ClassInfo
from napari_convlora.exports.masks import save_masks
from napari_convlora.files.atomic import atomic_write
from napari_convlora.labels.classes import DEFAULT_COLOURS, default_classes
from napari_convlora.widget.layers.class_colours import attributes, complete_classes, known_classes

LayerData = tuple[np.ndarray, dict[str, Any], str]
SAMPLES = Path(__file__).parent / "samples"
SAMPLE_CLASSES: dict[str, tuple[str, ...]] = {
    "sandstone": ("pores", "quartz", "clay", "heavy minerals"),
    "nuclei": ("background", "nucleus"),
}
"""Class names by sample, from id 1."""


def write_labels(path: str, data: Any, meta: dict[str, Any]) -> list[str]:
    """Write a Labels layer as class masks, and its class table beside it; see `save_masks`.

    napari may choose this writer for any Labels layer, so an instance map, whose ids go beyond
    those of classes, is written as a plain TIFF.
    """
    labels = np.asarray(data[0] if isinstance(data, (list, tuple)) else data)
    tiff = Path(path).suffix.lower() in (".tif", ".tiff")
    if tiff and labels.size and (labels.min() < 0 or labels.max() > MAX_CLASSES):
        with atomic_write(path) as file:
            tifffile.imwrite(file, labels, photometric="minisblack", compression="zlib")
        return [path]
    ids = np.unique(labels)
    planes = labels.reshape(-1, *labels.shape[-2:]) if labels.ndim > 2 else labels
    classes = complete_classes(known_classes(meta), ids[ids > 0].tolist())
    table = save_masks(planes, path, classes or default_classes(1))
    if table.name != CLASSES_FILE:
        show_info(
            f"The class names of {Path(path).name} are in {table.name}, which counts before the "
            f"{CLASSES_FILE} of other masks there."
        )
    return [path]


def sandstone() -> list[LayerData]:
    """Return a slice of sandstone in micro-CT, and strokes of four classes."""
    return _sample("sandstone")


def nuclei() -> list[LayerData]:
    """Return stained nuclei in tissue, and strokes of two classes."""
    return _sample("nuclei")


def sample_classes(name: str) -> tuple[ClassInfo, ...]:
    """Return the class table of a sample."""
    names = enumerate(SAMPLE_CLASSES[name], 1)
    return tuple(ClassInfo(i, title, DEFAULT_COLOURS[i - 1]) for i, title in names)


def _sample(name: str) -> list[LayerData]:
    image, strokes = (_read(f"{name}{end}.png") for end in ("", "_strokes"))
    painted = {
        "name": "annotations",
        "opacity": 0.7,
        **attributes(sample_classes(name), "annotations", name),
    }
    return [(image, {"name": name}, "image"), (strokes.astype(np.int32), painted, "labels")]


def _read(name: str) -> np.ndarray:
    with Image.open(SAMPLES / name) as image:
        return np.array(image)
