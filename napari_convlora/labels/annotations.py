"""What is painted on an image, and what of it a round learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from napari_convlora.config import MAX_CLASSES, UNLABELLED, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.images.planes import check_contrast, check_pixels, has_contrast, size_text

_TWO_CLASSES = "paint at least one stroke for each of two classes"


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image and what people painted on it.

    Parameters
    ----------
    image : (P, H, W, C)
    annotations : (P, H, W) int, 0..255
        0 is unlabelled.
    reviewed : (P, H, W) bool
        True where annotation is complete: a remaining 0 there is background.
    background_id
        Class that a 0 stands for inside `reviewed`.
    name
        How messages call the image.

    Raises
    ------
    InputError
        The sizes differ.
    """

    image: np.ndarray
    annotations: np.ndarray
    reviewed: np.ndarray | None = None
    background_id: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if len(self.image.shape) != 4:
            raise InputError(
                f"The image{_of(self.name)} has {len(self.image.shape)} axes instead of planes, "
                "height, width and channels; arrange it with to_planes."
            )
        for what, array in (("annotations", self.annotations), ("reviewed", self.reviewed)):
            if array is not None:
                _check_same(array, self.image.shape[:3], f"The {what} layer{_of(self.name)}")
        if not 1 <= self.background_id <= MAX_CLASSES:
            raise InputError(
                f"The background class cannot have the id {self.background_id}; "
                f"choose one between 1 and {MAX_CLASSES}."
            )

    def effective(self) -> np.ndarray:
        """Return (P, H, W) uint8 annotations; 0 inside `reviewed` has become background.

        Raises
        ------
        InputError
            The annotations are not whole numbers between 0 and 255.
        """
        annotations = _as_ids(self.annotations, f"The annotations{_of(self.name)}")
        if self.reviewed is None:
            return annotations
        background = (annotations == UNLABELLED) & self.reviewed.astype(bool, copy=False)
        return np.where(background, np.uint8(self.background_id), annotations)


def check_images(images: Sequence[LabelledImage]) -> None:
    """Raise unless something can be learnt from the images.

    A blank one among others may be an empty place of a large image, or a series' empty field.

    Raises
    ------
    InputError
        One is no image that can be looked at, see `check_pixels`, or all are blank.
    """
    for image in images:
        check_pixels(image.image, f"The image{_of(image.name)}")
    if images and not any(has_contrast(image.image) for image in images):
        check_contrast(images[0].image, f"The image{_of(images[0].name)}")


def check_annotations(
    images: Sequence[LabelledImage], classes: Sequence[ClassInfo]
) -> dict[int, int]:
    """Return how many pixels each class of the table has, reviewed background included.

    Parameters
    ----------
    images
        Everything the next round learns from.
    classes
        The class table. A class without a single pixel counts 0 and is simply not trained.

    Raises
    ------
    InputError
        No labels, labels of one class only, ids that the class table lacks, or annotations
        that are not whole numbers between 0 and 255.
    """
    total = np.zeros(MAX_CLASSES + 1, np.int64)
    for image in images:
        for plane in image.effective():  # by plane: bincount widens its input to 64 bits
            total += np.bincount(plane.ravel(), minlength=MAX_CLASSES + 1)
    used = {int(i): int(total[i]) for i in np.flatnonzero(total) if i != UNLABELLED}
    names = {info.id: info.name for info in classes}
    if not used:
        raise InputError(f"Nothing is annotated yet: {_TWO_CLASSES}.")
    unknown = sorted(set(used) - set(names))
    if unknown:
        raise InputError(
            f"The annotations use {_listed(unknown)}, not in the class table; "
            "add them to the table or erase those pixels."
        )
    if len(used) == 1:
        (only,) = used
        raise InputError(f"Only class {only} ({names[only]}) is annotated: {_TWO_CLASSES}.")
    return {info.id: used.get(info.id, 0) for info in classes}


def known_only(
    labels: np.ndarray, classes: Sequence[ClassInfo], merged: Mapping[int, int]
) -> np.ndarray:
    """Return class ids without those that have left the table since a model learnt them.

    Parameters
    ----------
    labels
        Class ids, 0..255.
    classes
        The class table.
    merged
        For classes that were merged, the one that has taken their pixels.
    """
    known = {info.id for info in classes}
    table = np.zeros(MAX_CLASSES + 1, np.uint8)
    for class_id in range(1, MAX_CLASSES + 1):
        now = class_id
        for _ in merged:  # as often as there are steps; a file may lead in a circle
            now = now if now in known else merged.get(now, now)
        table[class_id] = now if now in known else 0
    return table[labels]


def merge_corrections(
    annotations: np.ndarray, prediction_before: np.ndarray, prediction_now: np.ndarray
) -> np.ndarray:
    """Return annotations that include what the user changed on the prediction.

    The user's latest act wins: a changed pixel takes its new class even where an older stroke
    said otherwise. A pixel erased to 0 says nothing, and every other annotation stays.

    Parameters
    ----------
    annotations, prediction_before, prediction_now : (P, H, W) int
        `prediction_before` is the prediction as the model (and :func:`protect`) wrote it.

    Returns
    -------
    annotations : (P, H, W), dtype of `annotations`
        A new array.

    Raises
    ------
    InputError
        The sizes differ, or a correction is no class id (1..255).
    """
    _check_same(prediction_before, annotations.shape, "The prediction before the corrections")
    _check_same(prediction_now, annotations.shape, "The corrected prediction")
    corrected = (prediction_now != prediction_before) & (prediction_now != UNLABELLED)
    merged = annotations.copy()
    merged[corrected] = _as_ids(prediction_now[corrected], "The corrected prediction")
    return merged


def protect(prediction: np.ndarray, annotations: np.ndarray) -> np.ndarray:
    """Return `prediction` with every painted pixel of `annotations` on top.

    Parameters
    ----------
    prediction, annotations : (P, H, W) int

    Returns
    -------
    prediction : (P, H, W), dtype of `prediction`
        A new array.

    Raises
    ------
    InputError
        The sizes differ.
    """
    _check_same(annotations, prediction.shape, "The annotations layer")
    painted = annotations != UNLABELLED
    return np.where(painted, annotations, prediction).astype(prediction.dtype, copy=False)


def _as_ids(array: np.ndarray, what: str) -> np.ndarray:
    """Return `array` as uint8, or raise where that would change a value."""
    if array.dtype.kind not in "biu":
        raise InputError(
            f"{what} must be whole numbers, not {array.dtype}; convert the layer to integer labels."
        )
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8, copy=False)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > MAX_CLASSES:
        raise InputError(
            f"{what} must lie between 0 and {MAX_CLASSES} but reach {low if low < 0 else high}; "
            "paint classes rather than giving every object its own number."
        )
    return array.astype(np.uint8)


def _check_same(array: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if array.shape != tuple(shape):
        sizes = [size_text(s) if len(s) == 3 else str(s) for s in (array.shape, tuple(shape))]
        raise InputError(
            f"{what} is {sizes[0]} instead of {sizes[1]}; make a layer of the image's own size."
        )


def _of(name: str) -> str:
    return f" of '{name}'" if name else ""


def _listed(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10])) + (" and others" if len(ids) > 10 else "")
    return f"id {shown}" if len(ids) == 1 else f"ids {shown}"
