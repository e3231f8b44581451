"""The canonical layout of an image in memory: planes, height, width, channels (P, H, W, C)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from napari_convlora.config import InputError


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
        raise InputError(
            f"An image needs height and width, but these pixels have {array.ndim - 1} "
            "axes besides the channels; open a 2-D image or a stack of them."
        )
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])


def plane_region(
    array: Any,
    plane: int,
    region: tuple[slice, slice],
    *,
    rgb: bool = False,
    channel_axis: int | None = None,
) -> np.ndarray:
    """Read a rectangle of one plane as (h, w, C), and nothing else of `array`.

    Parameters
    ----------
    array
        Pixels as napari holds them; anything that can be sliced, such as a dask or zarr array.
    plane
        Index along the first axis of what `to_planes` would return.
    region
        Rows and columns.
    rgb, channel_axis
        As for `to_planes`; `rgb` is not guessed.
    """
    channels = array.ndim - 1 if rgb and channel_axis is None else channel_axis
    *leading, rows, columns = (axis for axis in range(array.ndim) if axis != channels)
    index: list[Any] = [slice(None)] * array.ndim
    at = np.unravel_index(plane, [array.shape[axis] for axis in leading]) if leading else ()
    for axis, i in zip([*leading, rows, columns], [*map(int, at), *region], strict=True):
        index[axis] = i
    pixels = np.asarray(array[tuple(index)])
    if channels is None:
        return pixels[..., None]
    return np.moveaxis(pixels, sum(axis not in leading for axis in range(channels)), -1)


def drop_alpha(planes: np.ndarray) -> np.ndarray:
    """Return (P, H, W, 4) planes without their alpha channel, as a view; others unchanged.

    Call it only where the fourth channel is known to be alpha (a napari layer with ``rgb``):
    a fourth band of a satellite image is data.
    """
    return planes[..., :3] if planes.shape[-1] == 4 else planes


def check_pixels(planes: np.ndarray, name: str = "The image") -> None:
    """Raise unless `planes` holds pixels from which something can be learnt.

    Parameters
    ----------
    planes : (P, H, W, C)
    name
        How the message calls the image.

    Raises
    ------
    InputError
        Not numbers, complex, no pixels, NaN or infinite pixels, or one value everywhere.
    """
    if planes.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {planes.dtype} values; convert it to integers or floats.")
    if planes.size == 0:
        raise InputError(f"{name} has no pixels; open an image that has some.")
    # Plane by plane, as the temporary mask of a whole stack may not fit in memory.
    bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in planes)
    if bad:
        raise InputError(
            f"{name} has {bad} NaN or infinite values; replace them with numbers, "
            "for example with numpy.nan_to_num, and open it again."
        )
    value = planes.flat[0]
    if all((plane == value).all() for plane in planes):
        size = size_text(planes.shape[:3])
        raise InputError(
            f"{name} ({size}) has the value {value} in every pixel, so nothing can be told "
            "apart in it; open an image with contrast."
        )


def size_text(shape: tuple[int, ...]) -> str:
    """Return (P, H, W) in words, such as ``3 planes of 512 x 640`` (height x width)."""
    depth, height, width = shape
    return f"{height} x {width}" if depth == 1 else f"{depth} planes of {height} x {width}"


def _last_axis_is_channels(shape: tuple[int, ...]) -> bool:
    if len(shape) < 3 or min(shape[-3:-1]) <= shape[-1]:
        return False
    return shape[-1] in (1, 3, 4) or (len(shape) >= 4 and shape[-1] == 2)
