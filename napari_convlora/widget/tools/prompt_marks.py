"""What the user has clicked on and boxed in, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from napari_convlora.prediction.prompts import Box, Click
from napari_convlora.widget.layers.new_layer import shapes_like

if TYPE_CHECKING:
    from napari_convlora.widget.layers.image_layers import ImageLayers

_NAME = "SAM prompt"
_COLOURS = {True: "#ffffff", False: "#d55e00"}


class PromptMarks:
    """A Shapes layer over an image, until `remove`; nothing is drawn once the user removes it.

    Parameters
    ----------
    record
        The image.

    Attributes
    ----------
    zoom
        Of the camera, so that lines are equally wide whatever is looked at.
    """

    def __init__(self, record: ImageLayers) -> None:
        self._record = record
        self.zoom = 1.0
        self._layer = shapes_like(record, _NAME)
        record.viewer.add_layer(self._layer)

    def show(self, plane: int = 0, box: Box | None = None, clicks: Sequence[Click] = ()) -> None:
        """Show these marks instead of those before.

        Parameters
        ----------
        plane
            On which they lie.
        box, clicks
            What is marked; nothing without them.
        """
        layer, record = self._layer, self._record
        if layer not in record.viewer.layers:
            return
        px = 1 / (self.zoom * float(record.image.scale[-1 - record.image.rgb]) or 1)
        layer.data = []
        if box is not None:
            layer.add_rectangles(
                record.axes.place(plane, _corners(box.top, box.left, box.bottom, box.right)),
                edge_width=2 * px,
                edge_color=_COLOURS[True],
            )
        for click in clicks:
            r = 5 * px
            at = _corners(click.row - r, click.column - r, click.row + r, click.column + r)
            layer.add_ellipses(
                record.axes.place(plane, at), edge_width=3 * px, edge_color=_COLOURS[click.positive]
            )

    def remove(self) -> None:
        """Take the layer away."""
        if self._layer in self._record.viewer.layers:
            self._record.viewer.layers.remove(self._layer)


def _corners(top: float, left: float, bottom: float, right: float) -> np.ndarray:
    return np.array([[top, left], [top, right], [bottom, right], [bottom, left]])
