"""What a user says about one object, and which part of a plane the model looks at for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from napari_convlora.errors import InputError

_CONTEXT = 4
"""Sides of a box that a window around it has."""


@dataclass(frozen=True)
class Click:
    """A place in image pixels; a negative click says that the object is not there."""

    row: float
    column: float
    positive: bool = True


@dataclass(frozen=True)
class Box:
    """A box around an object, in image pixels; pixel centres are whole numbers."""

    top: float
    left: float
    bottom: float
    right: float

    def inside(self, shape: tuple[int, int]) -> Box | None:
        """Return the part of the box that lies in a plane of `shape`; None if none does."""
        top, left = max(self.top, -0.5), max(self.left, -0.5)
        bottom, right = min(self.bottom, shape[0] - 0.5), min(self.right, shape[1] - 0.5)
        return Box(top, left, bottom, right) if top <= bottom and left <= right else None


@dataclass(frozen=True)
class Prompt:
    """What tells one object of a plane.

    Raises
    ------
    InputError
        There is neither a box nor a positive click.
    """

    clicks: tuple[Click, ...] = ()
    box: Box | None = None

    def __post_init__(self) -> None:
        """Check that something says where the object is."""
        if self.box is None and not any(click.positive for click in self.clicks):
            raise InputError("Click on the object, or draw a box around it, before what is not.")

    @property
    def bounds(self) -> Box:
        """The smallest box that holds box and clicks."""
        rows = [click.row for click in self.clicks]
        columns = [click.column for click in self.clicks]
        if self.box is not None:
            rows += [self.box.top, self.box.bottom]
            columns += [self.box.left, self.box.right]
        return Box(min(rows), min(columns), max(rows), max(columns))


@dataclass(frozen=True)
class Window:
    """The rectangle of a plane that the model looks at, in pixels; wholly inside the plane."""

    top: int
    left: int
    height: int
    width: int

    def holds(self, bounds: Box) -> bool:
        """Whether `bounds` lies inside."""
        return (
            self.top - 0.5 <= bounds.top
            and self.left - 0.5 <= bounds.left
            and bounds.bottom <= self.top + self.height - 0.5
            and bounds.right <= self.left + self.width - 0.5
        )

    @property
    def region(self) -> tuple[slice, slice]:
        """Rows and columns, to index a plane."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )


def choose_window(shape: tuple[int, int], bounds: Box, tile: int) -> Window:
    """Choose what the model looks at for a prompt.

    A plane of at most twice the model's input is seen as a whole. In a larger one the window is
    as small as the model's input allows without enlarging, and leaves room around a box. Windows
    lie on a grid, so that prompts close to each other share one, and its embedding.

    Parameters
    ----------
    shape
        Height and width of the plane, in pixels.
    bounds
        Of the prompt, in pixels.
    tile
        Side of the model's input.
    """
    extent = max(bounds.bottom - bounds.top, bounds.right - bounds.left) + 1
    side = tile * 2 ** max(0, math.ceil(math.log2(_CONTEXT * extent / tile)))
    if max(shape) <= max(side, 2 * tile):
        return Window(0, 0, *shape)
    (top, height), (left, width) = (
        _span(low, high, side, length)
        for low, high, length in zip(
            (bounds.top, bounds.left), (bounds.bottom, bounds.right), shape, strict=True
        )
    )
    return Window(top, left, height, width)


def _span(low: float, high: float, side: int, length: int) -> tuple[int, int]:
    """Return first pixel and extent of a window along one axis."""
    step = side // 2
    start = round(((low + high) / 2 - step) / step) * step
    return max(0, min(start, length - side)), min(side, length)
