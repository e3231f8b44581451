"""Reviewed regions: outlines inside which what is unpainted counts as background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.draw import polygon

from napari_convlora.config import UNLABELLED
from napari_convlora.errors import InputError

Outlines = Sequence[tuple[int, np.ndarray]]
"""Plane and vertices (N, 2) of every reviewed region: rows and columns of pixel centres."""


def inside_outlines(shape: tuple[int, int, int], outlines: Outlines) -> np.ndarray:
    """Return (P, H, W) bool, True at pixels whose centre lies inside an outline.

    Parameters
    ----------
    shape
        (P, H, W).
    outlines
        Index of the plane, and vertices (N, 2) of a polygon: rows and columns of pixel centres.
        What lies beyond the plane is left out.
    """
    inside = np.zeros(shape, bool)
    for plane, vertices in outlines:
        rows, columns = polygon(vertices[:, 0], vertices[:, 1], shape[1:])
        inside[plane, rows, columns] = True
    return inside


def fill_outlines(annotations: np.ndarray, outlines: Outlines, class_id: int | None) -> np.ndarray:
    """Return annotations (P, H, W) in which what is unlabelled inside `outlines` has a class.

    Outlines of planes that there are not are left out; None for the class changes nothing.
    """
    here = [(plane, vertices) for plane, vertices in outlines if 0 <= plane < len(annotations)]
    if class_id is None or not here:
        return annotations
    inside = inside_outlines(annotations.shape, here) & (annotations == UNLABELLED)
    return np.where(inside, annotations.dtype.type(class_id), annotations)


def fill_reviewed(
    annotations: np.ndarray, outlines: Outlines, background_id: int | None, name: str
) -> np.ndarray:
    """Return annotations (P, H, W) in which what is unlabelled inside `outlines` is background.

    Raises
    ------
    InputError
        There are outlines, but no class is the background; `name` is that of the image.
    """
    if outlines and background_id is None:
        raise InputError(
            f"'{name}' has reviewed regions, but no class is the background; "
            "mark one in the class table."
        )
    return fill_outlines(annotations, outlines, background_id)
