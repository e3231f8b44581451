"""Scores of a grey object map against a binary mask, as camouflage and polyp papers report them.

Every function takes a map (H, W) float in [0, 1] and a mask (H, W) bool of the same shape, and
returns a float. Published figures stretch every map to the full range first; see `stretch`.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

_THRESHOLDS = 256


def stretch(values: np.ndarray) -> np.ndarray:
    """Map the lowest and highest of `values` to 0 and 1, in float64; a constant map stays."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values


def mean_absolute_error(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean of ``|values - mask|``; 0 is best."""
    return float(np.abs(values - mask).mean())


def s_measure(values: np.ndarray, mask: np.ndarray, alpha: float = 0.5) -> float:
    """Structure measure (Fan et al., ICCV 2017, arXiv 1708.00786), 1 is best.

    ``alpha * S_object + (1 - alpha) * S_region``. Of a mask without object it is
    the mean darkness of the map, of one without background the mean brightness.
    """
    share = float(mask.mean())
    if share in (0.0, 1.0):
        return float(values.mean() if share else 1 - values.mean())
    same_object = share * _closeness(values[mask]) + (1 - share) * _closeness(1 - values[~mask])
    return max(0.0, alpha * same_object + (1 - alpha) * _region_similarity(values, mask))


def _closeness(values: np.ndarray) -> float:
    """How near `values` are to a constant 1."""
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    mean = float(values.mean())
    return 2 * mean / (mean**2 + 1 + spread)


def _region_similarity(values: np.ndarray, mask: np.ndarray) -> float:
    """Structural similarity of the quadrants around the mask's centroid, weighted by area."""
    row, column = (int(c) + 1 for c in np.argwhere(mask).mean(axis=0).round())
    rows, columns = (np.s_[:row], np.s_[row:]), (np.s_[:column], np.s_[column:])
    quadrants = [(y, x) for y in rows for x in columns]
    return sum(
        mask[q].size / mask.size * _similarity(values[q], mask[q])
        for q in quadrants
        if mask[q].size
    )


def _similarity(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity without its constants."""
    mean_x, mean_y = float(x.mean()), float(y.mean())
    dx, dy, freedom = x - mean_x, y - mean_y, max(x.size - 1, 1)
    above = 4 * mean_x * mean_y * float((dx * dy).sum()) / freedom
    below = (mean_x**2 + mean_y**2) * float((dx**2).sum() + (dy**2).sum()) / freedom
    if below == 0:
        return 1.0  # both constant, or both black
    return above / below


def e_measure(values: np.ndarray, mask: np.ndarray) -> float:
    """Enhanced-alignment measure (Fan et al., IJCAI 2018, arXiv 1805.10421), 1 is best.

    Mean over the 256 binary maps ``values >= t / 255``. The mean over pixels divides by their
    number, as the paper says; released code divides by one less.
    """
    levels = np.floor(values * (_THRESHOLDS - 1)).astype(np.int64)
    # Pixels at or above each threshold, inside and outside the mask.
    hits, alarms = (
        np.bincount(levels[part], minlength=_THRESHOLDS)[::-1].cumsum() for part in (mask, ~mask)
    )
    found, size, share = hits + alarms, mask.size, float(mask.mean())
    if share == 0:
        return float((1 - found / size).mean())
    if share == 1:
        return float((found / size).mean())
    # A binary map and a binary mask meet in four kinds of pixel only.
    total = np.zeros(_THRESHOLDS)
    inside, outside = mask.sum(), (~mask).sum()
    for count, map_value, mask_value in (
        (hits, 1, 1),
        (alarms, 1, 0),
        (inside - hits, 0, 1),
        (outside - alarms, 0, 0),
    ):
        a, b = map_value - found / size, mask_value - share
        alignment = 2 * a * b / (a**2 + b**2)
        total += count * (1 + alignment) ** 2 / 4
    return float((total / size).mean())


def weighted_f_measure(values: np.ndarray, mask: np.ndarray, beta: float = 1.0) -> float:
    """Weighted F-measure (Margolin et al., CVPR 2014), 1 is best; 0 of a mask without object.

    Errors inside the object count less when their neighbourhood makes up for them (Gaussian of
    deviation 5 on 7 x 7 pixels, without errors beyond the border, as in released code), errors
    outside count up to twice with the distance from it.
    """
    if not mask.any():
        return 0.0
    error = np.abs(values - mask)
    distance, nearest = distance_transform_edt(~mask, return_indices=True)
    # Outside the object every pixel takes the error of the nearest pixel inside.
    smooth = gaussian_filter(error[tuple(nearest)], 5, mode="constant", radius=3)
    weighted = np.where(mask, np.minimum(error, smooth), error * (2 - 0.5 ** (distance / 5)))
    true_positive = float((1 - weighted[mask]).sum())
    false_positive = float(weighted[~mask].sum())
    if true_positive == 0:
        return 0.0
    recall = true_positive / float(mask.sum())
    precision = true_positive / (true_positive + false_positive)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
