"""What the integers in a label image mean: unlabelled pixels, classes, reviewed regions."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.config import MAX_CLASSES, UNLABELLED, ClassInfo, InputError
from napari_convlora.planes import check_contrast, check_pixels, has_contrast, size_text
from napari_convlora.results import atomic_write, check_no_device

DEFAULT_COLOURS: tuple[str, ...] = (
    "#8c8c8c",  # background: neutral, so that the classes stand out
    # Okabe and Ito (2008), without black
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
    # Paul Tol's "muted" scheme, the hues that differ from those above
    *("#332288", "#882255", "#44aa99", "#999933", "#aa4499", "#117733"),
)
"""Cycle that stays distinguishable under the common forms of colour blindness."""

_MAX_TABLE_BYTES = 1_000_000
_MAX_NAME = 200
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
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


def default_classes(ids: int | Iterable[int]) -> tuple[ClassInfo, ...]:
    """Return a class table with default names and colours; class 1 is ``background``.

    Parameters
    ----------
    ids
        The ids themselves (0 is left out), or how many classes: n gives 1..n.
    """
    wanted = range(1, ids + 1) if isinstance(ids, int) else sorted({int(i) for i in ids})
    return tuple(
        ClassInfo(i, "background" if i == 1 else f"class {i}", _default_colour(i))
        for i in wanted
        if i != UNLABELLED
    )


def find_background(classes: Iterable[ClassInfo]) -> int | None:
    """Return the id of the class marked as background or, without a mark, of that name."""
    marked = {info.background: info.id for info in classes}
    named = (info.id for info in classes if info.name.casefold() == "background")
    return marked.get(True) or next(named, None)


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


def read_classes(path: str | os.PathLike[str]) -> tuple[ClassInfo, ...]:
    """Return the class table in a ``classes.json``, or in a plain ``{"1": "name"}`` file.

    Raises
    ------
    InputError
        The file is absent, larger than 1 MB, not JSON, from a newer version, or its ids,
        names or colours are not usable.
    """
    path = Path(path)
    check_no_device(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read ({error.strerror}); check the path of the class table."
        ) from error
    if len(raw) > _MAX_TABLE_BYTES:
        raise InputError(f"'{path.name}' is larger than 1 MB, so it is no class table.")
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"'{path.name}' is not valid JSON; correct it or write the class table again."
        ) from error
    return parse_classes(data, path.name)


def write_classes(path: str | os.PathLike[str], classes: Sequence[ClassInfo]) -> None:
    """Write the class table as ``{"format": 1, "classes": [{"id", "name", "colour"}, ...]}``.

    The class that is marked as background has ``"background": true`` besides.

    Raises
    ------
    InputError
        The table is not valid, or `path` cannot be written.
    """
    rows = [
        {"id": info.id, "name": info.name, "colour": info.colour}
        | ({"background": True} if info.background else {})
        for info in classes
    ]
    parse_classes({"format": 1, "classes": rows}, "The class table")
    text = json.dumps({"format": 1, "classes": rows}, indent=2, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def parse_classes(data: Any, source: str) -> tuple[ClassInfo, ...]:
    """Return the class table in parsed JSON.

    Parameters
    ----------
    data
        What :func:`write_classes` writes, or ``{"1": "name"}``.
    source
        How messages call it.

    Raises
    ------
    InputError
        As :func:`read_classes`.
    """
    if isinstance(data, dict) and "classes" in data:
        if type(data.get("format", 1)) is not int or data.get("format", 1) != 1:
            raise InputError(
                f"{source}: format {data['format']!r} is not known; update napari-convlora."
            )
        rows = data["classes"]
    elif isinstance(data, dict):
        keys = [int(k) if re.fullmatch(r"[0-9]{1,9}", k) else k for k in data]
        rows = [{"id": key, "name": name} for key, name in zip(keys, data.values(), strict=True)]
    else:
        rows = None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{source}: no classes found; write at least one, "
            'as in {"1": "background", "2": "nucleus"}.'
        )
    classes = tuple(_parse_row(row, source) for row in rows)
    if len({info.id for info in classes}) < len(classes):
        raise InputError(f"{source}: two classes have the same id; make the ids unique.")
    if len({info.name.casefold() for info in classes}) < len(classes):
        raise InputError(f"{source}: two classes have the same name; make the names unique.")
    if sum(info.background for info in classes) > 1:
        raise InputError(f"{source}: two classes are marked as background; mark one.")
    return classes


def _parse_row(row: dict[str, Any], source: str) -> ClassInfo:
    number, name = row.get("id"), row.get("name")
    if type(number) is not int or not 1 <= number <= MAX_CLASSES:
        raise InputError(
            f"{source}: a class cannot have the id {_short(number)}; "
            f"use a whole number between 1 and {MAX_CLASSES}."
        )
    if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
        raise InputError(
            f"{source}: class {number} needs a name of 1 to {_MAX_NAME} characters; give it one."
        )
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI for c in name):
        raise InputError(
            f"{source}: the name of class {number} holds control characters; type it again."
        )
    colour = row.get("colour", _default_colour(number))
    if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
        raise InputError(
            f"{source}: class {number} cannot have the colour {_short(colour)}; "
            "write it as #rrggbb, for example #e69f00."
        )
    return ClassInfo(number, name.strip(), colour.lower(), row.get("background") is True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON itself would let the last of two equal ids win in silence.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


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


def _default_colour(number: int) -> str:
    return DEFAULT_COLOURS[(number - 1) % len(DEFAULT_COLOURS)]


def _of(name: str) -> str:
    return f" of '{name}'" if name else ""


def _listed(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10])) + (" and others" if len(ids) > 10 else "")
    return f"id {shown}" if len(ids) == 1 else f"ids {shown}"


def _short(value: object) -> str:
    return repr(value)[:40]
