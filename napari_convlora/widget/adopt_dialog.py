"""The question what a Labels layer stands for that was not made here, or with other classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from napari.layers import Labels
from qtpy.QtCore import Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import (
    QButtonGroup,
    QComboBox,
    QDialog,
    QDialogButtonBox,
    QHeaderView,
    QLabel,
    QRadioButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_convlora.config import MAX_CLASSES, UNLABELLED, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.importing import Meaning, plan_import, propose_meaning, survey_values
from napari_convlora.widget.form import words
from napari_convlora.widget.layers import class_colours

_VALUE, _PIXELS, _CLASS, _BECOMES = range(4)
_HEADERS = ("Value", "Pixels", "Class", "Becomes")
_OTHERS = None  # the row of all values but 0


def is_strange(layer: Labels) -> bool:
    """Whether a layer has labels that were not made here."""
    return class_colours.KEY not in layer.metadata and bool(layer.data.any())


def ask(parent: QWidget, layer: Labels, kept: Sequence[ClassInfo]) -> Meaning | None:
    """Ask what the values of a layer stand for; None if the user cancels."""
    dialog = AdoptDialog(layer, kept, parent)
    try:
        return dialog.meaning() if dialog.exec() == QDialog.DialogCode.Accepted else None
    finally:
        dialog.deleteLater()


class _ClassBox(QComboBox):
    """Names of classes to choose from, or to type another; nothing changes unasked."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.setEditable(True)
        self.setInsertPolicy(QComboBox.InsertPolicy.NoInsert)
        self.setCompleter(None)  # it would make 'cell' the 'cell wall' that is there
        self.addItems(names)
        self.lineEdit().setPlaceholderText("unlabelled")

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        """Let the table scroll."""
        if event is not None:
            event.ignore()


