"""Masks, class probabilities and training histories as files that other programs open."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from napari_convlora.annotations import read_classes, write_classes
from napari_convlora.config import MAX_CLASSES, ClassInfo, InputError
from napari_convlora.events import Event, Scored, Step
from napari_convlora.results import atomic_write

CLASSES_FILE = "classes.json"
"""Name of the class table written beside exported masks."""

_TIFF = (".tif", ".tiff")


def save_masks(
    labels: np.ndarray, path: str | os.PathLike[str], classes: Sequence[ClassInfo]
) -> None:
    """Write `labels` as palette TIFF or PNG, and the class table as ``classes.json`` beside it.

    Parameters
    ----------
    labels : (H, W) or (P, H, W) bool or int
        Class ids; 0 means unlabelled.
    path
        ``.tif``, ``.tiff`` or ``.png``: a palette image whose uint8 indices are the ids (which end
        at 255), shown in the class colours; as PNG a single plane only.
    classes
        The class table; every id in `labels` must be in it.

    Raises
    ------
    InputError
        Another suffix, a stack as PNG, ids outside the class table, a ``classes.json`` beside
        `path` that is something else, or a folder that cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path, (*_TIFF, ".png"))
    if labels.ndim not in (2, 3) or labels.size == 0 or labels.dtype.kind not in "biu":
        raise InputError(
            f"Masks must be (H, W) or (P, H, W) whole numbers, not {labels.dtype} of shape "
            f"{labels.shape}; export a Labels layer."
        )
    if suffix == ".png" and labels.ndim == 3 and len(labels) > 1:
        raise InputError(
            f"'{path.name}' cannot hold {len(labels)} planes, as PNG stores one; export as TIFF."
        )
    unknown = np.setdiff1d(labels, [0, *(info.id for info in classes)])
    if unknown.size:
        raise InputError(
            f"The masks use the ids {unknown[:10].tolist()}, not in the class table; "
            "add them to the table or erase those pixels."
        )
    write_table_beside(path, classes)
    ids = labels.astype(np.uint8)
    if suffix == ".png":
        _write_palette_png(path, ids.reshape(ids.shape[-2:]), classes)
    else:
        _write_tiff(path, ids, "YX" if ids.ndim == 2 else "ZYX", tiff_colours(classes))


def save_probabilities(
    probabilities: np.ndarray, path: str | os.PathLike[str], classes: Sequence[ClassInfo]
) -> None:
    """Write class probabilities as a zlib-compressed float32 TIFF, with ``classes.json`` beside.

    Parameters
    ----------
    probabilities : (K, H, W) or (P, K, H, W) float
        One channel per class, in the order of `classes`.
    path
        ``.tif`` or ``.tiff``.
    classes
        The class table, of K rows.

    Raises
    ------
    InputError
        Another suffix, other than K channels, or as :func:`save_masks`.
    """
    path = Path(path)
    _suffix(path, _TIFF)
    shape = probabilities.shape
    if len(shape) not in (3, 4) or shape[-3] != len(classes) or not probabilities.size:
        raise InputError(
            f"Probabilities of shape {shape} do not fit {len(classes)} classes; "
            "give (K, H, W) or (P, K, H, W) with one channel per class."
        )
    write_table_beside(path, classes)
    axes = "CYX" if len(shape) == 3 else "ZCYX"
    # Said aloud, as tifffile takes 3 or 4 planes or columns for colours otherwise.
    _write_tiff(path, probabilities.astype(np.float32), axes, {"photometric": "minisblack"})


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    if path.suffix.lower() not in allowed:
        raise InputError(f"'{path.name}' ends in '{path.suffix}'; use one of {', '.join(allowed)}.")
    return path.suffix.lower()


def write_table_beside(path: Path, classes: Sequence[ClassInfo]) -> None:
    """Write the class table as ``classes.json`` into the folder of `path`.

    Raises
    ------
    InputError
        A file of that name is there and is no class table, or it cannot be written.
    """
    beside = path.parent / CLASSES_FILE
    if beside.exists():
        try:
            same = read_classes(beside) == tuple(classes)
        except InputError as error:
            raise InputError(
                f"'{beside}' is not a class table and would be replaced; "
                "rename it or export to another folder."
            ) from error
        if same:  # a folder of a thousand masks needs one write, not a thousand
            return
    write_classes(beside, classes)


def tiff_colours(classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """Arguments of tifffile's `imwrite` with which viewers show uint8 ids in their colours."""
    return {"photometric": "palette", "colormap": 257 * _palette(classes).T.astype(np.uint16)}


def _palette(classes: Sequence[ClassInfo]) -> np.ndarray:
    palette = np.zeros((MAX_CLASSES + 1, 3), np.uint8)
    for info in classes:
        palette[info.id] = list(bytes.fromhex(info.colour[1:]))
    return palette


def _write_palette_png(path: Path, ids: np.ndarray, classes: Sequence[ClassInfo]) -> None:
    image = Image.fromarray(ids).convert("P")
    image.putpalette(_palette(classes).tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG", bits=8, optimize=False)


def _write_tiff(path: Path, array: np.ndarray, axes: str, colours: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        tifffile.imwrite(
            file,
            array,
            metadata={"axes": axes},
            compression="zlib",
            bigtiff=array.nbytes > 3_900_000_000,
            **colours,
        )


def write_history(path: str | os.PathLike[str], events: Iterable[Event]) -> None:
    """Write what a round reported as CSV: step, loss, seconds, score, held_out.

    Parameters
    ----------
    path
        ``.csv`` file to create or replace.
    events
        Of one round, in any order; others than `Step` and `Scored` are skipped.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    rows: dict[int, dict[str, object]] = {}
    for event in events:
        if isinstance(event, Step):
            found: dict[str, object] = {"loss": event.loss, "seconds": round(event.seconds, 3)}
        elif isinstance(event, Scored):
            found = {"score": event.score, "held_out": event.held_out}
        else:
            continue
        rows[event.step] = rows.get(event.step, {}) | found
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["step", "loss", "seconds", "score", "held_out"])
    table.writeheader()
    table.writerows({"step": step} | row for step, row in sorted(rows.items()))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
