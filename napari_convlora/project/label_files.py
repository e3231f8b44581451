"""Annotations of a project: small files, of which older versions are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import tifffile

from napari_convlora.config import MAX_LABEL
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write, make_folder
from napari_convlora.files.checked_json import build, read_json, write_checked_json
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project.layout import inside

FORMAT = 1
VERSIONS = 8
"""Older versions kept of each image's annotations."""

VERSION_SECONDS = 120.0
"""An older version is kept at most this often, so that autosaves do not push the rest out."""

_FOLDER = "versions"
_MOST_REGIONS, _MOST_VERTICES = 10_000, 10_000
T = TypeVar("T")


@dataclass(frozen=True)
class _Region:
    plane: int
    outline: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Regions:
    reviewed: tuple[_Region, ...]


def write_label_file(path: Path, labels: np.ndarray) -> None:
    """Write `labels` (P, H, W) as a compressed TIFF of 8 or 16 bits, atomically.

    Raises
    ------
    InputError
        An id that no label image can hold, or the file cannot be written.
    """
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high > MAX_LABEL:
        raise InputError(
            f"'{path.stem}' is annotated with the id {low if low < 0 else high}, but ids lie "
            f"between 0 and {MAX_LABEL}; erase those pixels."
        )
    with atomic_write(path) as file:
        tifffile.imwrite(
            file,
            labels.astype(np.uint8 if high < 256 else np.uint16),
            photometric="minisblack",
            metadata={"axes": "ZYX"},
            compression="zlib",
            rowsperstrip=labels.shape[1],
        )


def write_regions(path: Path, outlines: Outlines) -> None:
    """Write reviewed regions as JSON: plane and vertices (row, column) in pixels, atomically.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    regions = [{"plane": int(plane), "outline": v.tolist()} for plane, v in outlines]
    write_checked_json(path, {"format": FORMAT, "reviewed": regions})


def read_regions(path: Path, n_planes: int) -> Outlines:
    """Return the reviewed regions in a file; nothing in it is trusted.

    Raises
    ------
    InputError
        It is absent, damaged or too large, or a region is on none of `n_planes` planes.
    """
    data = read_json(path, FORMAT)
    try:
        regions = build(_Regions, data).reviewed
        if len(regions) > _MOST_REGIONS:
            raise ValueError(f"{len(regions)} regions")
        for region in regions:
            if not region.plane < n_planes:
                raise ValueError(f"there is no plane {region.plane}")
            if not 3 <= len(region.outline) <= _MOST_VERTICES:
                raise ValueError(f"an outline of {len(region.outline)} points")
            if any(len(point) != 2 for point in region.outline):
                raise ValueError("a point without row and column")
    except (TypeError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({error}); restore a copy of it.") from error
    return tuple((region.plane, np.array(region.outline)) for region in regions)


def keep_version(path: Path, now: float | None = None, least: float = VERSION_SECONDS) -> None:
    """Keep a copy of the file in `path`, now and then, as it is about to be replaced.

    Parameters
    ----------
    path
        ``<stem>.tif`` or ``<stem>.json``; older versions lie in ``versions`` beside it with a
        number before the ending.
    now
        Seconds since 1970.
    least
        Seconds that must have passed since the copy before.
    """
    now = time.time() if now is None else now
    kept = label_versions(path)
    if path.exists() and (not kept or now - _when(kept[-1]) >= least):
        copy = inside(path.parent, _FOLDER, f"{path.stem}.{round(now * 1000)}{path.suffix}")
        make_folder(copy.parent)
        with contextlib.suppress(OSError):  # today's work matters more than yesterday's
            try:
                os.link(path, copy)  # safe, as a file is replaced and never written into
            except (OSError, NotImplementedError):
                shutil.copyfile(path, copy)
        for old in label_versions(path)[:-VERSIONS]:
            old.unlink(missing_ok=True)


def label_versions(path: Path) -> list[Path]:
    """Return the older versions of a file, oldest first.

    Raises
    ------
    InputError
        One of them, or their folder, is a link.
    """
    found = inside(path.parent, _FOLDER).glob(f"{path.stem}.*{path.suffix}")
    own = [p.name for p in found if p.stem[len(path.stem) + 1 :].isdecimal()]
    return sorted((inside(path.parent, _FOLDER, name) for name in own), key=_when)


def read_current(path: Path, read: Callable[[Path], T | None]) -> T:
    """Return what `read` finds in a file, of which no older version will do.

    Raises
    ------
    InputError
        It is gone or cannot be read, or nothing is found in it.
    """
    found = read(path) if path.is_file() else None  # a pipe would be waited for
    if found is None:
        raise InputError(f"'{path}' is gone; restore a copy of it.")
    return found


def read_newest(path: Path, read: Callable[[Path], T | None]) -> tuple[T | None, str]:
    """Return what `read` finds in a file or in its newest version that can be read, and a note.

    The note says which older version it is, if it is one; None is found where there never was
    a file, or `read` finds None in all of them.

    Raises
    ------
    InputError
        Neither the file nor any older version can be read.
    """
    failure: InputError | None = None
    for candidate in [path, *reversed(label_versions(path))]:
        if candidate.is_file():
            try:
                found = read(candidate)
            except InputError as error:
                failure = failure or error
                continue
            if found is None:
                continue
            what = "is damaged" if path.exists() else "is gone"
            note = f"'{path.name}' {what}; an older version, {candidate.name}, was opened."
            return found, "" if candidate == path else note
    if failure is not None:
        raise failure
    return None, ""


def _when(path: Path) -> float:
    return int(path.stem.rpartition(".")[2]) / 1000
