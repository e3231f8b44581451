"""Confusion matrices and the scores they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from napari_convlora.config import MAX_LABEL, UNLABELLED, ClassInfo
from napari_convlora.errors import InputError

_CHUNK = 1 << 22  # bounds the 64-bit temporaries of a large stack to some 100 MB


@dataclass(frozen=True)
class Scores:
    """Agreement of a prediction with a target.

    Parameters
    ----------
    iou, dice
        Per class id, 0..1; NaN where the class is in neither prediction nor target.
    mean_iou, mean_dice
        Over the classes that are in either; NaN without any.
    pixel_accuracy
        Share of the compared pixels that agree, 0..1; NaN without any.
    pixels
        Pixels compared.
    """

    iou: Mapping[int, float]
    dice: Mapping[int, float]
    mean_iou: float
    mean_dice: float
    pixel_accuracy: float
    pixels: int

    def as_dict(self) -> dict[str, object]:
        """Return the scores for ``json.dumps``; NaN becomes None, as JSON has no NaN."""
        return {
            "mean_iou": _jsonable(self.mean_iou),
            "mean_dice": _jsonable(self.mean_dice),
            "pixel_accuracy": _jsonable(self.pixel_accuracy),
            "pixels": self.pixels,
            "iou": {str(i): _jsonable(value) for i, value in self.iou.items()},
            "dice": {str(i): _jsonable(value) for i, value in self.dice.items()},
        }


def confusion(
    prediction: np.ndarray,
    target: np.ndarray,
    ids: int | Sequence[int],
    ignore: int | None = UNLABELLED,
) -> np.ndarray:
    """Return how often each target class (row) was predicted as each class (column).

    Parameters
    ----------
    prediction, target : any equal shape, bool or int
    ids
        Ids in the order of rows and columns; a number K means 1..K.
    ignore
        Pixels whose target has this id are left out; ``None`` leaves none out.

    Returns
    -------
    matrix : (K, K) int64

    Raises
    ------
    InputError
        Different sizes, values that are not whole numbers, or, at a compared pixel, an id
        missing from `ids`.
    """
    for what, array in (("prediction", prediction), ("target", target)):
        if array.dtype.kind not in "biu":
            raise InputError(f"The {what} holds {array.dtype} values; give whole-number labels.")
    if prediction.shape != target.shape:
        raise InputError(
            f"The prediction has the shape {prediction.shape} and the target {target.shape}; "
            "compare masks of one size."
        )
    order = list(range(1, ids + 1)) if isinstance(ids, int) else [int(i) for i in ids]
    if len(set(order)) != len(order) or not all(0 <= i <= MAX_LABEL for i in order):
        raise InputError(f"Class ids must be unique and between 0 and {MAX_LABEL}; correct them.")
    size = len(order)
    index = np.full(MAX_LABEL + 2, -1, np.int64)
    index[order] = np.arange(size)
    total = np.zeros(size * size, np.int64)
    flat_prediction, flat_target = prediction.reshape(-1), target.reshape(-1)
    for start in range(0, flat_target.size, _CHUNK):
        wanted = flat_target[start : start + _CHUNK]
        given = flat_prediction[start : start + _CHUNK]
        if ignore is not None:
            kept = wanted != ignore
            wanted, given = wanted[kept], given[kept]
        rows, columns = _indices(wanted, index, "target"), _indices(given, index, "prediction")
        total += np.bincount(rows * size + columns, minlength=size * size)
    return total.reshape(size, size)


def scores(
    matrix: np.ndarray, classes: Sequence[ClassInfo] | Sequence[int], ignore: int | None = None
) -> Scores:
    """Return IoU, Dice and accuracy of a confusion matrix.

    Parameters
    ----------
    matrix : (K, K) int
        Rows are target classes, columns predicted ones.
    classes
        The K classes or ids, in the order of the rows.
    ignore
        An id that is no class: predicted where another was wanted, it is an error there.

    Raises
    ------
    InputError
        The matrix does not have one row and one column per class.
    """
    ids = [c.id if isinstance(c, ClassInfo) else int(c) for c in classes]
    if matrix.shape != (len(ids), len(ids)):
        raise InputError(
            f"A confusion matrix of shape {matrix.shape} does not fit {len(ids)} classes; "
            "give the classes it was counted for."
        )
    hits = np.diagonal(matrix).astype(np.float64)
    both = matrix.sum(axis=0) + matrix.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of an absent class
        iou, dice = _ious(matrix), 2 * hits / both
    pixels = int(matrix.sum())
    counts = np.array([i != ignore for i in ids], bool)
    present = counts & (both > 0)
    return Scores(
        iou={i: float(v) for i, v, c in zip(ids, iou, counts, strict=True) if c},
        dice={i: float(v) for i, v, c in zip(ids, dice, counts, strict=True) if c},
        mean_iou=float(iou[present].mean()) if present.any() else math.nan,
        mean_dice=float(dice[present].mean()) if present.any() else math.nan,
        pixel_accuracy=float(hits.sum()) / pixels if pixels else math.nan,
        pixels=pixels,
    )


def mean_ious(matrices: np.ndarray) -> np.ndarray:
    """Mean IoU of many confusion matrices at once, as `scores` gives for one.

    Parameters
    ----------
    matrices : (..., K, K) float or int
        Truth in rows.

    Returns
    -------
    (...) float64 in [0, 1]
        Over the classes that are in truth or prediction; NaN without any.
    """
    iou = _ious(matrices)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of no class at all
        return np.nansum(iou, -1) / np.isfinite(iou).sum(-1)


def _ious(matrices: np.ndarray) -> np.ndarray:
    """Return the IoU (..., K) of every class in confusion matrices; NaN of one that is absent."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return hits / (matrices.sum(-1) + matrices.sum(-2) - hits)


def balanced_error(matrix: np.ndarray) -> float:
    """Return the balanced error rate: the share of a class that is missed, mean over classes.

    Parameters
    ----------
    matrix : (K, K) int
        Rows are target classes, columns predicted ones; classes without target do not count.

    Returns
    -------
    float
        0..1; NaN without any pixel.
    """
    wanted = matrix.sum(axis=1)
    present = wanted > 0
    if not present.any():
        return math.nan
    return float((1 - np.diagonal(matrix)[present] / wanted[present]).mean())


def _indices(values: np.ndarray, index: np.ndarray, what: str) -> np.ndarray:
    """Return the row or column of each value, where `index` ends with a slot for strangers."""
    outside = (values < 0) | (values > MAX_LABEL)
    places = index[np.where(outside, MAX_LABEL + 1, values).astype(np.int64)]
    if (places < 0).any():
        unknown = np.unique(values[places < 0])[:10].tolist()
        raise InputError(
            f"The {what} holds the ids {unknown}, which are none of the compared classes; "
            "add them to the classes or ignore them."
        )
    return places


def _jsonable(value: float) -> float | None:
    return None if math.isnan(value) else value
