"""The canonical layout of an image: planes, height, width, channels (P, H, W, C)."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from napari_convlora.errors import ConvLoRAError, InputError

_BAND = 1024

_FLAT = (
    "An image needs height and width, but these pixels have {} axes besides the channels; "
    "open a 2-D image or a stack of them."
)

_NOT_FINITE = (
    "{} has {} NaN or infinite values; replace them with numbers, "
    "for example with numpy.nan_to_num, and open it again."
)


def to_planes(
    array: np.ndarray, *, rgb: bool | None = None, channel_axis: int | None = None
) -> np.ndarray:
    """Return `array` as (P, H, W, C), as a view where numpy can make one.

    Parameters
    ----------
    array : (H, W), (..., H, W) or (..., H, W, C)
        Pixels as napari holds them.
    rgb
        Whether the last axis is colour, as napari's layer says. ``None`` guesses: a last axis of
        1, 3 or 4 (in 4-D also 2) is taken for channels when H and W are both larger.
    channel_axis
        Axis that holds the channels; overrides `rgb`.

    Raises
    ------
    InputError
        Fewer than two spatial axes are left, or `channel_axis` does not exist.
    """
    array = np.asarray(array)
    if channel_axis is not None:
        if not -array.ndim <= channel_axis < array.ndim:
            raise InputError(
                f"There is no channel axis {channel_axis} in an image of {array.ndim} axes; "
                f"choose one between 0 and {array.ndim - 1}."
            )
        array = np.moveaxis(array, channel_axis, -1)
    elif not (_last_axis_is_channels(array.shape) if rgb is None else rgb):
        array = array[..., None]
    if array.ndim < 3:
        raise InputError(_FLAT.format(array.ndim - 1))
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])


@dataclass(frozen=True)
class LazyPlane:
    """One plane (H, W, C) of a `LazyPlanes`; slicing rows and columns reads them.

    Parameters
    ----------
    planes
        Where it is from.
    index
        Which plane.
    """

    planes: LazyPlanes
    index: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.planes.shape[1:]

    @property
    def ndim(self) -> int:
        """3."""
        return len(self.shape)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """Read ``[rows, columns]`` as (h, w, C)."""
        return self.planes.read(self.index, *window)


@dataclass(frozen=True, eq=False)
class LazyPlanes:
    """An image (P, H, W, C) of which only the windows asked for are read.

    Parameters
    ----------
    source
        Anything with shape, dtype and slicing: a dask or zarr array, a memory map.
    leading
        Axes of `source` that together count the planes.
    y, x, channel
        Its other axes; `channel` is None for a single channel.
    n_channels
        How many channels to keep; the rest is alpha.
    name
        What messages call it.
    """

    source: Any
    leading: tuple[int, ...]
    y: int
    x: int
    channel: int | None
    n_channels: int
    name: str = "The image"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(P, H, W, C)."""
        size = self.source.shape
        return math.prod(size[a] for a in self.leading), size[self.y], size[self.x], self.n_channels

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""
        return np.dtype(self.source.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> LazyPlane:
        """Return one plane without reading it."""
        return LazyPlane(self, range(len(self))[index])

    def __iter__(self) -> Iterator[LazyPlane]:
        return (self[i] for i in range(len(self)))

    def read(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        """Read a window (h, w, C) of plane `index`.

        Raises
        ------
        InputError
            It is damaged.
        """
        key: list[Any] = [slice(None)] * len(self.source.shape)
        at = np.unravel_index(index, [self.source.shape[a] for a in self.leading] or [1])
        for axis, i in zip(self.leading, at, strict=False):
            key[axis] = slice(int(i), int(i) + 1)
        key[self.y], key[self.x] = rows, columns
        if self.channel is not None:
            key[self.channel] = slice(0, self.n_channels)
        ends = (r.indices(n)[:2] for r, n in zip((rows, columns), self.shape[1:3], strict=True))
        (top, bottom), (left, right) = ends
        where = f" in plane {index}, rows {top} to {bottom - 1}, columns {left} to {right - 1}"
        window = read_pixels(self.source, tuple(key), self.name, where)
        last = () if self.channel is None else (self.channel,)
        window = window.transpose(*self.leading, self.y, self.x, *last)
        return window.reshape(*window.shape[len(self.leading) :][:2], self.n_channels)


def read_pixels(source: Any, key: tuple[Any, ...], name: str, where: str = "") -> np.ndarray:
    """Read pixels that are not in memory: ``source[key]``.

    Parameters
    ----------
    source, key
        Anything with slicing, and which part of it.
    name, where
        How messages call the image and the part.

    Raises
    ------
    InputError
        What is read is damaged, or cannot be read for another reason.
    """
    try:
        return np.asarray(source[key])
    except (ConvLoRAError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        damaged = InputError(
            f"{name} is damaged{where} ({reason}); copy it again or save it again."
        )
        raise (unreadable(error, name, where) or damaged) from error


def unreadable(error: Exception, name: str, where: str = "") -> InputError | None:
    """Say why an image could not be read, if it need not be damaged; None if it probably is."""
    if isinstance(error, ImportError) or "imagecodecs" in str(error):
        return InputError(
            f"{name} is compressed in a way that needs another package; "
            "run: pip install imagecodecs."
        )
    # Decoders raise OSErrors of their own, without a number; a place beyond a file is "invalid".
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return InputError(
            f"{name} cannot be read{where} ({error.strerror}); check the disk, or the connection "
            "to it, and try again."
        )
    return None


@dataclass(frozen=True, eq=False)
class Respaced:
    """A lazy array with axes of length 1 in other places.

    Parameters
    ----------
    source
        Anything with shape, dtype and slicing.
    shape
        Its lengths, in order, with any number of 1 between them.
    """

    source: Any
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""
        return np.dtype(self.source.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: tuple[slice | int, ...]) -> np.ndarray:
        """Read a window, which has a slice or an index for every axis."""
        cuts = [k if isinstance(k, slice) else slice(k, k + 1) for k in key]
        kept = iter([k for k, n in zip(cuts, self.shape, strict=True) if n > 1])
        wanted = tuple(next(kept) if n > 1 else slice(None) for n in self.source.shape)
        size = [len(range(*k.indices(n))) for k, n in zip(cuts, self.shape, strict=True)]
        window = np.asarray(self.source[wanted]).reshape(size)
        return window[tuple(slice(None) if isinstance(k, slice) else 0 for k in key)]


def respaced(source: Any, shape: tuple[int, ...]) -> Respaced | None:
    """Return `source` in a shape that has the same axes longer than 1; None if it has others."""
    same = [n for n in source.shape if n > 1] == [n for n in shape if n > 1]
    return Respaced(source, shape) if same else None


Planes = np.ndarray | LazyPlanes
"""An image (P, H, W, C), in memory or not."""


def lazy_planes(
    source: Any,
    *,
    rgb: bool | None = None,
    channel_axis: int | None = None,
    alpha: bool = False,
    name: str = "The image",
) -> LazyPlanes:
    """Read `source` as `to_planes` would, but not before its pixels are asked for.

    Parameters
    ----------
    source : (H, W), (..., H, W) or (..., H, W, C)
        Anything with shape, dtype and slicing.
    rgb, channel_axis
        As for `to_planes`.
    alpha
        Whether a fourth channel is alpha, to be left out.
    name
        What messages call the image.

    Raises
    ------
    InputError
        As `to_planes`.
    """
    shape = tuple(source.shape)
    if channel_axis is not None:
        channel: int | None = range(len(shape))[channel_axis]
    elif _last_axis_is_channels(shape) if rgb is None else rgb:
        channel = len(shape) - 1
    else:
        channel = None
    axes = [a for a in range(len(shape)) if a != channel]
    if len(axes) < 2:
        raise InputError(_FLAT.format(len(axes)))
    n_channels = 1 if channel is None else shape[channel]
    *leading, y, x = axes
    kept = min(3, n_channels) if alpha else n_channels
    return LazyPlanes(source, tuple(leading), y, x, channel, kept, name)


def drop_alpha(planes: np.ndarray) -> np.ndarray:
    """Return (P, H, W, 4) planes without their alpha channel, as a view; others unchanged.

    Call it only where the fourth channel is known to be alpha (a napari layer with ``rgb``):
    a fourth band of a satellite image is data.
    """
    return planes[..., :3] if planes.shape[-1] == 4 else planes


def check_pixels(planes: Planes, name: str = "The image") -> None:
    """Raise unless `planes` holds pixels that a model can look at.

    Of an image that is not in memory no pixel is read; `check_finite` then looks at every window.

    Parameters
    ----------
    planes : (P, H, W, C)
    name
        How the message calls the image.

    Raises
    ------
    InputError
        Not numbers, complex, no pixels, NaN or infinite pixels.
    """
    if planes.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {planes.dtype} values; convert it to integers or floats.")
    if 0 in planes.shape:
        raise InputError(f"{name} has no pixels; open an image that has some.")
    if isinstance(planes, LazyPlanes):
        return
    bad = 0
    if planes.dtype.kind == "f":
        bad = sum(int(np.count_nonzero(~np.isfinite(band))) for band in _bands(planes))
    if bad:
        raise InputError(_NOT_FINITE.format(name, bad))


def check_contrast(planes: Planes, name: str = "The image") -> None:
    """Raise unless something can be learnt from `planes` (P, H, W, C).

    A blank image may well be predicted; in learning it is more likely a mistake.

    Raises
    ------
    InputError
        As `check_pixels`, or all pixels have one value.
    """
    check_pixels(planes, name)
    if isinstance(planes, np.ndarray) and not has_contrast(planes):
        size = size_text(planes.shape[:3])
        raise InputError(
            f"{name} ({size}) has the value {planes.flat[0]} in every pixel, so nothing can be "
            "told apart in it; open an image with contrast."
        )


def has_contrast(planes: np.ndarray) -> bool:
    """Whether `planes` (P, H, W, C) hold more than one value."""
    value = planes.flat[0]
    return not all((band == value).all() for band in _bands(planes))


def _bands(planes: np.ndarray) -> Iterator[np.ndarray]:
    """Cut planes into bands of rows, as a temporary mask of the whole may not fit in memory."""
    for plane in planes:
        for top in range(0, len(plane), _BAND):
            yield plane[top : top + _BAND]


def check_finite(window: np.ndarray, name: str = "The image") -> np.ndarray:
    """Return a window of an image, or raise an `InputError` if it has NaN or infinite values."""
    if window.dtype.kind == "f":
        bad = int(np.count_nonzero(~np.isfinite(window)))
        if bad:
            raise InputError(_NOT_FINITE.format(name, bad))
    return window


def size_text(shape: tuple[int, ...]) -> str:
    """Return (P, H, W) in words, such as ``3 planes of 512 x 640`` (height x width)."""
    depth, height, width = shape
    return f"{height} x {width}" if depth == 1 else f"{depth} planes of {height} x {width}"


def _last_axis_is_channels(shape: tuple[int, ...]) -> bool:
    if len(shape) < 3 or min(shape[-3:-1]) <= shape[-1]:
        return False
    return shape[-1] in (1, 3, 4) or (len(shape) >= 4 and shape[-1] == 2)
