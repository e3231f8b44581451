"""Going through a prediction: what to accept or reject, and where to look next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from skimage.measure import block_reduce
from skimage.segmentation import flood

from napari_convlora.config import UNLABELLED
from napari_convlora.errors import InputError

WORTH_A_LOOK = 5.0
"""Per cent of mean uncertainty from which on a place is shown."""


@dataclass(frozen=True)
class Place:
    """A pixel to look at, and the mean uncertainty around it in per cent."""

    plane: int
    row: int
    column: int
    uncertainty: float


def component(labels: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """Return the connected pixels that have the class of the pixel `at`, diagonals included.

    Parameters
    ----------
    labels : (H, W) or (P, H, W) int
    at
        Index of a pixel, one whole number per axis.

    Returns
    -------
    mask : bool, shape of `labels`

    Raises
    ------
    InputError
        `at` lies outside, or nothing is predicted there.
    """
    if not all(0 <= i < n for i, n in zip(at, labels.shape, strict=True)):
        raise InputError("That is outside of the image; click on the prediction.")
    if labels[at] == UNLABELLED:
        raise InputError("Nothing is predicted there; click on a coloured region.")
    return flood(labels, at)


class Guide:
    """The most uncertain places of one image, one after the other and far from each other.

    A place is a square of half the distance in which the model hesitates most on average, so
    that a thin border counts less than a doubtful object. Every visit to a plane makes the
    other places of that plane count less, so that a stack is gone through as a whole.

    Parameters
    ----------
    uncertainty : (P, H, W) uint8
        In per cent.
    distance
        Pixels that two places lie apart at least, in the same plane and in neighbouring ones.

    Attributes
    ----------
    visited
        Places so far; a new guide may take over those of an old one.
    """

    def __init__(self, uncertainty: np.ndarray, distance: int) -> None:
        self._uncertainty, self._distance = uncertainty, distance
        self._side = max(1, distance // 2)
        # Padded with zeros: a square that hangs over the edge counts less, as there is less of it.
        cells = [block_reduce(p, (self._side, self._side), np.mean) for p in uncertainty]
        self._cells = np.stack(cells).astype(np.float32)
        self.visited: list[Place] = []
        self.restart()

    def restart(self) -> None:
        """Forget which places were visited."""
        self.visited.clear()
        self._left = self._cells >= WORTH_A_LOOK

    def next(self, labelled: Callable[[tuple], np.ndarray]) -> Place | None:
        """Return the next place and remember it; None if no other is worth a look.

        Parameters
        ----------
        labelled
            Returns which pixels of a part of the image (an index into (P, H, W)) are labelled;
            a place is never one of them.
        """
        visits = np.bincount([p.plane for p in self.visited], minlength=len(self._cells))
        cells = np.argwhere(self._left)
        scores = self._cells[self._left] / (1 + visits[cells[:, 0]])
        for cell in map(tuple, cells[np.argsort(-scores, kind="stable")].tolist()):
            place = self._look(cell, labelled)
            if place is not None:
                self.visited.append(place)
                return place
            self._left[cell] = False
        return None

    def _look(self, cell: tuple[int, ...], labelled: Callable[[tuple], np.ndarray]) -> Place | None:
        plane, top, left = cell[0], cell[1] * self._side, cell[2] * self._side
        part = np.s_[plane, top : top + self._side, left : left + self._side]
        free = ~labelled(part)
        rows, columns = np.ogrid[top : top + free.shape[0], left : left + free.shape[1]]
        reach = self._distance + self._side
        for place in self.visited:
            near = abs(place.row - top) < reach and abs(place.column - left) < reach
            if near and abs(place.plane - plane) <= 1:
                apart = np.hypot(rows - place.row, columns - place.column)
                free &= apart >= self._distance
        if not free.any():
            return None
        best = np.argmax(np.where(free, self._uncertainty[part].astype(np.int16), -1))
        row, column = np.unravel_index(best, free.shape)
        return Place(plane, int(top + row), int(left + column), float(self._cells[cell]))
