"""PNG, JPEG and their like, and npy."""

from __future__ import annotations

import importlib
import struct
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from napari_convlora.config import MAX_CLASSES, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write
from napari_convlora.formats.limits import check_bytes, refuse_lossy
from napari_convlora.formats.reopened import Reopened
from napari_convlora.images.planes import LazyPlanes, lazy_planes, to_planes
from napari_convlora.images.regions import is_large

READABLE_SUFFIXES = (
    *(".tif", ".tiff", ".png", ".npy", ".jpg", ".jpeg", ".bmp"),
    *(".gif", ".webp", ".jp2", ".ppm", ".pgm", ".pbm", ".tga"),
)

# An explicit list: Pillow's EPS reader would start Ghostscript on a stranger's file.
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "JPEG2000", "PPM", "TGA")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def read_npy(path: Path, *, labels: bool) -> np.ndarray:
    """Return the (P, H, W, C) of an npy file, in its dtype."""
    # Mapped first: a header may claim any size, and mapping fails when the file is shorter.
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    check_bytes(path, mapped.nbytes)
    return to_planes(np.array(mapped), rgb=False if labels else None)


def read_pillow(path: Path, head: bytes, *, labels: bool) -> np.ndarray:
    """Return the (P, H, W, C) of a file that Pillow reads and whose first 26 bytes are `head`."""
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
            refuse_lossy(path)
        # An MPO's further frames are previews or a second view, not planes.
        animated = image.format in ("GIF", "PNG", "WEBP")
        frames = getattr(image, "n_frames", 1) if animated else 1
        check_bytes(path, frames * image.width * image.height * 4)
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
    check_bytes(path, width * height * 8)
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


def open_npy(path: Path) -> list[LazyPlanes]:
    """Open a large npy file; an empty list tells that it is small enough to be read whole."""
    load = partial(np.load, path, mmap_mode="r", allow_pickle=False)
    planes = lazy_planes(Reopened(load), name=f"'{path}'")
    return [planes] if is_large(planes.shape) else []


def palette(classes: Sequence[ClassInfo]) -> np.ndarray:
    """Return the colour (256, 3) uint8 of every id; black where no class has it."""
    colours = np.zeros((MAX_CLASSES + 1, 3), np.uint8)
    for info in classes:
        colours[info.id] = list(bytes.fromhex(info.colour[1:]))
    return colours


def write_palette_png(path: Path, ids: np.ndarray, classes: Sequence[ClassInfo]) -> None:
    """Write class ids (H, W) uint8 as a PNG that viewers show in the class colours."""
    image = Image.fromarray(ids).convert("P")
    image.putpalette(palette(classes).tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG", bits=8, optimize=False)
