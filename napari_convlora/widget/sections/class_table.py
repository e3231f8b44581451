"""The class table: key, colour, name, painted strokes and pixels of every class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtGui import QColor
from qtpy.QtWidgets import (
    QColorDialog,
    QHBoxLayout,
    QMenu,
    QPushButton,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.widget.sections.class_list import ClassList
from napari_convlora.widget.sections.class_rows import COLOUR, NAME, ClassRows


class ClassTable(QWidget):
    """Editable table of classes.

    Signals
    -------
    changed
        A class was added, renamed or recoloured.
    selected
        The id of the class to paint with.
    removal_asked
        The id of a class that the user wants to remove; whoever knows the painted pixels
        decides, and calls `remove`.
    merge_asked
        The ids of a class and of the one that is to take its pixels; as with removal, whoever knows
        the painted pixels decides.
    load_asked, save_asked
        The user wants to read or write a file of classes.
    refused
        One sentence that says why an edit was undone.
    """

    changed = Signal()
    selected = Signal(int)
    removal_asked = Signal(int)
    merge_asked = Signal(int, int)
    load_asked = Signal()
    save_asked = Signal()
    refused = Signal(str)

    def __init__(self, classes: Sequence[ClassInfo] = (), parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._list = ClassList()
        self._pixels: dict[int, int] = {}
        self._strokes: dict[int, int] = {}
        self._table = ClassRows()
        self._add = QPushButton("Add class")
        self._rename = QPushButton("Rename")
        self._remove = QPushButton("Remove")
        self._more = QPushButton("More")
        self._add.setToolTip("Add a class and type its name.")
        self._rename.setToolTip("Rename the selected class; or double-click its name.")
        self._remove.setToolTip("Remove the selected class and erase what is painted of it.")
        self._more.setToolTip("Merge classes, mark the background, load or save the table.")
        self._more.setMenu(self._menu())
        buttons = QHBoxLayout()
        buttons.setContentsMargins(0, 0, 0, 0)
        for button in (self._add, self._rename, self._remove, self._more):
            button.setAutoDefault(False)
            buttons.addWidget(button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._table)
        layout.addLayout(buttons)
        self._add.clicked.connect(self._on_add)
        self._rename.clicked.connect(self._table.edit_name)
        self._remove.clicked.connect(self._on_remove)
        self._table.itemChanged.connect(self._on_item_changed)
        self._table.itemSelectionChanged.connect(self._on_selection)
        self._table.cellClicked.connect(self._on_cell_clicked)
        self.set_classes(classes)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The table, by id."""
        return tuple(self._list.rows)

    @property
    def current(self) -> int:
        """Id of the selected class; 0 if there is none."""
        row, rows = self._table.currentRow(), self._list.rows
        return rows[row].id if 0 <= row < len(rows) else 0

    def name(self, class_id: int) -> str:
        """Return the name of a class of the table."""
        return self._list.rows[self._list.row(class_id)].name

    def set_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Replace the table without a word to anyone."""
        current = self.current
        self._list.replace(classes)
        self._show_list(current)

    def replace_with(self, classes: Sequence[ClassInfo], used: Collection[int]) -> None:
        """Take over a table from a file; other classes stay if their ids are `used`."""
        current = self.current
        others = self._list.take_over(classes)
        self._show_list(current)
        self.ensure([info for info in others if info.id in used])
        self.changed.emit()

    def mark_background(self, class_id: int) -> None:
        """Mark a class as what remains where annotation is complete, and no other."""
        for info in self.classes:
            if info.background != (info.id == class_id):
                self._edit(info.id, background=info.id == class_id)

    def add(self, name: str = "", colour: str = "") -> ClassInfo:
        """Add a class with the next free id.

        Raises
        ------
        InputError
            The table is full, or another class has the name.
        """
        new = self._list.add(name, colour)
        self._show_list(new)
        self.changed.emit()
        self.selected.emit(new)
        return self._list.rows[self._list.row(new)]

    def rename(self, class_id: int, name: str) -> None:
        """Rename a class.

        Raises
        ------
        InputError
            The name is empty, too long or taken.
        """
        self._edit(class_id, name=self._list.checked_name(name, class_id))

    def recolour(self, class_id: int, colour: str) -> None:
        """Give a class another colour, ``#rrggbb``."""
        self._edit(class_id, colour=QColor(colour).name())

    def remove(self, class_id: int) -> None:
        """Remove a class; its name comes back if undo brings its pixels back."""
        current = self.current
        self._list.remove(class_id)
        self._show_list(current)
        self.changed.emit()
        self.selected.emit(self.current)

    def ensure(self, classes: Sequence[ClassInfo]) -> None:
        """Add those of `classes` whose id has no row; an unnamed one gets its removed row back."""
        current = self.current
        added = self._list.ensure(classes)
        if added:
            self._show_list(current or added[0])
            self.changed.emit()

    def select(self, class_id: int) -> int:
        """Select a row, if there is one, without a word to anyone; returns the selected class."""
        self._table.select(self._list.row(class_id))
        return self.current

    def set_counts(self, pixels: Mapping[int, int], strokes: Mapping[int, int]) -> None:
        """Show how many pixels of each class are painted, and in how many strokes."""
        self._pixels, self._strokes = dict(pixels), dict(strokes)
        self._table.show_counts(self._list.rows, self._strokes, self._pixels)

    def _show_list(self, current: int) -> None:
        """Show every class, and `current` as selected, or else the first."""
        rows = self._list.rows
        self._show_rows()
        self.select(current or next((info.id for info in rows), 0))
        self._remove.setEnabled(len(rows) > 1)

    def _show_rows(self) -> None:
        self._table.show_classes(self._list.rows)
        self._table.show_counts(self._list.rows, self._strokes, self._pixels)

    def _menu(self) -> QMenu:
        menu = QMenu(self)
        self._merge = menu.addMenu("Merge into")
        self._merge.aboutToShow.connect(self._list_targets)
        menu.addAction("Mark as background", lambda: self.mark_background(self.current))
        menu.addSeparator()
        menu.addAction("Load class table…", self.load_asked.emit)
        menu.addAction("Save class table…", self.save_asked.emit)
        return menu

    def _list_targets(self) -> None:
        self._merge.clear()
        source = self.current
        for info in self.classes:
            if info.id != source:
                self._merge.addAction(info.name, partial(self.merge_asked.emit, source, info.id))

    def _edit(self, class_id: int, **values: Any) -> None:
        self._list.edit(class_id, **values)
        self._show_rows()  # all of them, as another may have become the background
        self.changed.emit()

    def _on_add(self) -> None:
        try:
            self.add()
        except InputError as error:
            self.refused.emit(str(error))
        else:
            self._table.edit_name()

    def _on_remove(self) -> None:
        if self.current and len(self._list.rows) > 1:
            self.removal_asked.emit(self.current)

    def _on_item_changed(self, item: QTableWidgetItem) -> None:
        if item.column() != NAME:
            return
        info = self._list.rows[item.row()]
        try:
            self.rename(info.id, item.text())
        except InputError as error:
            self._table.show_name(item.row(), info.name)
            self.refused.emit(str(error))

    def _on_selection(self) -> None:
        if self.current:
            self.selected.emit(self.current)

    def _on_cell_clicked(self, row: int, column: int) -> None:
        if column != COLOUR:
            return
        info = self._list.rows[row]
        colour = QColorDialog.getColor(QColor(info.colour), self, f"Colour of {info.name}")
        if colour.isValid():
            self.recolour(info.id, colour.name())
