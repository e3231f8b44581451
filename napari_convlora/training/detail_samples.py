"""What the detail branch is fitted on, and what it says of each view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.resample import crop, resize
from napari_convlora.images.tiles import Tile, sample
from napari_convlora.model.detail_branch import DetailBranch, region_features
from napari_convlora.training.dataset import TrainingSet
from napari_convlora.training.losses import VOID
from napari_convlora.training.views import View

_PIXELS_PER_CLASS = 30_000
_REGION = 512
_PIXELS = 120_000
_SURROUNDINGS = 4096
_MOST_SINGLE = 0.2
"""Part of a region up to which its pixels are scored one by one, which costs each of them more."""

Context = Callable[[int, int, slice, slice], Sequence[Tile]]
"""From image, plane, rows and columns to the frozen embeddings of the tiles around that region."""


def pixel_samples(
    data: TrainingSet, normalizer: Normalizer, seed: int, context: Context
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Describe labelled pixels and their surroundings to the detail branch, region by region.

    At most 30,000 random pixels per class are used, and of many classes 120,000 altogether.

    Parameters
    ----------
    data, normalizer, seed
        What to draw from, how images are normalised, and the seed of the draw.
    context
        Gives the embeddings around a region.

    Yields
    ------
    features, target, fold, surroundings : ndarray
        (N, F) float32, (N,) int64, (N,) uint8, and (M, F) float32 of random pixels of the region.
    """
    rng = np.random.default_rng(seed)
    most = min(_PIXELS_PER_CLASS, _PIXELS // len(data.positions))
    for i, image in enumerate(data.images):
        rows = []
        for c, arrays in enumerate(data.positions):
            share = min(1.0, most / max(1, sum(map(len, arrays))))
            keep = arrays[i][rng.random(len(arrays[i])) < share] if share < 1 else arrays[i]
            rows.append(np.column_stack([keep, np.full(len(keep), c)]))
        pixels = np.concatenate(rows)
        regions = np.column_stack([pixels[:, 0], pixels[:, 1:3] // _REGION])
        for plane, row, column in np.unique(regions, axis=0):
            inside = pixels[(regions == (plane, row, column)).all(1)]
            block = _block(image.image, row, column)
            features = region_features(image.image[plane], normalizer, *block)
            tiles = context(i, plane, *block)
            corner, extent = (block[0].start, block[1].start), features.shape[:2]
            around = rng.integers(extent, size=(_SURROUNDINGS, 2)) + corner

            yield (
                _seen(features, tiles, block, inside[:, 1:3].T),
                inside[:, 3].astype(np.int64),
                data.fold[i][tuple(inside[:, :3].T)],
                _seen(features, tiles, block, around.T),
            )


def _seen(
    features: np.ndarray, tiles: Sequence[Tile], block: tuple[slice, slice], at: np.ndarray
) -> np.ndarray:
    """Return what the detail branch sees (N, F) of pixels (2, N) that lie in `block`."""
    local = features[at[0] - block[0].start, at[1] - block[1].start]
    return np.concatenate([local, sample(tiles, *at)], axis=1) if tiles else local


def _block(image: np.ndarray, row: int, column: int) -> tuple[slice, slice]:
    """Rows and columns of a block of 512 px of (P, H, W, C), smaller at the image's end."""
    top, left = row * _REGION, column * _REGION
    return (
        slice(top, min(top + _REGION, image.shape[1])),
        slice(left, min(left + _REGION, image.shape[2])),
    )


def detail_block(
    data: TrainingSet,
    where: tuple[int, int, int, int],
    normalizer: Normalizer,
    whole: DetailBranch,
    blind: Sequence[DetailBranch],
    context: Context,
) -> np.ndarray:
    """Detail logits of a 512 px block, each pixel scored by a branch that never saw it.

    Where it was fitted, the branch looks better than it is. The one that is blind to a fold is as
    wrong there as the branch will be on new pixels, or on new images where folds are images. So the
    adapted SAM learns to correct what the branch really gets wrong, and both can be compared.

    Parameters
    ----------
    where
        Image, plane, and the block's row and column.
    whole, blind
        The branch, and those that were fitted on all folds but one, in the order of the folds.
    context
        Gives the embeddings around a region.

    Returns
    -------
    ndarray
        (K, h, w) float32, smaller than the block at the image's end.
    """
    image, plane, row, column = where
    block = _block(data.images[image].image, row, column)
    features = region_features(data.images[image].image[plane], normalizer, *block)
    tiles = context(image, plane, *block)
    fold = data.fold[image][plane][block]
    known = np.maximum(data.target[image][plane][block], data.held[image][plane][block]) != VOID
    logits = whole.logits(features, tiles, *block)
    corner = np.array([[block[0].start], [block[1].start]])
    for i, branch in enumerate(blind):
        inside = known & (fold == i)
        if inside.mean() > _MOST_SINGLE:
            logits[:, inside] = branch.logits(features, tiles, *block)[:, inside]
        elif inside.any():  # strokes
            seen = _seen(features, tiles, block, np.stack(inside.nonzero()) + corner)
            logits[:, inside] = branch.at(seen)
    return logits


def view_detail(
    view: View,
    shape: tuple[int, int],
    tile: int,
    block: Callable[[tuple[int, int, int, int]], np.ndarray],
) -> Tensor:
    """Cut the detail logits (K, tile, tile) of a view out of blocks.

    The filters do not know directions, so a turned view has the turned logits.

    Parameters
    ----------
    view
        What to cut.
    shape
        Height and width of its plane.
    tile
        Side of the result.
    block
        Gives `detail_block` of an image, plane, row and column.
    """
    y0, y1 = max(view.top, 0), min(view.top + view.size, shape[0])
    x0, x1 = max(view.left, 0), min(view.left + view.size, shape[1])
    rows, columns = (range(a // _REGION, -(-b // _REGION)) for a, b in ((y0, y1), (x0, x1)))
    logits = np.concatenate(
        [
            np.concatenate([block((view.image, view.plane, r, c)) for c in columns], axis=2)
            for r in rows
        ],
        axis=1,
    )
    top, left = rows.start * _REGION, columns.start * _REGION
    inside = logits[:, y0 - top : y1 - top, x0 - left : x1 - left].transpose(1, 2, 0)
    square = crop(inside, view.top - y0, view.left - x0, view.size).transpose(2, 0, 1)
    return view.orient(resize(torch.from_numpy(square), tile)).contiguous()
