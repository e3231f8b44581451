"""What a round reads of an image: all of it, or of a large one what lies around labels."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from napari_convlora.annotations import LabelledImage
from napari_convlora.blocks import Block, is_large
from napari_convlora.planes import Planes

_CELL = 512
"""Pixels around labels that are read at least."""


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
        Where every part lies, and the part. The planes of a whole image count as one part that
        lies in the first plane.
    """
    n_planes, height, width = image.shape[:3]
    if not is_large(image.shape):
        if not isinstance(image, np.ndarray):
            image = np.stack([plane[:, :] for plane in image])
        return [(Block(0, 0, 0, height, width), LabelledImage(image, annotations, name=name))]
    parts = []
    for p in range(n_planes):
        near = ndimage.binary_dilation(_labelled_cells(annotations[p]), np.ones((3, 3)))
        groups, _ = ndimage.label(near, np.ones((3, 3)))
        for cells in ndimage.find_objects(groups):
            top, left = (c.start * _CELL for c in cells)
            bottom, right = (
                min(c.stop * _CELL, n) for c, n in zip(cells, (height, width), strict=True)
            )
            here = np.s_[top:bottom, left:right]
            part = LabelledImage(
                np.asarray(image[p][here])[None], annotations[p][here][None].copy(), name=name
            )
            parts.append((Block(p, top, left, bottom - top, right - left), part))
    return parts


def _labelled_cells(annotations: np.ndarray) -> np.ndarray:
    """Tell which cells of 512 px of (H, W) annotations hold labels."""
    starts = range(0, annotations.shape[1], _CELL)
    rows = [
        np.logical_or.reduceat(annotations[top : top + _CELL].any(0), starts)
        for top in range(0, annotations.shape[0], _CELL)
    ]
    return np.stack(rows)
