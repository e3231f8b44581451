"""Images too large for memory: read by windows, and their labels written block by block."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from zarr.storage import LocalStore

from napari_convlora.blocks import BLOCK, Block, is_large, plan
from napari_convlora.config import ClassInfo, InputError
from napari_convlora.export import tiff_colours
from napari_convlora.files import is_unclear, is_whole, open_tiff, read_image
from napari_convlora.planes import LazyPlanes, Planes, lazy_planes
from napari_convlora.results import atomic_write, check_no_device

_KEY = "napari_convlora"
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_MAX_CHUNK = 256 * 1024**2
"""Bytes of a piece of a file that can only be decoded as a whole."""

_SMALLEST = 1024
"""Longer side in pixels at which an OME-Zarr needs no smaller copy."""


class Reopened:
    """An array in a file, which a process it is sent to opens again: open files cannot travel.

    Parameters
    ----------
    open_array
        Opens it; can be pickled.
    """

    def __init__(self, open_array: Callable[[], Any]) -> None:
        self._open, self._array = open_array, open_array()
        self.shape, self.dtype, self.ndim = (
            getattr(self._array, name) for name in ("shape", "dtype", "ndim")
        )

    def __getitem__(self, key: Any) -> Any:
        """Read a window."""
        return self._array[key]

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file again."""
        return Reopened, (self._open,)


def is_zarr(path: Path) -> bool:
    """Whether `path` is the folder of a zarr array or group."""
    return any((path / name).is_file() for name in _ZARR_FILES)


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
            lazy = _open_zarr(path)
        elif os.path.isfile(path) and path.stat().st_size:
            lazy = _open_npy(path) if path.suffix.lower() == ".npy" else _open_tiff(path)
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


class _Files(LocalStore):
    """A folder in which nothing but files is opened: of a pipe nobody would see the end."""

    def get_sync(self, key: str, **how: Any) -> Any:
        self._check(key)
        return super().get_sync(key, **how)

    async def get(self, key: str, *args: Any, **how: Any) -> Any:
        self._check(key)
        return await super().get(key, *args, **how)

    def _check(self, key: str) -> None:
        check_no_device(self.root / key)


def _open_zarr(path: Path) -> list[LazyPlanes]:
    node: Any = zarr.open(_Files(path, read_only=True), mode="r")
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
        return [_by_letters(node, "".join(names).upper(), path) for node in nodes]
    return [lazy_planes(node, name=f"'{path}'") for node in nodes]


def _open_npy(path: Path) -> list[LazyPlanes]:
    load = partial(np.load, path, mmap_mode="r", allow_pickle=False)
    planes = lazy_planes(Reopened(load), name=f"'{path}'")
    return [planes] if is_large(planes.shape) else []


def _open_tiff(path: Path) -> list[LazyPlanes]:
    """Open a large TIFF whose pieces are small; nothing of any other file."""
    try:
        tif = open_tiff(path)
    except tifffile.TiffFileError:
        return []
    with tif:
        series = tif.series[0]
        page = series.keyframe
        palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE and not tif.is_imagej
        if palette or not is_large([math.prod(series.shape)]) or not is_whole(tif, series):
            return []
        if series.dataoffset is not None:
            opened = [partial(tifffile.memmap, path, mode="r")]
        elif math.prod(page.chunks) * series.dtype.itemsize > _MAX_CHUNK:
            return []
        else:
            opened = [partial(_tiff_level, path, i) for i in range(len(series.levels))]
        extra = page.extrasamples
        alpha = "S" in series.axes and bool(extra) and extra[-1] in (1, 2)
        axes = series.axes
    planes = [_by_letters(Reopened(array), axes, path, alpha) for array in opened]
    return planes if is_large(planes[0].shape) else []


def _tiff_level(path: Path, level: int) -> Any:
    """Open one level of a TIFF as an array; the file is closed when nobody holds the array."""
    with ExitStack() as opened:
        tif = opened.enter_context(open_tiff(path))
        array = zarr.open_array(tif.series[0].aszarr(level=level), mode="r")
        weakref.finalize(array, opened.pop_all().close)
    return array


def _by_letters(source: Any, letters: str, path: Path, alpha: bool = False) -> LazyPlanes:
    """Planes of an array in a file, of which a letter is known for each axis."""
    name = f"'{path}'"
    if is_unclear(letters):
        return lazy_planes(source, name=name)
    channel = next((letters.index(letter) for letter in "SC" if letter in letters), None)
    y, x = letters.index("Y"), letters.index("X")
    leading = tuple(a for a in range(len(letters)) if a not in (y, x, channel))
    n_channels = 1 if channel is None else source.shape[channel] - alpha
    return LazyPlanes(source, leading, y, x, channel, n_channels, name)