class AdoptDialog(QDialog):
    """Asks what 0 is, and what the other values are called.

    Parameters
    ----------
    layer
        With values in it.
    kept
        Classes of the table, which are offered.

    Attributes
    ----------
    strokes, finished_mask
        The choice what 0 is; hidden where there is none.
    classes, objects
        The choice whether every value is a class, or all are one; hidden where there is one value.
    table, note, buttons
        The values with their classes, what is wrong with them, and the buttons at the end.
    """

    def __init__(
        self, layer: Labels, kept: Sequence[ClassInfo], parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        data = np.atleast_2d(layer.data.squeeze())
        self._seen = survey_values(data.reshape(-1, *data.shape[-2:]))
        self._names = class_colours.names_of(layer.features)
        self._kept = tuple(kept)
        self._typed: dict[int | None, str] = {}
        counts, values = self._seen.counts, self._seen.values
        self.setWindowTitle("What is in this layer?")
        self.strokes = QRadioButton("not labelled yet: the layer holds strokes")
        self.finished_mask = QRadioButton("background: the layer is a finished mask")
        self.classes = QRadioButton("a class")
        self.objects = QRadioButton("an object: all of them are one class")
        column = QVBoxLayout(self)
        column.addWidget(
            words(
                f"Say what the pixels of '{layer.name}' stand for before anything is learnt from "
                "them."
            )
        )
        zeros = counts.get(UNLABELLED, 0)
        named = any(name.casefold() == "background" for name in self._names.values())
        finished = self._seen.finished and not named
        share = f"{100 * zeros / data.size:.0f} % of all"
        title = f"0 ({zeros:,} pixels, {share}) is"
        self._ask(column, title, self.strokes, self.finished_mask, finished, zeros > 0)
        many = len(values) > MAX_CLASSES
        title = f"Each of the {len(values):,} other values is"
        self._ask(column, title, self.classes, self.objects, self._seen.instances, len(values) > 1)
        self.classes.setEnabled(not many)
        if many:
            self.classes.setText(f"a class (there can be {MAX_CLASSES} at most)")
        self.table = QTableWidget(0, len(_HEADERS))
        self.table.setHorizontalHeaderLabels(_HEADERS)
        self.table.setSelectionMode(QTableWidget.SelectionMode.NoSelection)
        self.table.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.table.setShowGrid(False)
        self.table.verticalHeader().hide()
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(_CLASS, QHeaderView.ResizeMode.Stretch)
        self.note = words()
        self.note.setTextFormat(Qt.TextFormat.PlainText)
        self.buttons = QDialogButtonBox(
            QDialogButtonBox.StandardButton.Ok | QDialogButtonBox.StandardButton.Cancel
        )
        self.buttons.button(QDialogButtonBox.StandardButton.Ok).setText("Use as annotations")
        self.buttons.accepted.connect(self.accept)
        self.buttons.rejected.connect(self.reject)
        for part in (self.table, self.note, self.buttons):
            column.addWidget(part)
        for choice in (self.finished_mask, self.objects):
            choice.toggled.connect(self._fill)
        self._fill()
        self.resize(560, 460)

    def meaning(self) -> Meaning:
        """Return what the user has said."""
        names = {v: self._combo(row).currentText() for row, v in enumerate(self._rows)}
        others = names.pop(_OTHERS, "")
        if not self.finished_mask.isChecked():
            names.pop(UNLABELLED, None)
        return Meaning({v: name for v, name in names.items() if v is not None}, others)

    def class_box(self, value: int | None) -> QComboBox:
        """Return where the class of a value is chosen or typed; None: of all values but 0."""
        return self._combo(self._rows.index(value))

    def _ask(
        self,
        column: QVBoxLayout,
        title: str,
        first: QRadioButton,
        second: QRadioButton,
        proposed: bool,
        asked: bool,
    ) -> None:
        group = QButtonGroup(self)
        question = QLabel(title)
        question.setContentsMargins(0, 8, 0, 0)
        font = question.font()
        font.setBold(True)
        question.setFont(font)
        for button in (first, second):
            group.addButton(button)
        (second if proposed else first).setChecked(True)
        for part in (question, first, second):
            column.addWidget(part)
            part.setVisible(asked)

    def _combo(self, row: int) -> QComboBox:
        combo = self.table.cellWidget(row, _CLASS)
        assert isinstance(combo, QComboBox)
        return combo

    def _fill(self) -> None:
        """Have a row for every value that has a class; what was typed stays."""
        seen, finished, one_class = (
            self._seen,
            self.finished_mask.isChecked(),
            self.objects.isChecked(),
        )
        proposed = propose_meaning(
            seen, self._kept, self._names, finished=finished, one_class=one_class
        )
        counts: dict[int | None, int] = dict(seen.counts.items())
        self._rows: list[int | None] = list(seen.counts)
        if one_class:
            counts[_OTHERS] = sum(n for v, n in seen.counts.items() if v > 0)
            self._rows = [*(v for v in seen.counts if v <= 0), _OTHERS]
        objects = [v for v in seen.values if v > 0]
        self.table.setRowCount(len(self._rows))
        for row, value in enumerate(self._rows):
            title = str(value) if value is not None else f"{objects[0]} to {objects[-1]}"
            pixels = QTableWidgetItem(f"{counts[value]:,}")
            pixels.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
            for at, item in (
                (_VALUE, QTableWidgetItem(title)),
                (_PIXELS, pixels),
                (_BECOMES, QTableWidgetItem()),
            ):
                item.setFlags(Qt.ItemFlag.ItemIsEnabled)
                self.table.setItem(row, at, item)
            combo = _ClassBox([info.name for info in self._kept])
            known = proposed.others if value is None else proposed.names.get(value, "")
            asked = finished or value != UNLABELLED
            combo.setEnabled(asked)
            combo.setCurrentText(self._typed.get(value, known) if asked else "")
            combo.currentTextChanged.connect(lambda text, v=value: self._on_typed(v, text))
            self.table.setCellWidget(row, _CLASS, combo)
        self._check()

    def _on_typed(self, value: int | None, text: str) -> None:
        self._typed[value] = text
        self._check()

    def _check(self) -> None:
        """Say what would become of the values, or what is wrong."""
        seen, ok = self._seen, self.buttons.button(QDialogButtonBox.StandardButton.Ok)
        try:
            become = plan_import(seen.counts, self.meaning(), self._kept)
        except InputError as error:
            self.note.setText(str(error))
            ok.setEnabled(False)
            return
        ok.setEnabled(True)
        kept = {info.id for info in self._kept}
        for row, value in enumerate(self._rows):
            class_id = become.ids[seen.values[-1] if value is None else value]
            there = "already there" if class_id in kept else "new"
            text = f"class {class_id}, {there}" if class_id else "unlabelled"
            self.table.item(row, _BECOMES).setText(text)
        self.note.setText(
            "The layer stays as it is, hidden: its copy becomes the annotations."
            if become.changes
            else "The layer itself becomes the annotations."
        )
