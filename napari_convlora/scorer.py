"""Scores block by block, each a function of the image alone.

A block blends the tiles that overlap it, in the order of their corners, so that it comes out the
same bit for bit whichever blocks were computed before it, and in whichever process. Tiles that
blocks share are kept for a while: in the order of `plan` few are computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from napari_convlora.blocks import Block
from napari_convlora.data import (
    Normalizer,
    blend_window,
    crop,
    resize,
    tile_starts,
    to_rgb,
)
from napari_convlora.detail import mix, region_features
from napari_convlora.feature_cache import FeatureCache
from napari_convlora.model import SemanticSAM
from napari_convlora.planes import LazyPlane, Planes, check_finite

OVERLAP = 0.25
Y = TypeVar("Y")
R = TypeVar("R")
_TILE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Progress:
    """`done` of `total` tiles."""

    done: int
    total: int


@dataclass(frozen=True, eq=False)
class BlockLogits:
    """Class scores (K, h, w) float32 of a block."""

    block: Block
    logits: np.ndarray


class Returning(Generic[Y, R]):
    """Iterate over a generator and keep what it returns in `value`."""

    value: R

    def __init__(self, generator: Generator[Y, None, R]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Y]:
        self.value = yield from self._generator


@dataclass(frozen=True)
class Scorer:
    """A model and the image that it scores.

    Parameters
    ----------
    model
        In eval mode, on its device.
    image
        (P, H, W, C), any numeric dtype, as read; only windows of it are asked for.
    normalizer, pixel_scale
        Those of training.
    features
        Where the frozen features of the tiles are kept between calls, if at all.
    tiles
        Logits of tiles that the next blocks may need again.
    """

    model: SemanticSAM
    image: Planes
    normalizer: Normalizer
    pixel_scale: float
    features: FeatureCache | None = None
    tiles: FeatureCache = field(default_factory=lambda: FeatureCache(_TILE_BYTES))

    @property
    def side(self) -> int:
        """Side of a tile, in pixels of the image."""
        return max(1, round(self.model.backbone.spec.image_size / self.pixel_scale))

    def corners(self, block: Block) -> list[tuple[int, int]]:
        """Corners (top, left) of the tiles that overlap `block`."""
        return [
            (top, left)
            for top in _overlapping(self.image.shape[1], self.side, block.rows)
            for left in _overlapping(self.image.shape[2], self.side, block.columns)
        ]

    def score(
        self, blocks: Sequence[Block], keep_tiles: bool = False
    ) -> Iterator[Progress | BlockLogits]:
        """Score `blocks`; yields progress after every tile, and every block once it is done.

        Tiles are forgotten once all `blocks` that they overlap are scored, unless `keep_tiles`.
        """
        uses = Counter((b.plane, *corner) for b in blocks for corner in self.corners(b))
        total = len(uses)
        done: set[tuple[int, int, int]] = set()
        for block in blocks:
            steps = Returning(self._logits(block))
            for where in steps:
                done.add(where)
                yield Progress(len(done), total)
            yield BlockLogits(block, steps.value)
            for corner in () if keep_tiles else self.corners(block):
                where = (block.plane, *corner)
                uses[where] -= 1
                if not uses[where]:
                    self.tiles.drop(where)

    def _logits(self, block: Block) -> Generator[tuple[int, int, int], None, np.ndarray]:
        """Logits of a block; yields plane and corner of every tile that had to be computed."""
        total: np.ndarray | None = None
        weight = np.zeros((block.height, block.width), np.float32)
        side = self.side
        for top, left in self.corners(block):
            where = (block.plane, top, left)
            logits = self.tiles.get(where)
            if logits is None:
                logits = self._tile(self.image[block.plane], top, left)
                self.tiles.put(where, logits)
                yield where
            if total is None:
                total = np.zeros((len(logits), block.height, block.width), np.float32)
            y0, y1 = max(top, block.top), min(top + side, block.rows.stop)
            x0, x1 = max(left, block.left), min(left + side, block.columns.stop)
            of_tile = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            here = np.s_[y0 - block.top : y1 - block.top, x0 - block.left : x1 - block.left]
            window = blend_window(side, *of_tile)
            total[:, *here] += _enlarged(logits.numpy(), side, *of_tile) * window
            weight[here] += window
        assert total is not None
        total /= weight
        detail = self.model.detail
        if detail is not None:
            plane = self.image[block.plane]
            features = region_features(plane, self.normalizer, block.rows, block.columns)
            own = torch.from_numpy(detail.logits(features))
            total = mix(torch.from_numpy(total), own, float(detail.share)).numpy()
        return total

    @torch.no_grad()
    def _tile(self, plane: np.ndarray | LazyPlane, top: int, left: int) -> Tensor:
        """Logits (K, h, w) of a tile, at the head's resolution or the image's, if that is less."""
        square = self.normalizer(check_finite(np.asarray(crop(plane, top, left, self.side))))
        rgb = torch.from_numpy(np.ascontiguousarray(to_rgb(square))).movedim(-1, 0)
        tile = self.model.backbone.spec.image_size
        features = self.model.cached_prefix(resize(rgb, tile), self.features)
        logits = self.model.suffix(features[None]).logits[0].float()
        return (resize(logits, self.side) if self.side < logits.shape[-1] else logits).cpu()


def _overlapping(extent: int, side: int, part: slice) -> list[int]:
    starts = tile_starts(extent, side, OVERLAP)
    return [start for start in starts if start < part.stop and part.start < start + side]


def _enlarged(logits: np.ndarray, side: int, rows: slice, columns: slice) -> np.ndarray:
    """Cut a window out of logits (K, h, w) enlarged to `side`, bilinear.

    Every pixel is computed by itself, so that it does not depend on the window.
    """
    if logits.shape[1:] == (side, side):
        return logits[:, rows, columns]
    above, below, down = _between(logits.shape[1], side, rows)
    before, after, right = _between(logits.shape[2], side, columns)
    logits = logits[:, :, before[0] : after[-1] + 1]
    lines = logits[:, above]
    lines += (logits[:, below] - lines) * down[:, None]
    result = lines[:, :, before - before[0]]
    result += (lines[:, :, after - before[0]] - result) * right
    return result


def _between(extent: int, side: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the two of `extent` samples around enlarged pixels, and how near the second is."""
    at = (np.arange(part.start, part.stop) + 0.5) * extent / side - 0.5
    at = at.clip(0, extent - 1)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, extent - 1), (at - low).astype(np.float32)
