"""A prediction layer and what the model wrote into it: what differs was painted by the user."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from napari.layers import Labels

from napari_convlora.config import UNLABELLED
from napari_convlora.labels.annotations import merge_corrections
from napari_convlora.widget.layers.stroke_watch import StrokeWatch


def set_pixels(layer: Labels, flat: np.ndarray, values: np.ndarray) -> None:
    """Set pixels, by their index into the flattened image, as one item of the undo history."""
    where = np.unravel_index(flat, layer.data.shape)
    layer.data_setitem(where, values.astype(layer.data.dtype))


class PredictionLayer:
    """Tells corrections from what the model said; what a new layer holds counts as the model's.

    Parameters
    ----------
    layer
        A Labels layer, followed until `let_go`.
    shape
        (P, H, W) of its image.

    Attributes
    ----------
    begun
        Whether the model has written anything.
    edited
        Whether the user may have painted since the model last wrote.
    stroke
        Whether the user is painting right now.
    """

    def __init__(self, layer: Labels, shape: tuple[int, int, int]) -> None:
        self.layer, self._shape = layer, shape
        self._written = np.zeros(shape, np.uint8)
        self.begun = bool(self.view.any())
        if self.begun:  # memory of zeros is not taken before it is written to
            np.copyto(self._written, self.view, casting="unsafe")
        self.edited = False
        self.stroke = StrokeWatch(layer)
        layer.events.paint.connect(self._on_edit)

    @property
    def view(self) -> np.ndarray:
        """What the layer shows (P, H, W), as a view."""
        return self.layer.data.reshape(self._shape)

    @property
    def left(self) -> np.ndarray:
        """What the model wrote (P, H, W), without what the user has cleared."""
        return np.where(self.view == UNLABELLED, np.uint8(UNLABELLED), self._written)

    def corrected(self, part: Any = np.s_[:]) -> np.ndarray:
        """Whether pixels (an index into (P, H, W)) were painted by the user."""
        now = self.view[part]
        return (now != self._written[part]) & (now != UNLABELLED)

    def corrections(self, painted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where `painted` (P, H, W), flattened, says something else now, and what."""
        found = [(np.empty(0, np.intp), np.empty(0, painted.dtype))]
        changed = [(n != b).any() for n, b in zip(self.view, self._written, strict=True)]
        for p in np.flatnonzero(changed):
            part = np.s_[p : p + 1]
            merged = merge_corrections(painted[part], self._written[part], self.view[part])[0]
            at = np.flatnonzero(merged != painted[p])
            found.append((at + p * merged.size, merged.ravel()[at]))
        at, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return at, values

    def write(self, parts: Iterable[tuple[Any, np.ndarray]]) -> None:
        """Write class ids into parts (indices into (P, H, W)), as the model's own."""
        for part, labels in parts:
            self.view[part] = self._written[part] = labels
            self.begun = True
        self._forget_undo()
        self.layer.refresh()

    def settle(self) -> None:
        """Take what is shown for the model's own from now on."""
        np.copyto(self._written, self.view, casting="unsafe")
        self._forget_undo()

    def let_go(self) -> None:
        """Follow the layer no more."""
        self.layer.events.paint.disconnect(self._on_edit)
        self.stroke.end()

    def _on_edit(self, event: Any) -> None:
        # Undo and redo do not say "paint", but neither can come before the first edit.
        self.edited = True

    def _forget_undo(self) -> None:
        layer = self.layer
        if layer.editable and self.edited:
            # The one public way to drop the undo history; stale items would write old pixels.
            mode = layer.mode
            layer.editable = False
            layer.editable = True
            layer.mode = mode
        self.edited = False
