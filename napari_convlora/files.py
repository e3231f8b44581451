"""Reading images and label images from disk."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image, ImageSequence, UnidentifiedImageError

from napari_convlora.config import InputError
from napari_convlora.planes import size_text, to_planes, unreadable
from napari_convlora.results import check_no_device

logger = logging.getLogger(__name__)

MAX_BYTES = 4_000_000_000
"""Decoded size beyond which a file is refused before anything is allocated."""

MAX_LABEL = 65535
"""Largest id a label image may hold; anything above is not a table of classes or instances."""

READABLE_SUFFIXES = (
    *(".tif", ".tiff", ".png", ".npy", ".jpg", ".jpeg", ".bmp"),
    *(".gif", ".webp", ".jp2", ".ppm", ".pgm", ".pbm", ".tga"),
)

# An explicit list: Pillow's EPS reader would start Ghostscript on a stranger's file.
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "JPEG2000", "PPM", "TGA")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_ALPHA = (1, 2)  # TIFF ExtraSamples: associated and unassociated alpha


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
        if head[:4] in _TIFF_MAGIC:
            planes = _read_tiff(path, labels=labels)
        elif head[:6] == b"\x93NUMPY":
            planes = _read_npy(path, labels=labels)
        else:
            planes = _read_pillow(path, head, labels=labels)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"'{path.name}' does not fit in memory; crop or split it.") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"'{path.name}' is not an image that can be read here; save it as TIFF or PNG."
        ) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise (unreadable(error, f"'{path.name}'") or _damaged(path)) from error
    if planes.dtype.kind not in "biuf":
        raise InputError(f"'{path.name}' holds {planes.dtype} values; save integers or floats.")
    if planes.size == 0:
        raise InputError(f"'{path.name}' has no pixels; save it again from an image that has some.")
    return planes.astype(planes.dtype.newbyteorder("="), copy=False)


def _damaged(path: Path) -> InputError:
    return InputError(
        f"'{path.name}' is damaged or truncated; copy it again or save it again as PNG or TIFF."
    )


def _check_bytes(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(
            f"'{path.name}' would take {size / 1e9:.1f} GB once opened, more than the "
            f"{MAX_BYTES / 1e9:.0f} GB allowed; crop it or split it into several files."
        )


def _refuse_lossy(path: Path) -> None:
    raise InputError(
        f"'{path.name}' is a JPEG, whose compression changes class ids; "
        "export the labels again as PNG or TIFF."
    )


def _read_npy(path: Path, *, labels: bool) -> np.ndarray:
    # Mapped first: a header may claim any size, and mapping fails when the file is shorter.
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    _check_bytes(path, mapped.nbytes)
    return to_planes(np.array(mapped), rgb=False if labels else None)


def _read_tiff(path: Path, *, labels: bool) -> np.ndarray:
    with open_tiff(path, alone=labels) as tif:
        series = first_series(tif, path.name)
        page = series.keyframe
        _check_bytes(path, math.prod(series.shape) * np.dtype(series.dtype).itemsize)
        if labels and page.compression in (6, 7):
            _refuse_lossy(path)
        if not is_whole(tif, series):
            raise _damaged(path)
        array, axes = series.asarray(), series.axes
        colormap = None if labels or tif.is_imagej or page.photometric != 3 else page.colormap
        alpha = "S" in axes and bool(page.extrasamples) and page.extrasamples[-1] in _ALPHA
    if labels and axes == "SYX":
        # Writers that guess from the shape store three or four planes as red, green, blue, alpha.
        return to_planes(array, rgb=False)
    planes = _order_axes(array, axes)
    if colormap is not None:  # ImageJ's colour tables are display settings and stay unused
        table = colormap >> 8 if colormap.max() > 255 else colormap
        planes = table.T.astype(np.uint8)[planes[..., 0]]
    return planes[..., :-1] if alpha and planes.shape[-1] > 1 else planes


def open_tiff(path: Path, *, alone: bool = False) -> tifffile.TiffFile:
    """Open a TIFF, of which parts may lie in other files of its folder.

    Parameters
    ----------
    path
        Its file.
    alone
        Whether to leave out those other files: one that a stranger wrote may name any.

    Raises
    ------
    InputError
        One of the other files is a pipe or device, or is said to lie in another folder.
    """
    if alone:
        return tifffile.TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False)
    with contextlib.ExitStack() as opened:
        tif = opened.enter_context(tifffile.TiffFile(path))
        for name in _parts(tif):
            if os.path.basename(name) != name:
                raise InputError(
                    f"'{path.name}' goes on in {name!r:.200}, but only files in the same folder "
                    "are read; save the whole image as one TIFF."
                )
            check_no_device(os.path.join(tif.filehandle.dirname, name))
        opened.pop_all()
    return tif


def _parts(tif: tifffile.TiffFile) -> Iterator[str]:
    """Yield the names of files that tifffile would open to collect a picture."""
    if tif.is_micromanager:
        folder = Path(tif.filehandle.dirname)
        yield from (path.name for path in folder.glob("*_MMStack*.tif"))
        if tif.is_ndtiff:
            yield (index := "NDTiff.index")
            yield from {entry[1] for entry in tifffile.read_ndtiff_index(folder / index)}
    if tif.is_ome:
        with contextlib.suppress(ElementTree.ParseError):  # tifffile then looks for no other file
            root = ElementTree.fromstring(tif.ome_metadata or "")
            for element in root.iter():
                if element.tag.endswith("UUID") and element.text != root.get("UUID"):
                    yield element.get("FileName", "")


def first_series(tif: tifffile.TiffFile, name: str) -> tifffile.TiffPageSeries:
    """Return the picture that is read of a TIFF, as napari does; say so where there are others."""
    if len(tif.series) > 1:
        logger.warning(
            "'%s' holds %d pictures, of which the first is read; save the others as files of "
            "their own, or all as one stack.",
            name,
            len(tif.series),
        )
    return tif.series[0]


def is_whole(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> bool:
    """Return False where tifffile would only log that pages or pixels lie beyond the end."""
    handle = tif.filehandle
    last = tif.pages.next_page_offset
    if last is not None:
        handle.seek(last)
        raw = handle.read(tif.tiff.offsetsize)
        # The last page that could be read must be the last page: it points to no other.
        if len(raw) < tif.tiff.offsetsize or any(raw):
            return False
    return all(
        offset + count <= page.parent.filehandle.size  # pages of an OME-TIFF may lie in other files
        for page in series.pages
        if page is not None
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
    )


def is_unclear(axes: str) -> bool:
    """Whether tifffile's letters do not tell what is a plane, a row, a column and a channel."""
    counted = set(axes) & set("QI") and not set(axes) & set("SC")
    return bool(counted) or not {"Y", "X"} <= set(axes)