@contextlib.contextmanager
def _to_go_on(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written ({error.strerror}); free some space and run the same "
            "command again to go on."
        ) from error


@dataclass(frozen=True)
class LabelStore:
    """Labels on disk, block by block; what is written survives a kill.

    A block is written whole or not at all, so those that exist are those that are done.

    Parameters
    ----------
    folder
        A zarr group; its array ``0`` has chunks of one block.
    shape
        (P, H, W).
    """

    folder: Path
    shape: tuple[int, int, int]

    @property
    def array(self) -> Any:
        """The zarr array (H, W), or (P, H, W) of several planes, uint8."""
        return zarr.open_array(_Files(self.folder / "0"), mode="r+")

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of `blocks` that are not written yet."""
        return [b for b in blocks if not self._chunk(b).exists()]

    def write(self, block: Block, labels: np.ndarray) -> None:
        """Write class ids (h, w) of a block, all of them 1 or more."""
        with _to_go_on(self.folder):
            self.array[self._at(block)] = labels

    def read(self, block: Block) -> np.ndarray:
        """Class ids (h, w) of a block."""
        return self.array[self._at(block)]

    def drop_damaged(self) -> None:
        """Forget blocks that cannot be read: a power cut may leave empty files behind."""
        array = self.array
        for block in plan(self.shape):
            chunk = self._chunk(block)
            if chunk.exists():
                try:
                    whole = bool(array[self._at(block)].all())  # ids are 1 or more
                except Exception:  # decoders of damaged files raise nearly anything
                    whole = False
                if not whole:
                    chunk.unlink()

    def _at(self, block: Block) -> tuple[Any, ...]:
        plane = () if self.shape[0] == 1 else (block.plane,)
        return (*plane, block.rows, block.columns)

    def _chunk(self, block: Block) -> Path:
        plane = () if self.shape[0] == 1 else (block.plane,)
        where = (*plane, block.top // BLOCK, block.left // BLOCK)
        return self.folder.joinpath("0", "c", *map(str, where))


def open_labels(folder: Path, shape: Sequence[int], identity: str) -> LabelStore:
    """Create a store of labels (P, H, W), or go on with the one that an earlier run left behind.

    Parameters
    ----------
    folder
        Its place; the folder above must exist.
    shape
        (P, H, W).
    identity
        What the labels come from: image, adapter and settings, in words or hashes.

    Raises
    ------
    InputError
        The folder holds labels of another identity, or cannot be written.
    """
    store = LabelStore(folder, (shape[0], shape[1], shape[2]))
    try:
        if (folder / "0" / "zarr.json").exists():
            try:
                found = zarr.open_group(_Files(folder, read_only=True), mode="r").attrs.get(_KEY)
                if found == identity:
                    store.drop_damaged()
            except Exception:  # parsers of damaged files raise nearly anything
                found = None
            if found != identity:
                raise InputError(
                    f"'{folder}' is damaged, or part of a prediction with another adapter, image "
                    "or setting; delete that folder, or choose another --out."
                )
            return store
        flat = store.shape[1:] if store.shape[0] == 1 else store.shape
        zarr.create_group(folder, attributes={_KEY: identity}, overwrite=True)
        _create(folder / "0", flat)
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror}); choose a folder you may write to."
        ) from error
    return store


def _create(path: Path, shape: tuple[int, ...]) -> Any:
    return zarr.create_array(
        path,
        shape=shape,
        chunks=(*(1,) * (len(shape) - 2), BLOCK, BLOCK),
        dtype=np.uint8,
        dimension_names=_axes(shape),
    )


def _axes(shape: tuple[int, ...]) -> str:
    return "zyx"[-len(shape) :]


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
            metadata={"axes": _axes(array.shape).upper()},
            compression="zlib",
            bigtiff=array.nbytes > 3_900_000_000,
            **tiff_colours(classes),
        )


def check_replaceable(path: Path) -> None:
    """Raise an `InputError` if an OME-Zarr at `path` would replace something that is not ours."""
    if path.exists() and not (path.is_dir() and _ours(path)):
        raise InputError(f"'{path}' exists and is not a prediction; choose another --out.")


def _ours(path: Path) -> bool:
    try:
        return _KEY in zarr.open_group(_Files(path, read_only=True), mode="r").attrs
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
    with _to_go_on(path):
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
    half = _create(path, shape)
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
