"""Label images of a project: small files, of which older versions are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import tifffile

from napari_convlora.config import InputError
from napari_convlora.files import MAX_LABEL, atomic_write, make_folder, read_labels

VERSIONS = 8
"""Older versions kept of each image's annotations."""

VERSION_SECONDS = 120.0
"""An older version is kept at most this often, so that autosaves do not push the rest out."""

_FOLDER = "versions"


def write_labels(path: Path, labels: np.ndarray) -> None:
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


def replace_labels(path: Path, labels: np.ndarray, now: float | None = None) -> None:
    """Write `labels` over those in `path`, of which an older version is kept now and then.

    Parameters
    ----------
    path
        ``<stem>.tif``; older versions lie in ``versions`` beside it as ``<stem>.<number>.tif``.
    labels : (P, H, W) int
    now
        Seconds since 1970.
    """
    now = time.time() if now is None else now
    kept = versions(path)
    if path.exists() and (not kept or now - _when(kept[-1]) >= VERSION_SECONDS):
        make_folder(path.parent / _FOLDER)
        copy = path.parent / _FOLDER / f"{path.stem}.{round(now * 1000)}.tif"
        with contextlib.suppress(OSError):  # today's work matters more than yesterday's
            try:
                os.link(path, copy)  # safe, as a file is replaced and never written into
            except (OSError, NotImplementedError):
                shutil.copyfile(path, copy)
        for old in versions(path)[:-VERSIONS]:
            old.unlink(missing_ok=True)
    write_labels(path, labels)


def versions(path: Path) -> list[Path]:
    """Return the older versions of a label image, oldest first."""
    found = (path.parent / _FOLDER).glob(f"{path.stem}.*.tif")
    own = [p for p in found if p.name[len(path.stem) + 1 : -4].isdecimal()]
    return sorted(own, key=_when)


def read_newest(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, Path]:
    """Return the labels (P, H, W) int32 in `path`, or in its newest version that can be read.

    The file that was read comes with them; labels are None where there never were any.

    Raises
    ------
    InputError
        Neither the file nor any older version can be read.
    """
    failure: InputError | None = None
    for candidate in [path, *reversed(versions(path))]:
        if candidate.is_file():
            try:
                return read_labels(candidate, shape), candidate
            except InputError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return None, path


def _when(path: Path) -> float:
    return int(path.stem.rpartition(".")[2]) / 1000
