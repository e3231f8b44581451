"""A simulated person who paints strokes, and corrects the largest mistake first."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt
from skimage.graph import MCP
from skimage.measure import label
from skimage.morphology import disk, skeletonize

from napari_convlora.config import UNLABELLED

_SIDE_PER_STROKE = 256
"""An image of this side gets one first stroke per class, one of twice the side two."""

_LENGTH_SHARE = 1 / 8
_LARGE_SIDE = 512


def stroke(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint one stroke along the middle of a region.

    The path is a piece of the region's skeleton, at most an eighth of the image's longer side.
    The brush is 3 pixels wide, 5 in images over 512 pixels, and never leaves the region, as a
    careful person's would not.

    Parameters
    ----------
    region : (H, W) bool
        Where the stroke may go; at least one pixel.
    rng
        Decides where it begins.

    Returns
    -------
    painted : (H, W) bool
        At least one pixel, all inside `region`.
    """
    length = _length(region.shape)
    skeleton = skeletonize(region)
    if not skeleton.any():  # thinning may erase the smallest regions
        skeleton = region
    points = np.argwhere(skeleton)
    begin = points[rng.integers(len(points))]
    low = np.maximum(begin - length, 0)
    near = skeleton[tuple(slice(a, b) for a, b in zip(low, begin + length + 1, strict=True))]
    one_end, _ = _farthest(near, tuple(begin - low), length)
    _, path = _farthest(near, one_end, length)
    painted = np.zeros(region.shape, bool)
    painted[tuple((np.array(path) + low).T)] = True
    brush = disk(1 if max(region.shape) <= _LARGE_SIDE else 2)
    return binary_dilation(painted, brush) & region


def _length(shape: tuple[int, ...]) -> int:
    return max(10, round(max(shape) * _LENGTH_SHARE))


def _farthest(
    skeleton: np.ndarray, begin: tuple[int, ...], length: int
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Pixel of `skeleton` farthest along it from `begin`, within `length`, and the way there."""
    search = MCP(np.where(skeleton, 1.0, -1.0), fully_connected=True)  # below 0: no way through
    cost, _ = search.find_costs([begin])
    cost[cost > length] = -1
    end = tuple(int(i) for i in np.unravel_index(cost.argmax(), cost.shape))
    return end, search.traceback(end)


def first_strokes(truth: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Paint the strokes of the first round: one for each class, more in a large image.

    Strokes of a class keep a stroke's length apart; where there is no room, there are fewer.

    Parameters
    ----------
    truth : (H, W) int
        Class ids; 0 is void and never painted.
    seed
        The same seed paints the same strokes.

    Returns
    -------
    annotations : (H, W) uint8
        Class ids, 0 = unlabelled.
    strokes : int
        How many were painted.
    """
    rng = np.random.default_rng(seed)
    annotations = np.zeros(truth.shape, np.uint8)
    wanted = max(1, round(math.sqrt(truth.size) / _SIDE_PER_STROKE))
    strokes = 0
    for c in np.unique(truth[truth != UNLABELLED]):
        region = truth == c
        for _ in range(wanted):
            if not region.any():
                break
            new = stroke(region, rng)
            annotations[new] = c
            strokes += 1
            region &= distance_transform_edt(~new) > _length(truth.shape)
    return annotations, strokes


def correct(
    truth: np.ndarray,
    prediction: np.ndarray,
    annotations: np.ndarray,
    count: int,
    max_share: float,
    seed: int,
) -> tuple[np.ndarray, int]:
    """Paint one stroke in each of the largest wrong regions of a prediction.

    A wrong region is a connected set of unlabelled pixels of one true class that are predicted
    as another.

    Parameters
    ----------
    truth, prediction, annotations : (H, W) int
        Class ids; 0 is void in `truth` and unlabelled in `annotations`.
    count
        Strokes to paint at most.
    max_share
        Share of the image's pixels, 0..1, that may be annotated; a stroke beyond is not painted.
    seed
        Decides where the strokes begin in their regions.

    Returns
    -------
    annotations : (H, W), dtype of `annotations`
        A new array.
    strokes : int
        How many were painted.
    """
    rng = np.random.default_rng(seed)
    painted = annotations.copy()
    wrong = (prediction != truth) & (truth != UNLABELLED) & (annotations == UNLABELLED)
    regions = label(np.where(wrong, truth, 0), connectivity=2)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0  # what is right
    strokes = 0
    for number in np.argsort(-sizes, kind="stable")[:count]:
        if sizes[number] == 0:
            break
        new = stroke(regions == number, rng)
        if np.count_nonzero(painted) + np.count_nonzero(new) > max_share * truth.size:
            break
        painted[new] = truth[new]
        strokes += 1
    return painted, strokes
