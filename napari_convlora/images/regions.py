"""How an image of any size is cut into blocks, and in which order they are best computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 512
"""Side in pixels."""

LARGE = 64 * 2**20
"""Pixels of an image beyond which it is better never held in memory as a whole."""

_STRIP = 8
"""Blocks in a row before the next row begins. Of 20,480 x 20,480 pixels at most 1.15 times the
necessary tiles are then computed with up to 20 classes, and 1.5 times with more."""


@dataclass(frozen=True)
class Block:
    """A part of an image plane.

    Parameters
    ----------
    plane
        Index of the plane.
    top, left, height, width
        The part, in pixels, inside the image.
    """

    plane: int
    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Rows of the plane."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Columns of the plane."""
        return slice(self.left, self.left + self.width)

    @property
    def index(self) -> tuple[int, slice, slice]:
        """Where it lies in an image (P, H, W)."""
        return self.plane, self.rows, self.columns


def is_large(shape: Sequence[int]) -> bool:
    """Tell whether an image of `shape` (P, H, W, ...) is better read and written in parts."""
    return math.prod(shape[:3]) > LARGE


def plan_blocks(shape: Sequence[int], first: Block | None = None) -> list[Block]:
    """Blocks of an image of `shape` (P, H, W, ...), in an order in which neighbours are close.

    Parameters
    ----------
    shape
        Of the image.
    first
        What is looked at: blocks that it touches come first, those at its centre before others;
        then the rest of its plane, then the planes next to it.
    """
    n_planes, height, width = shape[:3]
    blocks = [
        Block(plane, top, left, min(BLOCK, height - top), min(BLOCK, width - left))
        for plane in range(n_planes)
        for strip in range(0, width, _STRIP * BLOCK)
        for top in range(0, height, BLOCK)
        for left in range(strip, min(strip + _STRIP * BLOCK, width), BLOCK)
    ]
    if first is None:
        return blocks
    seen = [b for b in blocks if overlap(b, first)]
    seen.sort(key=lambda b: math.dist(_centre(b), _centre(first)))
    others = [b for b in blocks if not overlap(b, first)]
    return seen + sorted(others, key=lambda b: abs(b.plane - first.plane))


def overlap(a: Block, b: Block) -> int:
    """Return how many pixels two blocks have in common."""
    if a.plane != b.plane:
        return 0
    height = min(a.rows.stop, b.rows.stop) - max(a.top, b.top)
    width = min(a.columns.stop, b.columns.stop) - max(a.left, b.left)
    return max(0, height) * max(0, width)


def _centre(block: Block) -> tuple[float, float]:
    return block.top + block.height / 2, block.left + block.width / 2
