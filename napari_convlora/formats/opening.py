"""Opens any image or label image: the content decides, not the suffix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from napari_convlora.config import MAX_LABEL
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.formats.limits import damaged
from napari_convlora.formats.ome_zarr import is_zarr, open_zarr
from napari_convlora.formats.plain import open_npy, read_npy, read_pillow
from napari_convlora.formats.tiff import TIFF_MAGIC, open_large_tiff, read_tiff
from napari_convlora.images.planes import LazyPlanes, Planes, size_text, unreadable


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the image in `path` as (P, H, W, C), in the dtype of the file.

    Parameters
    ----------
    path
        TIFF (plain, ImageJ, OME), PNG, JPEG and the like, or ``.npy``. The content decides, not
        the suffix. Time, z and any further axes become planes. Palettes become RGB, and a
        channel that the file marks as alpha is dropped.

    Returns
    -------
    planes : (P, H, W, C) bool, integer or float
        Values as stored. EXIF rotation is not applied, as napari does not apply it either.

    Raises
    ------
    InputError
        The file is absent, damaged, truncated, empty, too large, a pipe or not an image.
    """
    return _read(Path(path), labels=False)


def read_labels(
    path: str | os.PathLike[str], shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Return the label image in `path` as (P, H, W) int32.

    Parameters
    ----------
    path
        TIFF, PNG (palette indices are kept) or another lossless format, of integers or bool. No
        other file is read that a TIFF may name as a part of it.
    shape
        (P, H, W) the labels must have.

    Returns
    -------
    labels : (P, H, W) int32, 0..65535

    Raises
    ------
    InputError
        As :func:`read_image`, and for float, negative, too large, colour-coded or
        JPEG-compressed labels, and labels of another size than `shape`.
    """
    path = Path(path)
    planes = _read(path, labels=True)
    if planes.dtype.kind == "f":
        raise InputError(
            f"'{path.name}' holds {planes.dtype} values, but labels are whole numbers; "
            "save it as an 8- or 16-bit integer image."
        )
    channels = planes.shape[3]
    if channels > 1 and not (planes == planes[..., :1]).all():
        raise InputError(
            f"'{path.name}' has {channels} channels, but a label image has one; convert its "
            "colours to class ids (1, 2, ...) and save it as a single-channel PNG or TIFF."
        )
    labels = planes[..., 0]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > MAX_LABEL:
        raise InputError(
            f"'{path.name}' holds the value {low if low < 0 else high}, but labels lie between 0 "
            f"and {MAX_LABEL}; renumber its classes from 1 and use 0 for unlabelled pixels."
        )
    if shape is not None and labels.shape != tuple(shape):
        raise InputError(
            f"'{path.name}' is {size_text(labels.shape)}, but its image is {size_text(shape)}; "
            "use the label image that belongs to it, at the same size."
        )
    return labels.astype(np.int32, order="C")


def _read(path: Path, *, labels: bool) -> np.ndarray:
    """Return (P, H, W, C) of any readable file; every failure leaves as an InputError."""
    check_no_device(path)
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        reasons = {
            FileNotFoundError: "does not exist; check the path",
            IsADirectoryError: "is a folder; give one image file",
            PermissionError: "may not be read; ask for access or copy it to your own folder",
        }
        reason = reasons.get(type(error), f"cannot be opened ({error.strerror}); check the path")
        raise InputError(f"'{path}' {reason}.") from error
    if not head:
        raise InputError(f"'{path.name}' is empty (0 bytes); save or copy it again.")
    try:
        if head[:4] in TIFF_MAGIC:
            planes = read_tiff(path, labels=labels)
        elif head[:6] == b"\x93NUMPY":
            planes = read_npy(path, labels=labels)
        else:
            planes = read_pillow(path, head, labels=labels)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"'{path.name}' does not fit in memory; crop or split it.") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"'{path.name}' is not an image that can be read here; save it as TIFF or PNG."
        ) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise (unreadable(error, f"'{path.name}'") or damaged(path)) from error
    if planes.dtype.kind not in "biuf":
        raise InputError(f"'{path.name}' holds {planes.dtype} values; save integers or floats.")
    if planes.size == 0:
        raise InputError(f"'{path.name}' has no pixels; save it again from an image that has some.")
    return planes.astype(planes.dtype.newbyteorder("="), copy=False)


def open_image(path: Path) -> Planes:
    """Open an image: one that is large, or a zarr, is read where and when it is looked at.

    Parameters
    ----------
    path
        A zarr array, an OME-Zarr (its level of full resolution), or any file of `read_image`.

    Raises
    ------
    InputError
        As `read_image`.
    """
    return open_levels(path)[0]


def open_levels(path: Path) -> Sequence[Planes]:
    """Open an image as `open_image`, and the smaller copies that its file holds of a large one."""
    lazy: list[LazyPlanes] = []
    try:
        if os.path.isdir(path):  # Path's would raise where it may not look
            if not is_zarr(path):
                raise InputError(
                    f"'{path.name}' is a folder, but no zarr; give the images in it, such as "
                    f"{path.name}/*.tif."
                )
            lazy = open_zarr(path)
        elif os.path.isfile(path) and path.stat().st_size:
            lazy = open_npy(path) if path.suffix.lower() == ".npy" else open_large_tiff(path)
    except InputError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        if os.path.isfile(path):
            return [read_image(path)]  # which says what is wrong with it
        raise InputError(
            f"'{path.name}' cannot be read ({str(error) or type(error).__name__:.200}); "
            "give an image file, a zarr array or an OME-Zarr."
        ) from error
    return lazy if lazy else [read_image(path)]
