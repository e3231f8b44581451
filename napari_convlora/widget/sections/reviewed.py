"""Buttons for reviewed regions: where what is unpainted is background."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QGridLayout, QPushButton, QWidget

from napari_convlora.errors import ConvLoRAError
from napari_convlora.widget.form import words

if TYPE_CHECKING:
    from napari_convlora.widget.layers.label_counts import LabelCounts
    from napari_convlora.widget.layers.open_images import OpenImages

_HELP = (
    "Inside a reviewed region your annotation is complete: unpainted pixels count as background. "
    "To undo, select the shape and press Delete."
)


class ReviewedForm(QWidget):
    """Buttons that make reviewed regions of the current image.

    Signals
    -------
    said
        What went wrong, in one sentence.
    """

    said = Signal(str)

    def __init__(self, images: OpenImages, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._images = images
        self.rectangle = QPushButton("Draw rectangle")
        self.polygon = QPushButton("Draw polygon")
        self.rectangle.setToolTip("Drag a rectangle around what you have annotated completely.")
        self.polygon.setToolTip("Click around what you have annotated completely; Enter ends it.")
        self.whole = QPushButton("This plane is complete")
        self.whole.setToolTip("Everything on this plane that is unpainted is background.")
        self.words = words(_HELP)
        layout = QGridLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.rectangle, 0, 0)
        layout.addWidget(self.polygon, 0, 1)
        layout.addWidget(self.whole, 1, 0, 1, 2)
        layout.addWidget(self.words, 2, 0, 1, 2)
        self.rectangle.clicked.connect(lambda: self.draw("add_rectangle"))
        self.polygon.clicked.connect(lambda: self.draw("add_polygon"))
        self.whole.clicked.connect(self.complete_plane)

    def draw(self, mode: str) -> None:
        """Let the user draw regions in a mode of napari's Shapes layers."""
        try:
            self._images.need().check_in_view()
            layer = self._images.start_reviewing()
        except ConvLoRAError as error:
            self.said.emit(str(error))
            return
        self._images.viewer.layers.selection.active = layer
        layer.mode = mode

    def complete_plane(self) -> None:
        """Make a region of the whole plane that is shown."""
        try:
            record = self._images.need()
            record.check_in_view()
            plane, (_, height, width) = record.plane(), record.planes_shape
            low, high, far = -0.5, height - 0.5, width - 0.5
            whole = np.array([[low, low], [low, far], [high, far], [high, low]])
            if any(p == plane and np.array_equal(v, whole) for p, v in record.outlines()):
                raise ConvLoRAError(
                    "This plane is marked as complete already; go to another, or select its shape "
                    "and press Delete."
                )
            layer = self._images.start_reviewing()
        except ConvLoRAError as error:
            self.said.emit(str(error))
            return
        layer.add_rectangles(record.axes.place(plane, whole))


def reviewed_text(counts: LabelCounts, has_background: bool) -> str:
    """Return what the regions come to, in words."""
    if not counts.regions:
        return "Reviewed regions"
    regions = f"{counts.regions} reviewed region{'s' if counts.regions > 1 else ''}"
    if not has_background:
        return f"{regions}: mark a background class"
    return f"{regions}, {counts.remaining:,} px as background"
