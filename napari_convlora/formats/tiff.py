"""TIFF: plain, ImageJ and OME."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write, check_no_device
from napari_convlora.formats.label_store import LabelStore, axes_of
from napari_convlora.formats.limits import check_bytes, damaged, refuse_lossy
from napari_convlora.formats.plain import palette
from napari_convlora.formats.reopened import Reopened
from napari_convlora.images.geometry import order_axes, planes_by_letters
from napari_convlora.images.planes import LazyPlanes, to_planes
from napari_convlora.images.regions import BLOCK, Block, is_large

logger = logging.getLogger(__name__)
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ALPHA = (1, 2)  # TIFF ExtraSamples: associated and unassociated alpha


MOST_CLASSIC_BYTES = 3_900_000_000
"""Of pixels in a classic TIFF, whose offsets end at 4 GB; more need a BigTIFF."""

_MAX_CHUNK = 256 * 1024**2
"""Bytes of a piece of a file that can only be decoded as a whole."""


def read_tiff(path: Path, *, labels: bool) -> np.ndarray:
    """Return the (P, H, W, C) of a TIFF, in its dtype; palettes become RGB but for labels."""
    with open_tiff(path, alone=labels) as tif:
        series = first_series(tif, path.name)
        page = series.keyframe
        check_bytes(path, math.prod(series.shape) * np.dtype(series.dtype).itemsize)
        if labels and page.compression in (6, 7):
            refuse_lossy(path)
        if not is_whole(tif, series):
            raise damaged(path)
        array, axes = series.asarray(), series.axes
        colormap = page.colormap if _has_palette(tif, page) and not labels else None
        alpha = _has_alpha(series)
    if labels and axes == "SYX":
        # Writers that guess from the shape store three or four planes as red, green, blue, alpha.
        return to_planes(array, rgb=False)
    planes = order_axes(array, axes)
    if colormap is not None:
        table = colormap >> 8 if colormap.max() > 255 else colormap
        planes = table.T.astype(np.uint8)[planes[..., 0]]
    return planes[..., :-1] if alpha and planes.shape[-1] > 1 else planes


def _has_palette(tif: tifffile.TiffFile, page: Any) -> bool:
    """Whether pixels are indices of colours; ImageJ's colour tables are display settings."""
    return page.photometric == tifffile.PHOTOMETRIC.PALETTE and not tif.is_imagej


def _has_alpha(series: tifffile.TiffPageSeries) -> bool:
    """Whether the last sample of a pixel is said to be alpha."""
    extra = series.keyframe.extrasamples
    return "S" in series.axes and bool(extra) and extra[-1] in _ALPHA


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


def open_large_tiff(path: Path) -> list[LazyPlanes]:
    """Open a large TIFF whose pieces are small; nothing of any other file."""
    try:
        tif = open_tiff(path)
    except tifffile.TiffFileError:
        return []
    with tif:
        series = tif.series[0]
        page = series.keyframe
        if (
            _has_palette(tif, page)
            or not is_large([math.prod(series.shape)])
            or not is_whole(tif, series)
        ):
            return []
        if series.dataoffset is not None:
            opened = [partial(tifffile.memmap, path, mode="r")]
        elif math.prod(page.chunks) * series.dtype.itemsize > _MAX_CHUNK:
            return []
        else:
            opened = [partial(_tiff_level, path, i) for i in range(len(series.levels))]
        alpha, axes = _has_alpha(series), series.axes
    planes = [planes_by_letters(Reopened(array), axes, path, alpha) for array in opened]
    return planes if is_large(planes[0].shape) else []


def _tiff_level(path: Path, level: int) -> Any:
    """Open one level of a TIFF as an array; the file is closed when nobody holds the array."""
    with ExitStack() as opened:
        tif = opened.enter_context(open_tiff(path))
        array = zarr.open_array(tif.series[0].aszarr(level=level), mode="r")
        weakref.finalize(array, opened.pop_all().close)
    return array


def save_tiff(store: LabelStore, path: Path, classes: Sequence[ClassInfo]) -> None:
    """Write a finished store as a tiled palette TIFF, which appears once it is whole."""
    array = store.array

    def tiles() -> Iterator[np.ndarray]:
        steps = (range(0, n, BLOCK) for n in store.shape[1:])
        for plane, top, left in itertools.product(range(store.shape[0]), *steps):
            yield store.read(Block(plane, top, left, BLOCK, BLOCK))

    with atomic_write(path) as file:
        tifffile.imwrite(
            file,
            tiles(),
            shape=array.shape,
            dtype=np.uint8,
            tile=(BLOCK, BLOCK),
            metadata={"axes": axes_of(array.shape).upper()},
            compression="zlib",
            bigtiff=array.nbytes > MOST_CLASSIC_BYTES,
            **tiff_colours(classes),
        )


def tiff_colours(classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """Arguments of tifffile's `imwrite` with which viewers show uint8 ids in their colours."""
    return {"photometric": "palette", "colormap": 257 * palette(classes).T.astype(np.uint16)}


def write_tiff(path: Path, array: np.ndarray, axes: str, colours: dict[str, Any]) -> None:
    """Write a zlib-compressed TIFF; `colours` are arguments of tifffile's `imwrite`."""
    with atomic_write(path) as file:
        tifffile.imwrite(
            file,
            array,
            metadata={"axes": axes},
            compression="zlib",
            bigtiff=array.nbytes > MOST_CLASSIC_BYTES,
            **colours,
        )
