"""One image at a time is seen: the layers of others are hidden where they lie over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Layer

from napari_convlora.widget.layers.class_colours import is_output
from napari_convlora.widget.layers.image_layers import ImageLayers

if TYPE_CHECKING:
    from napari.viewer import Viewer

_COVERING = ("translucent", "translucent_no_depth", "opaque")


class Visibility:
    """Hides layers and shows them again; what the user has hidden stays so.

    Parameters
    ----------
    viewer
        Whose layers these are.
    """

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._hidden: set[Layer] = set()
        self._records: Sequence[ImageLayers] = ()
        viewer.layers.events.inserted.connect(self._on_inserted)
        viewer.layers.events.removed.connect(self._on_removed)

    def close(self) -> None:
        """Let go of the viewer."""
        self._viewer.layers.events.inserted.disconnect(self._on_inserted)
        self._viewer.layers.events.removed.disconnect(self._on_removed)

    def turn_to(self, chosen: Image, records: Sequence[ImageLayers]) -> None:
        """Show the layers of an image that were hidden here, and hide those of others over it.

        Images beside each other, in a mosaic or in napari's grid, stay as they are, and so do
        images that were never worked on, unless they cover this one.

        Parameters
        ----------
        chosen
            The image to see.
        records
            All images that were worked on.
        """
        self._records = records
        for layer in self._hidden.intersection([chosen, *self._layers_of(chosen)]):
            layer.visible = True
            self._hidden.discard(layer)
        if len(records) == 1:  # a panel that is opened hides nothing
            return
        layers = self._viewer.layers
        # Equal, not the same: napari hands plugins proxies of layers.
        for other in [x for x in layers if isinstance(x, Image) and not is_output(x)]:
            if other == chosen or not self._over(other, chosen):
                continue
            own = self._layers_of(other)
            covers = layers.index(other) > layers.index(chosen) and _covers(other)
            if own or covers:
                for layer in (other, *own):
                    self._hide(layer)

    def _over(self, one: Image, other: Image) -> bool:
        n = min(one.ndim, other.ndim)
        (top, bottom), (first, last) = (i.extent.world[:, -n:] for i in (one, other))
        overlap = np.maximum(top, first) <= np.minimum(bottom, last)
        return not self._viewer.canvas.grid.enabled and bool(overlap.all())

    def _layers_of(self, image: Image) -> list[Layer]:
        mine = (record for record in self._records if record.image == image)
        return [layer for r in mine for layer in (*r.layers, *r.extra.companions)]

    def _hide(self, layer: Layer) -> None:
        if layer in self._viewer.layers and layer.visible:
            layer.visible = False
            self._hidden.add(layer)

    def _on_inserted(self, event: Any) -> None:
        """Hide what a round or a prediction brings that goes on behind another image."""
        for record in self._records:
            if record.image in self._hidden and event.value in self._layers_of(record.image):
                self._hide(event.value)

    def _on_removed(self, event: Any) -> None:
        # The layers of an image that was removed stay hidden until it is back.
        self._hidden.discard(event.value)


def _covers(image: Image) -> bool:
    return image.visible and image.opacity == 1 and str(image.blending) in _COVERING
