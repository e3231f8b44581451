"""Views: squares around labelled pixels, as the model sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from napari_convlora.images.normalise import Normalizer, to_rgb
from napari_convlora.images.resample import crop, resize
from napari_convlora.training.dataset import TrainingSet


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


def view_image(data: TrainingSet, view: View, normalizer: Normalizer, tile: int) -> Tensor:
    """Model input (3, tile, tile) of a view; the square is cut before it is normalised."""
    plane = data.images[view.image].image[view.plane]
    square = normalizer(np.asarray(crop(plane, view.top, view.left, view.size)))
    local = View(0, 0, 0, 0, view.size, view.turns, view.flip, view.gain, view.offset)
    return local.image_tensor(square, tile)


def view_target(data: TrainingSet, view: View, tile: int, held: bool = False) -> Tensor:
    """Target (tile, tile) int64 of a view, training or held-out pixels."""
    source = data.held if held else data.target
    return view.label_tensor(source[view.image][view.plane], tile)


def view_pool(data: TrainingSet, side: int, size: int, seed: int) -> list[View]:
    """Draw `size` views around labelled pixels, the classes in turn.

    Every pixel has a fixed random rank, and what its view looks like depends on nothing else: when
    labels are added, most views stay the same, and so do their frozen features.
    """
    ranked = []
    for arrays in data.positions:
        pixels = np.concatenate([np.insert(a, 0, i, axis=1) for i, a in enumerate(arrays)])
        rank = _scramble(pixels, seed)
        first = np.argpartition(rank, size)[:size] if len(rank) > size else np.arange(len(rank))
        if len(first):
            ranked.append(pixels[first[np.argsort(rank[first])]])
    views = []
    for number in range(size):
        turn, c = divmod(number, len(ranked))
        again, place = divmod(turn, len(ranked[c]))
        image, *pixel = map(int, ranked[c][place])
        rng = np.random.default_rng([seed, again, image, *pixel])
        shape = data.target[image].shape[1:]
        views.append(draw_view(image, (pixel[0], pixel[1], pixel[2]), shape, side, rng))
    return views


def _scramble(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random number (N,) uint64 of each row of `pixels` (N, 4), by multiply and shift."""
    found = np.full(len(pixels), seed, np.uint64)
    for column in pixels.T:
        found = (found ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
        found *= np.uint64(0xBF58476D1CE4E5B9)
        found ^= found >> np.uint64(32)
    return found
