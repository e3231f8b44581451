"""Marking a part of the prediction on the canvas: by a click, a rectangle or a lasso."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.layers import Shapes
from qtpy.QtCore import QObject, QTimer, Signal
from skimage.draw import polygon2mask

from napari_convlora.errors import InputError
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.new_layer import shapes_like

if TYPE_CHECKING:
    from napari_convlora.widget.layers.image_layers import ImageLayers

Kind = Literal["click", "rectangle", "lasso"]
_MODES = {"click": "pan_zoom", "rectangle": "add_rectangle", "lasso": "add_polygon_lasso"}


class RegionTool(QObject):
    """A Shapes layer that is there only while the user marks something.

    It takes the mouse and the keys, so that no other layer is painted on meanwhile. The tool is
    left with Esc, by selecting another layer or view, or by removing its own.

    Signals
    -------
    clicked
        Index (plane, row, column) of the pixel.
    drawn
        Plane, and which of its pixels (H, W) bool lie inside.
    left
        The tool is out of use.
    turned
        It is because the view is another: a sentence on what to do.
    undo_asked
        Ctrl-Z was pressed.
    """

    clicked = Signal(tuple)
    drawn = Signal(int, object)
    left = Signal()
    turned = Signal(str)
    undo_asked = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._layer: Shapes | None = None
        self._record: ImageLayers | None = None

    @property
    def active(self) -> bool:
        """Whether the user is marking something."""
        return self._layer is not None

    def start(self, record: ImageLayers, kind: Kind) -> None:
        """Let the user mark parts of the prediction of `record`, until `leave`.

        Raises
        ------
        InputError
            The viewer does not show the planes of the image.
        """
        self.leave()
        record.check_in_view()
        layer = shapes_like(
            record,
            "review region",
            edge_color="white",
            edge_width=2,
            face_color=[1, 1, 1, 0.2],
            metadata={class_colours.KEY: {"role": "region", "image": record.image.name}},
        )
        self._layer, self._record = layer, record
        layer.bind_key("Escape", lambda _: self.leave(), overwrite=True)
        layer.bind_key("Control-Z", lambda _: self.undo_asked.emit(), overwrite=True)
        layer.events.data.connect(self._on_data)
        record.viewer.add_layer(layer)
        record.viewer.layers.selection.active = layer
        layer.mode = _MODES[kind]
        if kind == "click":
            layer.mouse_drag_callbacks.append(self._follow)
        record.viewer.layers.selection.events.active.connect(self._on_active)
        for event in self._turns(record):
            event.connect(self._on_turned)

    def leave(self) -> None:
        """Take the layer away; nothing if the tool is not in use."""
        layer, record = self._layer, self._record
        if layer is None or record is None:
            return
        self._layer = self._record = None
        record.viewer.layers.selection.events.active.disconnect(self._on_active)
        for event in self._turns(record):
            event.disconnect(self._on_turned)
        if layer in record.viewer.layers:
            active = record.viewer.layers.selection.active
            record.viewer.layers.remove(layer)
            chosen = record.prediction if active == layer else active
            if chosen in record.viewer.layers:
                record.viewer.layers.selection.active = chosen
        self.left.emit()

    def _follow(self, layer: Shapes, event: Any) -> Iterator[None]:
        yield
        if event.type == "mouse_move":  # a drag moves the image
            while event.type == "mouse_move":
                yield
        elif self._record is not None:
            self.clicked.emit(self._index(layer.world_to_data(event.position)))

    def _on_data(self, event: Any) -> None:
        if event.action == "added":  # drawn to its end, but napari is still busy with it
            QTimer.singleShot(0, self._take)

    def _take(self) -> None:
        layer, record = self._layer, self._record
        if layer is None or record is None or not len(layer.data):
            return
        shape = layer.data[-1]
        layer.data = []
        axes = self._axes()
        plane = self._index(shape[0])[0]
        self.drawn.emit(plane, polygon2mask(record.planes_shape[1:], shape[:, axes[-2:]]))

    def _axes(self) -> list[int]:
        assert self._record is not None
        axis = self._record.channel_axis
        return [a for a in range(len(self._record.shape)) if a != axis]

    def _index(self, position: Any) -> tuple[int, int, int]:
        assert self._record is not None
        axes = self._axes()
        at = np.round(np.asarray(position)[axes]).astype(int)
        leading = tuple(self._record.shape[a] for a in axes[:-2])
        plane = np.ravel_multi_index(tuple(at[:-2]), leading, mode="clip") if leading else 0
        return int(plane), int(at[-2]), int(at[-1])

    @staticmethod
    def _turns(record: ImageLayers) -> tuple[Any, Any]:
        events = record.viewer.dims.events
        return events.order, events.ndisplay

    def _on_turned(self, event: Any) -> None:
        try:
            if self._record is not None:
                self._record.check_in_view()
        except InputError as error:
            self.leave()
            self.turned.emit(str(error))

    def _on_active(self, event: Any) -> None:
        # Later, as layers that come and go are active for a moment.
        QTimer.singleShot(0, self._check)

    def _check(self) -> None:
        record = self._record
        if record is not None and record.viewer.layers.selection.active != self._layer:
            self.leave()
