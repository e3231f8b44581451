"""Zarr arrays and OME-Zarr."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zarr

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.formats.label_store import (
    IDENTITY_KEY,
    LabelStore,
    OnlyFiles,
    create_array,
    to_go_on,
)
from napari_convlora.images.geometry import planes_by_letters
from napari_convlora.images.planes import LazyPlanes, lazy_planes
from napari_convlora.images.regions import BLOCK

_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_SMALLEST = 1024
"""Longer side in pixels at which an OME-Zarr needs no smaller copy."""


def is_zarr(path: Path) -> bool:
    """Whether `path` is the folder of a zarr array or group."""
    return any((path / name).is_file() for name in _ZARR_FILES)


def open_zarr(path: Path) -> list[LazyPlanes]:
    """Open the levels of a zarr array or an OME-Zarr, the largest first."""
    node: Any = zarr.open(OnlyFiles(path, read_only=True), mode="r")
    names: Any = None
    nodes = [node]
    if isinstance(node, zarr.Group):
        attributes: Any = node.attrs.asdict()
        if "bioformats2raw.layout" in attributes.get("ome", attributes):
            node = node["0"]
            attributes = node.attrs.asdict()
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            raise InputError(
                f"'{path.name}' is a zarr group without OME-Zarr metadata; give the path of one "
                "of its arrays."
            )
        axes = scales[0].get("axes", list("tczyx"))
        names = [axis["name"] if isinstance(axis, dict) else axis for axis in axes]
        first, *smaller = (level["path"] for level in scales[0]["datasets"])
        nodes = [node[first], *(node[name] for name in smaller if name in node)]
    elif node.metadata.zarr_format == 3:
        names = node.metadata.dimension_names
    if names is not None and all(isinstance(n, str) and len(n) == 1 for n in names):
        return [planes_by_letters(node, "".join(names).upper(), path) for node in nodes]
    return [lazy_planes(node, name=f"'{path}'") for node in nodes]


def check_replaceable(path: Path) -> None:
    """Raise an `InputError` if an OME-Zarr at `path` would replace something that is not ours."""
    if path.exists() and not (path.is_dir() and _ours(path)):
        raise InputError(f"'{path}' exists and is not a prediction; choose another --out.")


def _ours(path: Path) -> bool:
    try:
        return IDENTITY_KEY in zarr.open_group(OnlyFiles(path, read_only=True), mode="r").attrs
    except Exception:  # parsers of what is no group raise nearly anything
        return False


def save_zarr(store: LabelStore, path: Path, classes: Sequence[ClassInfo]) -> None:
    """Turn a finished store into an OME-Zarr (OME-NGFF 0.5) with smaller copies, at `path`.

    Parameters
    ----------
    store
        Moved, so that it cannot be used any more.
    path
        An older prediction there is replaced.
    classes
        Whose colours the image shows.

    Raises
    ------
    InputError
        Something else is there, or the disk is full.
    """
    check_replaceable(path)
    with to_go_on(path):
        levels = [store.array]
        while max(levels[-1].shape[-2:]) > _SMALLEST:
            levels.append(_half(levels[-1], store.folder / str(len(levels))))
        group = zarr.open_group(store.folder, mode="r+")
        group.attrs["ome"] = _ome(levels[0].ndim, len(levels), path.stem, classes)
        old = store.folder.with_name(f"{store.folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)  # a kill may have left it
        if path.exists():
            path.rename(old)
        store.folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _half(array: Any, path: Path) -> Any:
    """Every other pixel of `array`, as an array at `path`."""
    shape = (*array.shape[:-2], *(-(-n // 2) for n in array.shape[-2:]))
    shutil.rmtree(path, ignore_errors=True)
    half = create_array(path, shape)
    steps = (range(0, n, step) for n, step in zip(shape, half.chunks, strict=True))
    for *plane, top, left in itertools.product(*steps):
        window = array[(*plane, *(slice(2 * i, 2 * (i + BLOCK), 2) for i in (top, left)))]
        half[(*plane, slice(top, top + BLOCK), slice(left, left + BLOCK))] = window
    return half


def _ome(n_axes: int, n_levels: int, name: str, classes: Sequence[ClassInfo]) -> dict[str, Any]:
    planes = [1.0] * (n_axes - 2)
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": [{"name": letter, "type": "space"} for letter in "zyx"[-n_axes:]],
                "datasets": [
                    {
                        "path": str(i),
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [*planes, 2.0**i, 2.0**i]}
                        ],
                    }
                    for i in range(n_levels)
                ],
                "type": "nearest",
            }
        ],
        "image-label": {
            "version": "0.5",
            "colors": [
                {"label-value": info.id, "rgba": [*bytes.fromhex(info.colour[1:]), 255]}
                for info in classes
            ],
        },
    }
