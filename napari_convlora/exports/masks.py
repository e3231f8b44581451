"""Masks and class probabilities as files that other programs open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from napari_convlora.config import CLASSES_FILE, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.formats.plain import write_palette_png
from napari_convlora.formats.tiff import tiff_colours, write_tiff
from napari_convlora.labels.classes import read_classes, write_classes

_TIFF = (".tif", ".tiff")


def save_masks(
    labels: np.ndarray, path: str | os.PathLike[str], classes: Sequence[ClassInfo]
) -> Path:
    """Write `labels` as palette TIFF or PNG, and the class table beside it.

    Parameters
    ----------
    labels : (H, W) or (P, H, W) bool or int
        Class ids; 0 means unlabelled.
    path
        ``.tif``, ``.tiff`` or ``.png``: a palette image whose uint8 indices are the ids (which end
        at 255), shown in the class colours; as PNG a single plane only.
    classes
        The class table; every id in `labels` must be in it.

    Returns
    -------
    table
        Where the class table is; see :func:`write_table_beside`.

    Raises
    ------
    InputError
        Another suffix, a stack as PNG, ids outside the class table, or a folder that cannot be
        written.
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
    ids = labels.astype(np.uint8)
    if suffix == ".png":
        write_palette_png(path, ids.reshape(ids.shape[-2:]), classes)
    else:
        write_tiff(path, ids, "YX" if ids.ndim == 2 else "ZYX", tiff_colours(classes))
    return write_table_beside(path, classes)  # last, as it must not rename a mask that stays


def save_probabilities(
    probabilities: np.ndarray, path: str | os.PathLike[str], classes: Sequence[ClassInfo]
) -> Path:
    """Write class probabilities as a zlib-compressed float32 TIFF, and the class table beside it.

    Parameters
    ----------
    probabilities : (K, H, W) or (P, K, H, W) float
        One channel per class, in the order of `classes`.
    path
        ``.tif`` or ``.tiff``.
    classes
        The class table, of K rows.

    Returns
    -------
    table
        Where the class table is; see :func:`write_table_beside`.

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
    axes = "CYX" if len(shape) == 3 else "ZCYX"
    # Said aloud, as tifffile takes 3 or 4 planes or columns for colours otherwise.
    write_tiff(path, probabilities.astype(np.float32), axes, {"photometric": "minisblack"})
    return write_table_beside(path, classes)


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    if path.suffix.lower() not in allowed:
        raise InputError(f"'{path.name}' ends in '{path.suffix}'; use one of {', '.join(allowed)}.")
    return path.suffix.lower()


def write_table_beside(path: Path, classes: Sequence[ClassInfo]) -> Path:
    """Write the class table of the masks in `path` into their folder.

    It is ``classes.json``, which names the masks of the whole folder and is never replaced. Where
    another table is, or anything else of that name, the mask gets its own, such as
    ``cells.tif.classes.json`` for ``cells.tif``, which counts before the one of the folder.

    Returns
    -------
    table
        Where the class table of the masks is.

    Raises
    ------
    InputError
        It cannot be written, or a file of the mask's own name is no class table.
    """
    shared, own = path.parent / CLASSES_FILE, path.with_name(f"{path.name}.{CLASSES_FILE}")
    if own.exists():
        try:
            read_classes(own)
        except InputError as error:
            raise InputError(
                f"'{own}' is not a class table and would be replaced; rename it or export to "
                "another folder."
            ) from error
    elif not shared.exists():
        own = shared
    else:
        try:
            if read_classes(shared) == tuple(classes):
                return shared  # a folder of a thousand masks needs one write, not a thousand
        except InputError:
            pass  # somebody else's file
    write_classes(own, classes)
    return own
