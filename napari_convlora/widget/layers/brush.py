"""What happens as the user turns from the annotations to the prediction, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from napari_convlora.errors import ConvLoRAError
from napari_convlora.widget.layers.image_layers import ImageLayers

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer


class Brush:
    """Takes up corrections before the annotations are painted on: the latest act is to win.

    The other way the brush goes along, so that a correction needs no more than a class.

    Parameters
    ----------
    viewer
        Whose active layer is followed.
    records
        Returns the images that are worked on.
    """

    def __init__(self, viewer: Viewer, records: Callable[[], Sequence[ImageLayers]]) -> None:
        self._viewer, self._records = viewer, records
        self._active: Layer | None = None
        viewer.layers.selection.events.active.connect(self._on_active)

    def close(self) -> None:
        """Let go of the viewer."""
        self._viewer.layers.selection.events.active.disconnect(self._on_active)

    def _on_active(self, event: Any) -> None:
        if event.value is None:
            return
        before, self._active = self._active, event.value
        for record in self._records():
            if event.value is record.annotations:
                with contextlib.suppress(ConvLoRAError):  # Adapt says what is wrong
                    record.collect_corrections()
            elif (
                event.value is record.prediction
                and before is record.annotations is not None
                and before.mode == "paint"
            ):
                for what in ("mode", "brush_size", "selected_label"):
                    setattr(event.value, what, getattr(before, what))
