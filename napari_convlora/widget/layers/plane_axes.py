"""How the axes of a layer relate to planes, rows and columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from napari.layers import Shapes

from napari_convlora.labels.reviewed import Outlines

_FLAT = 1e-3
"""Pixels; the coordinates of what lies in a plane differ by rounding alone."""


@dataclass(frozen=True)
class PlaneAxes:
    """The axes of an image that a Labels or Shapes layer shares; channels are of length 1.

    Parameters
    ----------
    shape
        Of the layer.
    channel_axis
        Axis that holds channels, if any.
    """

    shape: tuple[int, ...]
    channel_axis: int | None

    @property
    def planar(self) -> list[int]:
        """All axes but channels; height and width come last."""
        return [axis for axis in range(len(self.shape)) if axis != self.channel_axis]

    def index(self, at: Sequence[float]) -> int:
        """Return the plane of a point in pixels of the layer."""
        index = 0
        for axis in self.planar[:-2]:
            n = self.shape[axis]
            index = index * n + int(np.clip(np.round(at[axis]), 0, n - 1))
        return index

    def place(self, plane: int, points: np.ndarray) -> np.ndarray:
        """Return rows and columns (N, 2) of a plane as points (N, ndim) of the layer."""
        *leading, rows, columns = self.planar
        at = np.zeros((len(points), len(self.shape)))
        if leading:
            at[:, leading] = np.unravel_index(plane, [self.shape[axis] for axis in leading])
        at[:, [rows, columns]] = points
        return at

    def outlines(self, layer: Shapes) -> Outlines:
        """Return every area in `layer` as a reviewed region."""
        rows_columns = self.planar[-2:]
        stray = self.stray(layer)
        return tuple(
            (self.index(area[0]), area[:, rows_columns])
            for i, area in _areas(layer)
            if i not in stray
        )

    def stray(self, layer: Shapes) -> set[int]:
        """Return which areas in `layer` stand upright on the planes: drawn in a rolled view."""
        rows, columns = self.planar[-2:]
        others = [axis for axis in range(layer.ndim) if axis not in (rows, columns)]
        extents = {i: np.ptp(area, axis=0) for i, area in _areas(layer)}
        return {
            i
            for i, extent in extents.items()
            if extent[others].max(initial=0) > _FLAT >= extent[[rows, columns]].min()
        }

    def drop_stray(self, layer: Shapes) -> bool:
        """Remove the areas that lie in no plane; False if there are none."""
        stray = self.stray(layer)
        if stray:
            layer.selected_data = stray
            layer.remove_selected()
        return bool(stray)


def _areas(layer: Shapes) -> Iterator[tuple[int, np.ndarray]]:
    for i, (kind, vertices) in enumerate(zip(layer.shape_type, layer.data, strict=True)):
        if kind == "ellipse":  # napari holds the corners of the box around it
            angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)[:, None]
            centre = vertices.mean(0)
            halves = vertices[:2].mean(0) - centre, vertices[1:3].mean(0) - centre
            around = centre + np.cos(angles) * halves[0] + np.sin(angles) * halves[1]
            yield i, around.astype(vertices.dtype)  # as a polygon of the same layer would hold it
        elif kind in ("rectangle", "polygon"):
            yield i, np.asarray(vertices)
