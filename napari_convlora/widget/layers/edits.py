"""What the user does to the pixels of an image: paint, accept, reject, relabel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.config import UNLABELLED
from napari_convlora.errors import InputError
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.prediction_layer import set_pixels

if TYPE_CHECKING:
    from napari_convlora.prediction.prompts import Window


def paint(
    record: ImageLayers, plane: int, window: Window, mask: np.ndarray, class_id: int, over: bool
) -> Any:
    """Paint a mask into the annotations as one item of their undo history.

    Parameters
    ----------
    record
        The image.
    plane, window, mask, class_id
        Where, which pixels (H, W) of the window, and what.
    over
        Whether pixels of other classes are painted over.

    Returns
    -------
    tuple of (N,) int
        Plane, row and column of the pixels that changed.
    """
    if not record.annotating:
        raise InputError(f"'{record.image.name}' has no annotations layer; start annotating.")
    before = record.painted()[plane][window.region]
    rows, columns = np.nonzero(mask & (before != class_id) & (over | (before == 0)))
    at = (np.full(len(rows), plane), rows + window.top, columns + window.left)
    if len(rows):
        flat = np.ravel_multi_index(at, record.painted().shape)
        set_pixels(record.annotate(), flat, np.full(len(rows), class_id))
    return at


def labelled(record: ImageLayers, part: Any = np.s_[:]) -> np.ndarray:
    """Whether pixels (an index into (P, H, W)) are painted, on either layer."""
    painted = record.painted()[part] != UNLABELLED
    if record.predicted:
        painted |= record.written.corrected(part)
    return painted


def accept(record: ImageLayers, mask: np.ndarray, first: int = 0) -> int:
    """Annotate predicted pixels with their predicted class; returns how many.

    One item of the annotations' undo history; annotated pixels stay as they are.

    Parameters
    ----------
    record
        The image.
    mask : (p, H, W) bool
        Pixels of the planes from `first` on.
    first
        Plane at which `mask` begins.
    """
    part = np.s_[first : first + len(mask)]
    predicted = record.predicted_view()[part]
    free = record.painted()[part] == UNLABELLED
    at = np.flatnonzero(mask & free & (predicted != UNLABELLED))
    if len(at):
        values = predicted.ravel()[at]
        set_pixels(record.annotate(), at + first * predicted[0].size, values)
    return len(at)


def reject(record: ImageLayers, mask: np.ndarray, first: int = 0) -> int:
    """Clear predicted pixels until the next prediction; returns how many.

    One item of its undo history. What is painted or reviewed stays; cleared pixels say nothing.

    Parameters
    ----------
    record
        The image.
    mask : (p, H, W) bool
        Pixels of the planes from `first` on.
    first
        Plane at which `mask` begins.
    """
    part = np.s_[first : first + len(mask)]
    predicted = record.predicted_view()[part]
    own = record.written.corrected(part) | (record.annotated(part) != UNLABELLED)
    at = np.flatnonzero(mask & (predicted != UNLABELLED) & ~own)
    if len(at):
        set_pixels(record.written.layer, at + first * predicted[0].size, np.zeros_like(at))
    return len(at)


def relabel(record: ImageLayers, class_id: int, to: int = 0) -> int:
    """Give a class's pixels to another, or erase them; returns annotated pixels.

    One item of the annotations' undo history; the prediction follows as if the model had
    written it, as undoing there would look like a correction.

    Parameters
    ----------
    record
        The image.
    class_id, to
        The class, and the one that takes its pixels; 0 erases them.
    """
    record.collect_corrections()
    at = np.flatnonzero(record.painted() == class_id)
    if len(at):
        set_pixels(record.annotate(), at, np.full_like(at, to))
    if record.predicted:
        view = record.written.view
        record.written.write([(np.s_[:], np.where(view == class_id, to, view))])
    return len(at)
