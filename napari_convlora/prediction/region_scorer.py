"""Scores block by block, each a function of the image alone.

A block blends the tiles that overlap it, in the order of their corners, so that it comes out the
same bit for bit whichever blocks were computed before it, and in whichever process. Tiles that
blocks share are kept for a while: in the order of `plan` few are computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from napari_convlora.events import Progress
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.planes import LazyPlane, Planes
from napari_convlora.images.regions import Block
from napari_convlora.images.resample import resize
from napari_convlora.images.tiles import Tile, blend, corners, tile_pixels
from napari_convlora.model.detail_branch import mix, region_features
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.iteration import Returning
from napari_convlora.model.semantic_sam import SemanticSAM

Y = TypeVar("Y")
R = TypeVar("R")
_TILE_BYTES = 512 * 1024**2
_LAST_BYTES = 64 * 1024**2


@dataclass(frozen=True, eq=False)
class BlockLogits:
    """Class scores (K, h, w) float32 of a block."""

    block: Block
    logits: np.ndarray


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
        Where the frozen features of the tiles are kept; by default those of the last few.
    tiles
        What tiles say that the next blocks may need again.
    """

    model: SemanticSAM
    image: Planes
    normalizer: Normalizer
    pixel_scale: float
    features: FeatureCache = field(default_factory=lambda: FeatureCache(_LAST_BYTES))
    tiles: FeatureCache = field(default_factory=lambda: FeatureCache(_TILE_BYTES))

    @property
    def side(self) -> int:
        """Side of a tile, in pixels of the image."""
        return max(1, round(self.model.backbone.spec.image_size / self.pixel_scale))

    def corners(self, block: Block) -> list[tuple[int, int]]:
        """Corners (top, left) of the tiles that overlap `block`."""
        return corners(self.image.shape[1:3], self.side, block.rows, block.columns)

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
                    for kind in ("head", "context"):
                        self.tiles.drop((kind, *where))

    def _logits(self, block: Block) -> Generator[tuple[int, int, int], None, np.ndarray]:
        """Logits of a block; yields plane and corner of every tile that had to be computed."""
        plane, detail = self.image[block.plane], self.model.detail
        share = 0.0 if detail is None else float(detail.share)
        kinds = (["head"] if share < 1 else []) + (["context"] if detail is not None else [])
        tiles: dict[str, list[Tile]] = {kind: [] for kind in kinds}
        for corner in self.corners(block):
            where = (block.plane, *corner)
            kept = {kind: self.tiles.get((kind, *where)) for kind in kinds}
            known = {kind: values for kind, values in kept.items() if values is not None}
            if len(known) < len(kinds):
                known = self._tile(plane, corner, kinds)
                for kind, values in known.items():
                    self.tiles.put((kind, *where), values)
                yield where
            for kind, values in known.items():
                tiles[kind].append(Tile(*corner, self.side, values))
        if detail is None:
            return blend(tiles["head"], block.rows, block.columns)
        features = region_features(plane, self.normalizer, block.rows, block.columns)
        own = detail.logits(features, tiles["context"], block.rows, block.columns)
        if share >= 1:
            return own
        total = blend(tiles["head"], block.rows, block.columns)
        return mix(torch.from_numpy(total), torch.from_numpy(own), share).numpy()

    @torch.no_grad()
    def _tile(
        self, plane: np.ndarray | LazyPlane, corner: tuple[int, int], kinds: Sequence[str]
    ) -> dict[str, Tensor]:
        """Logits (K, h, w) of a tile, at the head's resolution or the image's, if that is less.

        What the detail branch wants of it (C, h, w) is called ``context``.
        """
        size, model = self.model.backbone.spec.image_size, self.model
        pixels = tile_pixels(plane, corner, self.side, size, self.normalizer)
        found = {}
        if "context" in kinds:
            found["context"] = model.cached_context(pixels, self.features).cpu()
        if "head" in kinds:
            features = model.cached_prefix(pixels, self.features)
            logits = model.suffix(features[None]).logits[0].float()
            logits = resize(logits, self.side) if self.side < logits.shape[-1] else logits
            found["head"] = logits.cpu()
        return found
