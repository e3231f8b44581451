"""How a class table looks: a row of key, colour, name, strokes and pixels for every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtpy.QtCore import QSize, Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QTableWidget,
    QTableWidgetItem,
    QWidget,
)
from superqt.utils import signals_blocked

from napari_convlora.config import ClassInfo
from napari_convlora.labels.classes import find_background

KEY, COLOUR, NAME, STROKES, PIXELS = range(5)
_HEADERS = ("Key", "", "Class", "Strokes", "Pixels")
_SWATCH = 18
_ROW = _SWATCH + 10
_ROWS = 2, 5  # least and most that are shown without scrolling


class ClassRows(QTableWidget):
    """Rows of classes; what is shown by itself is no edit of the user, and gives no signal."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(0, len(_HEADERS), parent)
        self.setHorizontalHeaderLabels(_HEADERS)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(
            QAbstractItemView.EditTrigger.DoubleClicked
            | QAbstractItemView.EditTrigger.EditKeyPressed
        )
        self.setIconSize(QSize(_SWATCH, _SWATCH))
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(_ROW)
        header = self.horizontalHeader()
        header.setSectionResizeMode(COLOUR, QHeaderView.ResizeMode.Fixed)
        header.setSectionResizeMode(NAME, QHeaderView.ResizeMode.Stretch)
        for column in (KEY, STROKES, PIXELS):
            header.setSectionResizeMode(column, QHeaderView.ResizeMode.ResizeToContents)
        self.setColumnWidth(COLOUR, _SWATCH + 18)
        # Keys go on to the canvas, where 1 to 9 choose a class: Qt would search the names for them.
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)

    def show_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Have a row for each of `classes`; its counts are empty."""
        background = find_background(classes)
        with signals_blocked(self):
            self.setRowCount(len(classes))
            rows = sorted((*_ROWS, len(classes)))[1]
            self.setFixedHeight((rows + 1) * _ROW)  # the header is a little lower
            for row, info in enumerate(classes):
                self._show_class(row, info, info.id == background)

    def show_counts(
        self, classes: Sequence[ClassInfo], strokes: Mapping[int, int], pixels: Mapping[int, int]
    ) -> None:
        """Show how much of each class is painted.

        Parameters
        ----------
        classes
            Those in the rows.
        strokes, pixels
            Counts by class id.
        """
        with signals_blocked(self):
            for row, info in enumerate(classes):
                for column, counts in ((STROKES, strokes), (PIXELS, pixels)):
                    item, n = self.item(row, column), counts.get(info.id, 0)
                    item.setText(f"{n:,}" if n else "–")
                    item.setToolTip("" if n else f"No labels yet for {info.name} in this image")
                    item.setTextAlignment(
                        Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
                    )

    def show_name(self, row: int, name: str) -> None:
        """Show a name in place of what was typed."""
        with signals_blocked(self):
            self.item(row, NAME).setText(name)

    def select(self, row: int) -> None:
        """Select a row, if there is one."""
        if row >= 0 and row != self.currentRow():
            with signals_blocked(self):
                self.setCurrentCell(row, NAME)

    def edit_name(self) -> None:
        """Let the user type the name of the selected row."""
        row = self.currentRow()
        if row >= 0:
            self.editItem(self.item(row, NAME))

    def _show_class(self, row: int, info: ClassInfo, background: bool) -> None:
        pixmap = QPixmap(_SWATCH, _SWATCH)
        pixmap.fill(QColor(info.colour))
        icon = QIcon(pixmap)
        icon.addPixmap(pixmap, QIcon.Mode.Selected)  # or Qt would tint it
        number = str(row + 1) if row < 9 else ""
        key, swatch, name = (
            QTableWidgetItem(number),
            QTableWidgetItem(icon, ""),
            QTableWidgetItem(info.name),
        )
        if number:
            key.setToolTip(f"Class {info.id}: on the canvas, press {number} to paint with it")
        swatch.setToolTip(f"Class {info.id}: click to change its colour")
        tip = f"Class {info.id}: double-click to rename"
        if background:
            font = name.font()
            font.setItalic(True)
            name.setFont(font)
            tip += ". It is the background of reviewed regions."
        name.setToolTip(tip)
        for column, item in enumerate((key, swatch, name, QTableWidgetItem(), QTableWidgetItem())):
            if item is not name:
                item.setFlags(item.flags() & ~Qt.ItemFlag.ItemIsEditable)
            self.setItem(row, column, item)
