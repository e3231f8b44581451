"""Whether the user is in the middle of a stroke on a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from napari.layers import Labels
from qtpy.QtCore import QTimer


class StrokeWatch:
    """Follows mouse strokes on one layer, from press to release.

    Parameters
    ----------
    layer
        To be followed until `end`.

    Attributes
    ----------
    active
        Whether the user is in the middle of a stroke.
    """

    def __init__(self, layer: Labels) -> None:
        self.active = False
        self._layer = layer
        self._waiting: Callable[[], object] | None = None
        layer.mouse_drag_callbacks.append(self._follow)

    def afterwards(self, action: Callable[[], object]) -> None:
        """Call `action` when the stroke has ended; a later one takes its place."""
        self._waiting = action

    @property
    def waiting(self) -> bool:
        """Whether something is to be done when the stroke has ended."""
        return self._waiting is not None

    def end(self) -> None:
        """Follow the layer no more."""
        self._layer.mouse_drag_callbacks.remove(self._follow)

    def _follow(self, layer: Labels, event: Any) -> Iterator[None]:
        self.active = True
        try:
            yield
            while event.type == "mouse_move":
                yield
        finally:
            self.active = False
            if self._waiting is not None:
                # Later, as napari closes the stroke's undo item after its callbacks have run.
                QTimer.singleShot(0, self._waiting)
                self._waiting = None
