"""A reviewed region lies in one plane of its image, or it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from napari.layers import Shapes
from qtpy.QtCore import QTimer

from napari_convlora.widget.layers.image_layers import ImageLayers


class RegionCheck:
    """Takes back what is drawn in a rolled view, upright on the planes.

    Parameters
    ----------
    records
        Returns the images that are worked on.
    refused
        Called with one sentence on what was taken back.
    """

    def __init__(
        self, records: Callable[[], Sequence[ImageLayers]], refused: Callable[[str], object]
    ) -> None:
        self._records, self._refused = records, refused

    def follow(self, layer: Shapes) -> None:
        """Check what is drawn on a layer; connecting twice is connecting once."""
        layer.events.data.connect(self._on_data)

    def _on_data(self, event: Any) -> None:
        if event.action == "added":  # drawn to its end, but napari is still busy with it
            QTimer.singleShot(0, self._drop_stray)

    def _drop_stray(self) -> None:
        for record in self._records():
            if record.reviewed is not None and record.axes.drop_stray(record.reviewed):
                self._refused(
                    "A region lies in one plane; press Ctrl+E to roll the axes until height and "
                    f"width of '{record.image.name}' are shown, then draw it."
                )
