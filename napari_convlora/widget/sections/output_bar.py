"""Buttons for what is learnt: predict with it, write it, read it."""

from __future__ import annotations

from qtpy.QtWidgets import QGridLayout, QPushButton, QWidget


class OutputBar(QWidget):
    """Predict, export masks, load and export an adapter.

    Attributes
    ----------
    predict, masks, load, save
        The buttons.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.predict = QPushButton("Predict")
        self.predict.setToolTip("Predict this image with the adapter there is.")
        self.masks = QPushButton("Export masks…")
        self.masks.setToolTip("Write the prediction with your annotations on top; TIFF or PNG.")
        self.load = QPushButton("Load adapter…")
        self.load.setToolTip("Predict with what was learnt elsewhere; a .safetensors file.")
        self.save = QPushButton("Export adapter…")
        self.save.setToolTip("Write what was learnt, for other images and other people.")
        grid = QGridLayout(self)
        grid.setContentsMargins(0, 0, 0, 0)
        for i, button in enumerate((self.predict, self.masks, self.load, self.save)):
            grid.addWidget(button, i // 2, i % 2)

    def show_state(self, *, image: bool, adapter: bool, predicted: bool, idle: bool) -> None:
        """Offer what is possible.

        Parameters
        ----------
        image, adapter, predicted
            Whether there is one to work on, one to predict with, and a prediction to write.
        idle
            Whether nothing runs.
        """
        self.predict.setEnabled(idle and image and adapter)
        self.load.setEnabled(idle)
        self.save.setEnabled(idle and adapter)
        self.masks.setEnabled(predicted)
