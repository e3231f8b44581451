"""From pixels to tensors: channels, normalisation, working scale, views and tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.config import InputError
from napari_convlora.planes import LazyPlane

_PERCENTILES = (0.1, 99.9)
_FIT_PIXELS = 1_000_000
_REMARK_PIXELS, _LEAST_INSIDE = 100_000, 0.1
_MAX_ENLARGEMENT = 4.0
_MAX_REDUCTION = 0.25


@dataclass(frozen=True)
class Normalizer:
    """Linear map of every channel, fitted once and stored in the adapter.

    Parameters
    ----------
    low, high
        Pixel value per channel that becomes 0 and 1.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, images: Sequence[np.ndarray]) -> Normalizer:
        """Take the 0.1 and 99.9 percentile of every channel over all `images` (P, H, W, C)."""
        n_channels = images[0].shape[-1]
        share = _FIT_PIXELS // len(images)
        samples = []
        for image in images:
            _check_channels(image, n_channels)
            pixels = image.reshape(-1, n_channels)
            samples.append(np.asarray(pixels[:: max(1, len(pixels) // share)], np.float64))
        low, high = np.percentile(np.concatenate(samples), _PERCENTILES, axis=0)
        high = np.where(high > low, high, low + 1)
        return cls(tuple(map(float, low)), tuple(map(float, high)))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalise `image` (..., C) to float32 in [0, 1]; values beyond the ends are clipped."""
        _check_channels(image, len(self.low))
        if image.dtype.itemsize > 4 and image.dtype.kind == "f":  # may not fit into float32
            image = np.clip(image, self.low, self.high)
        low = np.asarray(self.low, np.float32)
        span = np.subtract(self.high, self.low).astype(np.float32)  # high may round to low
        return np.clip((image.astype(np.float32) - low) / span, 0, 1)

    def remark(self, image: np.ndarray) -> str:
        """Return a sentence if hardly a pixel of `image` (P, H, W, C) is in range, else ""."""
        _check_channels(image, len(self.low))
        pixels = image.reshape(-1, image.shape[-1])
        pixels = pixels[:: max(1, len(pixels) // _REMARK_PIXELS)]
        if ((pixels >= self.low) & (pixels <= self.high)).mean() > _LEAST_INSIDE:
            return ""
        return (
            f"Its values ({pixels.min():g} to {pixels.max():g}) lie outside of what the adapter "
            f"learnt from ({min(self.low):g} to {max(self.high):g}), so that it sees little; bring "
            "the image to the same scale, or annotate a part of it and adapt."
        )


def _check_channels(image: np.ndarray, expected: int) -> None:
    if image.shape[-1] != expected:
        raise InputError(
            f"The image has {image.shape[-1]} channels where {expected} are expected; "
            "use images with the same channels for training and prediction."
        )


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Three channels for SAM from (..., C): grey is repeated; of many, the first three count."""
    n_channels = image.shape[-1]
    if n_channels == 1:
        return np.repeat(image, 3, axis=-1)
    if n_channels == 2:
        return np.concatenate([image, image.mean(-1, keepdims=True)], axis=-1)
    return image[..., :3]


def auto_pixel_scale(shapes: Sequence[tuple[int, int]], tile: int) -> float:
    """Working pixels per image pixel at which SAM sees an image as a whole.

    Objects are told by their context, so the longer side fills a tile; fine structure is the
    detail branch's business. An image is reduced to a quarter at most: very large ones hold small
    objects, and take several tiles.

    Parameters
    ----------
    shapes
        (height, width) of the annotated images, in pixels.
    tile
        Side of the backbone's tile, in pixels.
    """
    extents = [min(max(h, w), 2 * math.sqrt(h * w)) for h, w in shapes]  # a strip takes more tiles
    return min(_MAX_ENLARGEMENT, max(_MAX_REDUCTION, tile / float(np.median(extents))))


def crop(
    array: np.ndarray | LazyPlane, top: int, left: int, size: int, fill: float | None = None
) -> np.ndarray:
    """Cut a square out of `array` (H, W, ...); what lies outside is mirrored, or `fill`.

    Parameters
    ----------
    array
        Two leading axes are height and width.
    top, left
        Corner of the square, may be negative.
    size
        Side in pixels.
    fill
        Constant for the outside; ``None`` mirrors the image.
    """
    height, width = array.shape[:2]
    y0, y1 = max(top, 0), min(top + size, height)
    x0, x1 = max(left, 0), min(left + size, width)
    inside = array[y0:y1, x0:x1]
    pads = [(y0 - top, top + size - y1), (x0 - left, left + size - x1)]
    if not any(map(any, pads)):
        return inside
    pads += [(0, 0)] * (array.ndim - 2)
    if fill is None:
        return np.pad(inside, pads, mode="symmetric")
    return np.pad(inside, pads, constant_values=fill)


@dataclass(frozen=True)
class View:
    """A square of one training plane, and how it is shown to the model.

    Parameters
    ----------
    image, plane
        Indices of the training image and its plane.
    top, left, size
        The square, in image pixels.
    turns, flip
        Quarter turns, then a left-right flip.
    gain, offset
        Intensity augmentation, ``gain * x + offset``.
    """

    image: int
    plane: int
    top: int
    left: int
    size: int
    turns: int = 0
    flip: bool = False
    gain: float = 1.0
    offset: float = 0.0

    def orient(self, tensor: Tensor) -> Tensor:
        """Turn and flip the last two axes of `tensor`."""
        tensor = torch.rot90(tensor, self.turns, (-2, -1))
        return tensor.flip(-1) if self.flip else tensor

    def image_tensor(self, plane: np.ndarray, tile: int) -> Tensor:
        """Cut a normalised plane (H, W, C) into a model input (3, tile, tile) float32."""
        square = to_rgb(crop(plane, self.top, self.left, self.size))
        tensor = resize(torch.from_numpy(np.ascontiguousarray(square)).movedim(-1, 0), tile)
        return self.orient(tensor * self.gain + self.offset).contiguous()

    def label_tensor(self, target: np.ndarray, tile: int) -> Tensor:
        """Cut a target plane (H, W) into (tile, tile) int64 by nearest neighbour."""
        square = crop(target, self.top, self.left, self.size, fill=-1)
        centres = ((np.arange(tile) + 0.5) * self.size / tile).astype(np.int64)
        square = square[np.ix_(centres, centres)].astype(np.int64)
        return self.orient(torch.from_numpy(square)).contiguous()


def resize(tensor: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize (C, H, W) to a side or (height, width): bilinear, antialiased when shrinking."""
    size = (size, size) if isinstance(size, int) else size
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    shrinking = size[0] < tensor.shape[-2] or size[1] < tensor.shape[-1]
    return F.interpolate(
        tensor[None], size, mode="bilinear", align_corners=False, antialias=shrinking
    )[0]


def draw_view(
    image: int,
    pixel: tuple[int, int, int],
    shape: tuple[int, int],
    side: int,
    rng: np.random.Generator,
) -> View:
    """Draw a square that holds a pixel, turned, flipped, and jittered in scale and intensity.

    Parameters
    ----------
    image, pixel
        Index of the image; plane, row and column.
    shape
        Height and width of the plane.
    side
        Side of the square in image pixels before scale jitter.
    rng
        Source of randomness.
    """
    plane, row, column = pixel
    size = round(side * math.exp(rng.uniform(-0.2, 0.2)))
    return View(
        image,
        plane,
        _place(row, size, shape[0], rng),
        _place(column, size, shape[1], rng),
        size,
        turns=int(rng.integers(4)),
        flip=bool(rng.integers(2)),
        gain=float(rng.uniform(0.9, 1.1)),
        offset=float(rng.uniform(-0.05, 0.05)),
    )


def _place(at: int, size: int, extent: int, rng: np.random.Generator) -> int:
    """First pixel of a window of `size` that holds `at`, inside the image where it fits."""
    if size >= extent:
        return (extent - size) // 2
    low, high = max(0, at - size + 1), min(at, extent - size)
    return int(rng.integers(low, high + 1))


def tile_starts(extent: int, tile: int, overlap: float) -> list[int]:
    """Evenly spread first pixels of the fewest tiles that cover `extent` with at least `overlap`.

    Parameters
    ----------
    extent, tile
        In pixels. A tile larger than the extent is centred on it.
    overlap
        Smallest share of a tile that neighbours have in common, in [0, 1).
    """
    if tile >= extent:
        return [(extent - tile) // 2]
    count = math.ceil((extent - tile) / (tile * (1 - overlap))) + 1
    return [round(i * (extent - tile) / (count - 1)) for i in range(count)]


def blend_window(size: int, rows: slice, columns: slice) -> np.ndarray:
    """Weight of a part of a tile's pixels: a raised cosine that never reaches zero.

    Parameters
    ----------
    size
        Side of the tile.
    rows, columns
        The part (h, w); weights are float32.
    """
    ramp = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2 + 1e-3
    return np.outer(ramp[rows], ramp[columns]).astype(np.float32)
