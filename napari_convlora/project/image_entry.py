"""One image of a project: where it is, how it was read and looked at."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.errors import InputError
from napari_convlora.files.checked_json import LARGEST
from napari_convlora.formats.ome_zarr import is_zarr
from napari_convlora.formats.opening import open_image, open_levels
from napari_convlora.images.planes import (
    LazyPlanes,
    Planes,
    drop_alpha,
    lazy_planes,
    respaced,
    size_text,
    to_planes,
)
from napari_convlora.images.regions import plan_blocks

_ENDS = 65536
_STEM = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_MOST_AXES = 16


@dataclass(frozen=True)
class Viewpoint:
    """How an image was looked at.

    Parameters
    ----------
    point
        World coordinates of the plane, an axis each.
    center, zoom
        Of the camera.
    contrast
        Values shown as black and as white.
    """

    point: tuple[float, ...]
    center: tuple[float, ...]
    zoom: float
    contrast: tuple[float, ...]

    @property
    def sane(self) -> bool:
        """Whether a viewer can show it, and a project hold it."""
        numbers = *self.point, *self.center, self.zoom, *self.contrast
        return (
            all(abs(n) < LARGEST for n in numbers)
            and (len(self.center), len(self.contrast)) == (3, 2)
            and len(self.point) <= _MOST_AXES
            and self.zoom > 0
            and self.contrast[0] < self.contrast[1]
        )


@dataclass(frozen=True)
class ImageEntry:
    """One image of a project, by reference.

    Parameters
    ----------
    stem
        Name of its files in the project.
    name
        What people call it: the name of its layer.
    path, absolute
        Where it is, from the project's folder and from the root; the first that exists counts.
        Both are "" if no file holds it.
    shape
        (P, H, W, C) as the engine sees it.
    layer_shape, rgb, channel_axis
        How a napari layer holds the same pixels.
    dtype
        Of the pixels.
    fingerprint
        Of the file's content; "" if unknown, as of a folder.
    scale, translate
        Of the layer.
    counts
        Painted pixels by class id.
    regions
        How many reviewed regions there are.
    view
        How it was last looked at; None if unknown.
    """

    stem: str
    name: str
    path: str
    absolute: str
    shape: tuple[int, int, int, int]
    layer_shape: tuple[int, ...]
    rgb: bool = False
    channel_axis: int | None = None
    dtype: str = ""
    fingerprint: str = ""
    scale: tuple[float, ...] = ()
    translate: tuple[float, ...] = ()
    counts: dict[int, int] = field(default_factory=dict)
    regions: int = 0
    view: Viewpoint | None = None

    @property
    def annotated(self) -> bool:
        """Whether something is painted, or complete as it is."""
        return bool(self.counts or self.regions)

    @property
    def homeless(self) -> str:
        """A sentence if only the viewer holds the image, as it is too large to be copied."""
        if self.absolute:
            return ""
        return (
            f"'{self.name}' is too large to be copied into the project, and no file holds it as "
            "it is shown; save it as a TIFF or zarr and press Locate to show where; its strokes "
            "are kept."
        )

    def places(self, folder: Path) -> list[Path]:
        """Return where the image may be; the first is in or beside the project."""
        return [folder / self.path, Path(self.absolute)] if self.absolute else []

    def find(self, folder: Path) -> Path:
        """Return where the image is.

        Raises
        ------
        InputError
            It is at neither of its two places.
        """
        if self.homeless:
            raise InputError(self.homeless)
        # A pipe would be waited for, and a network name would be logged on to.
        places = [p for p in self.places(folder) if not _is_remote(p)]
        found = [p for p in places if p.is_file() or is_zarr(p)]
        if not found:
            raise InputError(
                f"The image '{self.name}' is no longer at {self.absolute}; put it back, or open "
                "the project in the window and press Locate."
            )
        same = [p for p in found if fingerprint(p) == self.fingerprint]
        return (same or found)[0]

    def read(self, folder: Path) -> Planes:
        """Return the pixels (P, H, W, C); of a large image or a zarr none is read yet.

        Raises
        ------
        InputError
            The image is absent, unreadable or has another size than when it was annotated.
        """
        return self.levels(folder)[0]

    def levels(self, folder: Path) -> list[Planes]:
        """Return the pixels as `read`, and the smaller copies that a large image may have."""
        path = self.find(folder)
        opened = open_levels(path)
        levels = [level for level in map(self._as_annotated, opened) if level is not None]
        planes = levels[0] if levels else opened[0]
        if planes.shape != self.shape or not levels:
            raise InputError(
                f"'{path}' is {size_text(planes.shape[:3])} with {planes.shape[3]} channels, but "
                f"{size_text(self.shape[:3])} with {self.shape[3]} were annotated; "
                "show where that image is with Locate."
            )
        return levels

    def _as_annotated(self, planes: Planes) -> Planes | None:
        """Return `planes` of a file with the axes that the layer's user has chosen.

        None if they have other axes and are not in memory.
        """
        how: dict[str, Any] = {"rgb": self.rgb, "channel_axis": self.channel_axis}
        if isinstance(planes, LazyPlanes):
            # The layer shows the same array, but for axes of length 1.
            longer = iter([n for n in planes.source.shape if n > 1])
            shape = tuple(next(longer, 0) if n > 1 else 1 for n in self.layer_shape)
            source = respaced(planes.source, shape)
            if source is None:
                return None
            return lazy_planes(source, **how, alpha=self.rgb, name=planes.name)
        if planes.shape != self.shape and planes.size == math.prod(self.layer_shape):
            # A file that does not say which axis holds channels; the layer's user did.
            planes = to_planes(planes.reshape(self.layer_shape), **how)
            planes = drop_alpha(planes) if self.rgb else planes
        return planes

    def holds(self, pixels: Planes) -> bool:
        """Whether the file at `absolute` holds `pixels`; of those on disk one block is compared."""
        if not self.absolute:
            return False
        try:
            found = replace(self, path=self.absolute).read(Path())
        except InputError:
            return False
        blocks = plan_blocks(found.shape)
        if not isinstance(pixels, np.ndarray):
            blocks = blocks[len(blocks) // 2 :][:1]
        try:
            return found.shape == pixels.shape and all(
                np.array_equal(
                    found[b.plane][b.rows, b.columns], pixels[b.plane][b.rows, b.columns]
                )
                for b in blocks
            )
        except InputError:  # damaged there: what is in memory is better than the file
            return not isinstance(pixels, np.ndarray)

    def as_layer(self, planes: Planes) -> Any:
        """Return `planes` (P, H, W, C) in the shape that a napari layer holds, as a view."""
        if isinstance(planes, LazyPlanes):
            return planes.source
        if self.channel_axis is not None:
            leading = list(self.layer_shape)
            channels = leading.pop(self.channel_axis)
            return np.moveaxis(planes.reshape(*leading, channels), -1, self.channel_axis)
        if self.rgb:
            return planes.reshape(*self.layer_shape[:-1], planes.shape[-1])
        return planes.reshape(self.layer_shape)

    def moved(self, path: Path, folder: Path) -> ImageEntry:
        """Return the entry with the image at `path`, for a project in `folder`."""
        absolute = path.absolute()
        return replace(
            self,
            path=_relative(absolute, folder),
            absolute=str(absolute),
            fingerprint=fingerprint(absolute),
        )

    def rebased(self, folder: Path, other: Path) -> ImageEntry:
        """Return the entry of a project in `folder` as seen from a folder `other`."""
        return replace(self, path=_relative(folder / self.path, other)) if self.absolute else self


def check_entries(images: Sequence[ImageEntry]) -> None:
    """Raise a ``ValueError`` unless the images have sizes, and files of their own.

    A stem becomes part of a path that is written to, so that it must not lead anywhere else.
    """
    for entry in images:
        if not _STEM.fullmatch(entry.stem):
            raise ValueError(f"an image cannot have the file name {entry.stem[:40]!r}")
        axis = entry.channel_axis
        if len(entry.shape) != 4 or not all(0 < n < 2**31 for n in entry.shape):
            raise ValueError(f"the image {entry.stem} has no size")
        if entry.view is not None and not entry.view.sane:
            raise ValueError(f"the image {entry.stem} cannot be looked at in that way")
        if not 2 <= len(entry.layer_shape) <= _MOST_AXES or (axis or 0) >= len(entry.layer_shape):
            raise ValueError(f"the image {entry.stem} has no layer shape")
    if len({entry.stem.lower() for entry in images}) < len(images):
        raise ValueError("two images share their files")


def new_stem(name: str, taken: set[str]) -> str:
    """Return a file name for `name` that no other image has, whatever the file system."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:80] or "image"
    stem, i = plain, 1
    while stem.lower() in {t.lower() for t in taken}:
        i += 1
        stem = f"{plain}_{i}"
    return stem


