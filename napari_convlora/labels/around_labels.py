"""What a round reads of an image: all of it, or of a large one what lies around labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from napari_convlora.config import UNLABELLED
from napari_convlora.images.planes import Planes
from napari_convlora.images.regions import Block, is_large
from napari_convlora.labels.annotations import LabelledImage

_CELL = 512
"""Pixels around labels that are read at least."""

_SIDE = 8
"""Cells that a part measures at most, from edge to edge."""


def labelled_parts(
    image: Planes, annotations: np.ndarray, name: str = ""
) -> list[tuple[Block, LabelledImage]]:
    """Read what a round needs: the whole image, or of a large one only what lies around labels.

    Parameters
    ----------
    image
        (P, H, W, C).
    annotations
        (P, H, W) int.
    name
        How messages call the image.

    Returns
    -------
    list
        Where every part lies, and the part; each label is in one of them. The planes of a whole
        image count as one part that lies in the first plane.
    """
    n_planes, height, width = image.shape[:3]
    if not is_large(image.shape):
        if not isinstance(image, np.ndarray):
            image = np.stack([plane[:, :] for plane in image])
        return [(Block(0, 0, 0, height, width), LabelledImage(image, annotations, name=name))]
    parts = []
    for p in range(n_planes):
        cells = _labelled_cells(annotations[p])
        for own in _together(cells):
            reach = ndimage.find_objects(_widen(own).astype(np.uint8))[0]
            top, left = (c.start * _CELL for c in reach)
            bottom, right = (
                min(c.stop * _CELL, n) for c, n in zip(reach, (height, width), strict=True)
            )
            here = np.s_[top:bottom, left:right]
            mine = own[reach].repeat(_CELL, 0).repeat(_CELL, 1)[: bottom - top, : right - left]
            part = LabelledImage(
                np.asarray(image[p][here])[None],
                np.where(mine, annotations[p][here], UNLABELLED)[None],
                name=name,
            )
            parts.append((Block(p, top, left, bottom - top, right - left), part))
    return parts


def _together(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Divide labelled cells into those of a part each, so that none is in two.

    Cells whose surroundings touch belong together, unless they spread further than a part may:
    strokes in a chain would have the whole image read.
    """
    groups, _ = ndimage.label(_widen(cells), np.ones((3, 3)))
    for g, extent in enumerate(ndimage.find_objects(groups), 1):
        own = cells & (groups == g)
        step = _SIDE - 2 if max(c.stop - c.start for c in extent) > _SIDE else _SIDE
        rows, columns = (range(c.start, c.stop, step) for c in extent)
        for row, column in itertools.product(rows, columns):
            some = np.zeros_like(own)
            here = np.s_[row : row + step, column : column + step]
            some[here] = own[here]
            if some.any():
                yield some


def _widen(cells: np.ndarray) -> np.ndarray:
    return ndimage.binary_dilation(cells, np.ones((3, 3)))


def _labelled_cells(annotations: np.ndarray) -> np.ndarray:
    """Tell which cells of 512 px of (H, W) annotations hold labels."""
    starts = range(0, annotations.shape[1], _CELL)
    rows = [
        np.logical_or.reduceat(annotations[top : top + _CELL].any(0), starts)
        for top in range(0, annotations.shape[0], _CELL)
    ]
    return np.stack(rows)
