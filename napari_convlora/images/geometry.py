"""Axes of stored images: which are planes, rows, columns and channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.images.planes import LazyPlanes, lazy_planes, to_planes


def is_unclear(axes: str) -> bool:
    """Whether tifffile's letters do not tell what is a plane, a row, a column and a channel."""
    counted = set(axes) & set("QI") and not set(axes) & set("SC")
    return bool(counted) or not {"Y", "X"} <= set(axes)


def order_axes(array: np.ndarray, axes: str) -> np.ndarray:
    """Return (P, H, W, C) from an array and tifffile's letter for each of its axes."""
    if is_unclear(axes):
        return to_planes(array)
    # Beside RGB samples, a C axis counts separate pictures.
    channel = next((letter for letter in "SC" if letter in axes), "")
    rest = [i for i, letter in enumerate(axes) if letter not in f"YX{channel}"]
    order = [*rest, axes.index("Y"), axes.index("X")]
    if channel:
        return to_planes(array.transpose(*order, axes.index(channel)), rgb=True)
    return to_planes(array.transpose(order), rgb=False)


def planes_by_letters(source: Any, letters: str, path: Path, alpha: bool = False) -> LazyPlanes:
    """Planes of an array in a file, of which a letter is known for each axis."""
    name = f"'{path}'"
    if is_unclear(letters):
        return lazy_planes(source, name=name)
    channel = next((letters.index(letter) for letter in "SC" if letter in letters), None)
    y, x = letters.index("Y"), letters.index("X")
    leading = tuple(a for a in range(len(letters)) if a not in (y, x, channel))
    n_channels = 1 if channel is None else source.shape[channel] - alpha
    return LazyPlanes(source, leading, y, x, channel, n_channels, name)