def fingerprint(path: Path) -> str:
    """Return a hash of size and both ends of a file, quick for any size; "" if unreadable."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return ""
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            return hashlib.sha256(b"%d " % size + head + file.read(_ENDS)).hexdigest()[:32]
    except OSError:
        return ""


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return str(path.absolute())


def _is_remote(path: Path) -> bool:
    return str(path).startswith(("\\\\", "//"))


def entry_of_file(path: Path) -> ImageEntry:
    """Return the entry of an image file as a layer would show it, without a stem yet.

    Raises
    ------
    InputError
        It cannot be read.
    """
    planes = open_image(path)
    depth, height, width, channels = planes.shape
    leading = () if depth == 1 else (depth,)
    rgb = channels == 3 and planes.dtype == np.uint8
    if channels == 1:
        shape: tuple[int, ...] = (*leading, height, width)
    else:
        shape = (*leading, height, width, 3) if rgb else (*leading, channels, height, width)
    channel_axis = None if rgb or channels == 1 else len(leading)
    if isinstance(planes, LazyPlanes):  # it is shown as the file holds it
        shape = planes.source.shape
        rgb = rgb and planes.channel == len(shape) - 1
        channel_axis = None if rgb else planes.channel
    return ImageEntry(
        stem="",
        name=path.stem,
        path="",
        absolute=str(path.absolute()),
        shape=planes.shape,
        layer_shape=shape,
        rgb=rgb,
        channel_axis=channel_axis,
        dtype=str(planes.dtype),
    )