def _order_axes(array: np.ndarray, axes: str) -> np.ndarray:
    """Return (P, H, W, C) from an array and tifffile's letter for each of its axes."""
    if is_unclear(axes):
        return to_planes(array)
    # Beside RGB samples, a C axis counts separate pictures.
    channel = next((letter for letter in "SC" if letter in axes), "")
    rest = [i for i, letter in enumerate(axes) if letter not in f"YX{channel}"]
    order = [*rest, axes.index("Y"), axes.index("X")]
    if channel:
        return to_planes(array.transpose(*order, axes.index(channel)), rgb=True)
    return to_planes(array.transpose(order), rgb=False)


def _read_pillow(path: Path, head: bytes, *, labels: bool) -> np.ndarray:
    if head[:8] == _PNG_MAGIC and len(head) == 26 and head[24] == 16 and head[25] != 0:
        return _read_deep_png(path, *struct.unpack(">II", head[16:24]))
    with warnings.catch_warnings():
        # Our own limit replaces the warning; Pillow's error, at twice the size, stays.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image: Any = Image.open(path, formats=_PILLOW_FORMATS)
        except Image.DecompressionBombError as error:
            raise InputError(
                f"'{path.name}' has too many pixels for its format; save it as TIFF."
            ) from error
    with image:
        if labels and image.format in ("JPEG", "MPO"):
            _refuse_lossy(path)
        # An MPO's further frames are previews or a second view, not planes.
        animated = image.format in ("GIF", "PNG", "WEBP")
        frames = getattr(image, "n_frames", 1) if animated else 1
        _check_bytes(path, frames * image.width * image.height * 4)
        if frames > 1 and labels:
            raise InputError(f"'{path.name}' is an animation; save the labels as a TIFF stack.")
        if frames > 1:
            return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])
        frame = _frame(image, labels=labels)[None]
        depth, colour = head[24:26] if image.format == "PNG" else (8, 0)
        if labels and colour == 0 and depth in (2, 4):
            frame = frame // (255 // (2**depth - 1))  # Pillow spreads grey over 0..255
        return frame


def _frame(image: Any, *, labels: bool) -> np.ndarray:
    """Return (H, W, C) of an open Pillow image, without alpha; palette indices for labels."""
    simple = {"1", "L", "RGB", "I", "F"} | ({"P"} if labels else set())
    grey = {"LA": "L", "La": "L"}
    if image.mode not in simple and not image.mode.startswith("I;16"):
        image = image.convert(grey.get(image.mode, "RGB"))
    array = np.asarray(image)
    if image.mode == "I" and image.format == "PNG":  # older Pillow widens 16-bit grey
        array = array.astype(np.uint16)
    return array.reshape(*array.shape[:2], -1)


def _read_deep_png(path: Path, width: int, height: int) -> np.ndarray:
    """Return (1, H, W, C) uint16 of a 16-bit colour PNG, which Pillow would cut to 8 bits."""
    _check_bytes(path, width * height * 8)
    try:
        codecs: Any = importlib.import_module("imagecodecs")
    except ImportError as error:
        raise InputError(
            f"'{path.name}' is a 16-bit colour PNG; save it as TIFF, "
            "or run: pip install imagecodecs."
        ) from error
    array: np.ndarray = codecs.png_decode(path.read_bytes())
    array = array.reshape(1, *array.shape[:2], -1)
    return array[..., :-1] if array.shape[-1] in (2, 4) else array
