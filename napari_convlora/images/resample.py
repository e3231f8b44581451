"""Working scale: cutting squares out of images and resizing them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.images.planes import LazyPlane

_MAX_ENLARGEMENT = 4.0
_MAX_REDUCTION = 0.25


def auto_pixel_scale(shapes: Sequence[tuple[int, int]], tile: int) -> float:
    """Working pixels per image pixel at which SAM sees an image as a whole.

    Objects are told by their context, so the longer side fills a tile; fine structure is the
    detail branch's business. An image is reduced to a quarter at most: very large ones hold small
    objects, and take several tiles.

    Parameters
    ----------
    shapes
        (height, width) of the annotated images, in pixels.
    tile
        Side of the backbone's tile, in pixels.
    """
    extents = [min(max(h, w), 2 * math.sqrt(h * w)) for h, w in shapes]  # a strip takes more tiles
    return min(_MAX_ENLARGEMENT, max(_MAX_REDUCTION, tile / float(np.median(extents))))


def crop(
    array: np.ndarray | LazyPlane, top: int, left: int, size: int, fill: float | None = None
) -> np.ndarray:
    """Cut a square out of `array` (H, W, ...); what lies outside is mirrored, or `fill`.

    Parameters
    ----------
    array
        Two leading axes are height and width.
    top, left
        Corner of the square, may be negative.
    size
        Side in pixels.
    fill
        Constant for the outside; ``None`` mirrors the image.
    """
    height, width = array.shape[:2]
    y0, y1 = max(top, 0), min(top + size, height)
    x0, x1 = max(left, 0), min(left + size, width)
    inside = array[y0:y1, x0:x1]
    pads = [(y0 - top, top + size - y1), (x0 - left, left + size - x1)]
    if not any(map(any, pads)):
        return inside
    pads += [(0, 0)] * (array.ndim - 2)
    if fill is None:
        return np.pad(inside, pads, mode="symmetric")
    return np.pad(inside, pads, constant_values=fill)


def resize(tensor: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize (C, H, W) to a side or (height, width): bilinear, antialiased when shrinking."""
    size = (size, size) if isinstance(size, int) else size
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    shrinking = size[0] < tensor.shape[-2] or size[1] < tensor.shape[-1]
    return F.interpolate(
        tensor[None], size, mode="bilinear", align_corners=False, antialias=shrinking
    )[0]
