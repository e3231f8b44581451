"""Overlapping tiles of a plane: where they lie, what the model sees of them, how they blend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.images.normalise import Normalizer, to_rgb
from napari_convlora.images.planes import LazyPlane, check_finite
from napari_convlora.images.resample import crop, resize

OVERLAP = 0.25


def tile_starts(extent: int, tile: int, overlap: float) -> list[int]:
    """Evenly spread first pixels of the fewest tiles that cover `extent` with at least `overlap`.

    Parameters
    ----------
    extent, tile
        In pixels. A tile larger than the extent is centred on it.
    overlap
        Smallest share of a tile that neighbours have in common, in [0, 1).
    """
    if tile >= extent:
        return [(extent - tile) // 2]
    count = math.ceil((extent - tile) / (tile * (1 - overlap))) + 1
    return [round(i * (extent - tile) / (count - 1)) for i in range(count)]


def blend_window(size: int, rows: slice, columns: slice) -> np.ndarray:
    """Weight of a part of a tile's pixels: a raised cosine that never reaches zero.

    Parameters
    ----------
    size
        Side of the tile.
    rows, columns
        The part (h, w); weights are float32.
    """
    ramp = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2 + 1e-3
    return np.outer(ramp[rows], ramp[columns]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Tile:
    """A square of a plane, and what a model says of it.

    Parameters
    ----------
    top, left, side
        The square, in image pixels; it may reach beyond the plane.
    values
        (C, h, w) float32 on the CPU, evenly spread over the square.
    """

    top: int
    left: int
    side: int
    values: Tensor


def corners(
    shape: tuple[int, int], side: int, rows: slice, columns: slice
) -> list[tuple[int, int]]:
    """Corners (top, left) of the tiles of a plane (height, width) that overlap a region."""
    return [
        (top, left)
        for top in _overlapping(shape[0], side, rows)
        for left in _overlapping(shape[1], side, columns)
    ]


def _overlapping(extent: int, side: int, part: slice) -> list[int]:
    starts = tile_starts(extent, side, OVERLAP)
    return [start for start in starts if start < part.stop and part.start < start + side]


def tile_pixels(
    plane: np.ndarray | LazyPlane,
    corner: tuple[int, int],
    side: int,
    size: int,
    normalizer: Normalizer,
) -> Tensor:
    """Model input (3, size, size) float32 of the tile with this corner and side."""
    square = normalizer(check_finite(np.asarray(crop(plane, *corner, side))))
    return resize(torch.from_numpy(np.ascontiguousarray(to_rgb(square))).movedim(-1, 0), size)


def blend(tiles: Sequence[Tile], rows: slice, columns: slice) -> np.ndarray:
    """Enlarge the values of `tiles` bilinearly and blend them with a smooth window.

    Parameters
    ----------
    tiles
        All tiles that overlap the region, at least one at each of its pixels.
    rows, columns
        The region (H, W), in image pixels.

    Returns
    -------
    ndarray
        (C, H, W) float32. Every pixel is computed by itself, whatever the region.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    total = np.zeros((len(tiles[0].values), height, width), np.float32)
    weight = np.zeros((height, width), np.float32)
    for tile in tiles:
        y0, y1 = max(tile.top, rows.start), min(tile.top + tile.side, rows.stop)
        x0, x1 = max(tile.left, columns.start), min(tile.left + tile.side, columns.stop)
        if y0 >= y1 or x0 >= x1:
            continue
        of_tile = slice(y0 - tile.top, y1 - tile.top), slice(x0 - tile.left, x1 - tile.left)
        here = np.s_[y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start]
        window = blend_window(tile.side, *of_tile)
        total[:, *here] += _enlarged(tile.values.numpy(), tile.side, *of_tile) * window
        weight[here] += window
    total /= weight
    return total


def sample(tiles: Sequence[Tile], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return what `blend` gives at single pixels (N,), as (N, C) float32."""
    total = np.zeros((len(rows), len(tiles[0].values)), np.float32)
    weight = np.zeros((len(rows), 1), np.float32)
    for tile in tiles:
        y, x = rows - tile.top, columns - tile.left
        inside = np.flatnonzero((y >= 0) & (y < tile.side) & (x >= 0) & (x < tile.side))
        if not len(inside):
            continue
        y, x = y[inside], x[inside]
        ramp = blend_window(tile.side, slice(0, tile.side), slice(0, 1))[:, 0]
        window = (ramp[y] * ramp[x] / ramp[0])[:, None]
        at = torch.from_numpy(np.stack([x, y], axis=-1)).float()
        grid = ((at + 0.5) * (2 / tile.side) - 1)[None, None]
        found = F.grid_sample(
            tile.values[None], grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        total[inside] += found[0, :, 0].T.numpy() * window
        weight[inside] += window
    return total / weight


def _enlarged(values: np.ndarray, side: int, rows: slice, columns: slice) -> np.ndarray:
    """Cut a window out of values (C, h, w) enlarged to `side`, bilinear.

    Every pixel is computed by itself, so that it does not depend on the window.
    """
    if values.shape[1:] == (side, side):
        return values[:, rows, columns]
    above, below, down = _between(values.shape[1], side, rows)
    before, after, right = _between(values.shape[2], side, columns)
    values = values[:, :, before[0] : after[-1] + 1]
    lines = values[:, above]
    lines += (values[:, below] - lines) * down[:, None]
    result = lines[:, :, before - before[0]]
    result += (lines[:, :, after - before[0]] - result) * right
    return result


def _between(extent: int, side: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the two of `extent` samples around enlarged pixels, and how near the second is."""
    at = (np.arange(part.start, part.stop) + 0.5) * extent / side - 0.5
    at = at.clip(0, extent - 1)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, extent - 1), (at - low).astype(np.float32)
