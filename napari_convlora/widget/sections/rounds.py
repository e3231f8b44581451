"""The section of the history of rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_convlora.config import StartName
from napari_convlora.errors import ConvLoRAError
from napari_convlora.project import RoundRecord
from napari_convlora.widget import dialogs
from napari_convlora.widget.autosave.round_history import RoundHistory
from napari_convlora.widget.sections.plot import RoundsPlot

_COLUMNS = {
    "Round": "✓ marks the installed one, which predicts.",
    "Score": "Mean IoU, 0 to 1, on held-out labels, or on those it was trained on.",
    "Time": "Seconds of training.",
    "Labels": "Annotated pixels that it learnt from.",
    "Right later": "How many of the pixels that you painted afterwards it had predicted right.",
}
_EMPTY = "No round yet: every press of Adapt adds one here, to compare and to roll back."
_MOST_ROWS = 6


class RoundsSection(QWidget):
    """Table of rounds: score, time, labels, and which one is installed.

    Signals
    -------
    failed
        What went wrong, in one sentence.
    """

    failed = Signal(str)

    def __init__(self, history: RoundHistory, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._history = history
        self._shown: list[RoundRecord] = []
        self.table = QTableWidget(0, len(_COLUMNS))
        self.table.setHorizontalHeaderLabels(list(_COLUMNS))
        for i, tip in enumerate(_COLUMNS.values()):
            self.table.horizontalHeaderItem(i).setToolTip(tip)
        self.plot = RoundsPlot()
        self.empty = QLabel(_EMPTY)
        self.empty.setWordWrap(True)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.verticalHeader().hide()
        self.table.horizontalHeader().setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        self.table.horizontalHeader().setStretchLastSection(True)
        self.table.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.install_button = QPushButton("Install")
        self.install_button.setToolTip("Let the selected round predict, for example to roll back.")
        self.recipe_button = QPushButton("Recipe…")
        self.recipe_button.setToolTip("Write a file that repeats the selected round anywhere.")
        self.go_on = QCheckBox("Next round goes on from the installed one")
        self.go_on.setToolTip("Otherwise it fits from the base on all labels.")
        self.install_button.clicked.connect(lambda: self._on_selected(history.install))
        self.recipe_button.clicked.connect(lambda: self._on_selected(self._export))
        buttons = QHBoxLayout()
        for button in (self.install_button, self.recipe_button):
            buttons.addWidget(button)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(self.empty)
        column.addWidget(self.table)
        column.addWidget(self.plot)
        column.addLayout(buttons)
        column.addWidget(self.go_on)
        history.changed.connect(self.refresh)
        self.table.itemSelectionChanged.connect(self._enable)
        self.refresh()

    @property
    def start(self) -> StartName:
        """What the next round starts from."""
        return "installed" if self.go_on.isChecked() else "base"

    @property
    def chosen(self) -> RoundRecord | None:
        """The selected round."""
        rows = self.table.selectionModel().selectedRows()
        return self._shown[rows[0].row()] if rows else None

    def refresh(self) -> None:
        """Show the history as it is."""
        chosen = self.chosen
        self._shown = self._history.records[::-1]  # the newest first
        self.empty.setVisible(not self._shown)
        self.table.setVisible(bool(self._shown))
        self.table.setRowCount(len(self._shown))
        rows = 1 + min(len(self._shown), _MOST_ROWS)
        self.table.setFixedHeight(rows * self.table.verticalHeader().defaultSectionSize() + 4)
        for row, record in enumerate(self._shown):
            for column, text in enumerate(self._texts(record)):
                item = QTableWidgetItem(text)
                item.setToolTip(f"{record.reason}\n{self._history.learnt_from(record)}")
                self.table.setItem(row, column, item)
        scores = [(r.number, r.score) for r in self._shown[::-1] if r.score is not None]
        found = sorted(self._history.curve.items())
        later = [(number, c.mean_iou) for number, c in found if c.pixels]
        self.plot.show_rounds(scores, later)
        self.plot.setVisible(len(scores) > 1)  # a curve of one point says nothing
        if self.chosen != chosen:  # Qt keeps the row selected, in which another round is now
            self.table.clearSelection()
            if chosen in self._shown:
                self.table.selectRow(self._shown.index(chosen))
        self._enable()

    def _texts(self, record: RoundRecord) -> tuple[str, ...]:
        score = "not scored"
        if record.score is not None:
            score = f"{record.score:.2f} {'held-out' if record.held_out else 'training'}"
        later = self._history.curve.get(record.number)
        mark = " ✓" if record.number == self._history.installed else ""
        return (
            f"{record.number}{mark}",
            score,
            f"{record.seconds:.0f} s",
            f"{sum(record.pixels.values()):,}",
            f"{later.accuracy:.0%} of {later.pixels:,}" if later and later.pixels else "",
        )

    def _enable(self) -> None:
        for button in (self.install_button, self.recipe_button):
            button.setEnabled(self.chosen is not None)

    def _on_selected(self, action: Callable[[int], None]) -> None:
        assert self.chosen is not None
        try:
            action(self.chosen.number)
        except ConvLoRAError as error:
            self.failed.emit(str(error))

    def _export(self, number: int) -> None:
        dialogs.with_recipe(self, lambda p: self._history.export_recipe(number, Path(p)))
