"""The class table: key, colour, name, painted strokes and pixels of every class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qtpy.QtCore import QSize, Qt, Signal
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
    QColorDialog,
    QHBoxLayout,
    QHeaderView,
    QMenu,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)
from superqt.utils import signals_blocked

from napari_convlora.config import MAX_CLASSES, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.classes import default_classes, find_background

_KEY, _COLOUR, _NAME, _STROKES, _PIXELS = range(5)
_HEADERS = ("Key", "", "Class", "Strokes", "Pixels")
_SWATCH = 18
_ROW = _SWATCH + 10
_ROWS = 2, 5  # least and most that are shown without scrolling
_MAX_NAME = 200


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
        self._classes: list[ClassInfo] = []
        self._removed: dict[int, ClassInfo] = {}
        self._pixels: dict[int, int] = {}
        self._strokes: dict[int, int] = {}
        self._table = QTableWidget(0, len(_HEADERS))
        self._table.setHorizontalHeaderLabels(_HEADERS)
        self._table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self._table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self._table.setEditTriggers(
            QAbstractItemView.EditTrigger.DoubleClicked
            | QAbstractItemView.EditTrigger.EditKeyPressed
        )
        self._table.setIconSize(QSize(_SWATCH, _SWATCH))
        self._table.setShowGrid(False)
        self._table.setWordWrap(False)
        self._table.verticalHeader().hide()
        self._table.verticalHeader().setDefaultSectionSize(_ROW)
        header = self._table.horizontalHeader()
        header.setSectionResizeMode(_COLOUR, QHeaderView.ResizeMode.Fixed)
        header.setSectionResizeMode(_NAME, QHeaderView.ResizeMode.Stretch)
        for column in (_KEY, _STROKES, _PIXELS):
            header.setSectionResizeMode(column, QHeaderView.ResizeMode.ResizeToContents)
        self._table.setColumnWidth(_COLOUR, _SWATCH + 18)
        # Keys go on to the canvas, where 1 to 9 choose a class: Qt would search the names for them.
        self._table.setFocusPolicy(Qt.FocusPolicy.NoFocus)
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
        self._rename.clicked.connect(self._on_rename)
        self._remove.clicked.connect(self._on_remove)
        self._table.itemChanged.connect(self._on_item_changed)
        self._table.itemSelectionChanged.connect(self._on_selection)
        self._table.cellClicked.connect(self._on_cell_clicked)
        self.set_classes(classes)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The table, by id."""
        return tuple(self._classes)

    @property
    def current(self) -> int:
        """Id of the selected class; 0 if there is none."""
        row = self._table.currentRow()
        return self._classes[row].id if 0 <= row < len(self._classes) else 0

    def name(self, class_id: int) -> str:
        """Return the name of a class of the table."""
        return self._classes[self._row(class_id)].name

    def set_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Replace the table without a word to anyone."""
        current = self.current
        self._classes = sorted(classes, key=lambda info: info.id)
        with signals_blocked(self._table):
            self._table.setRowCount(len(self._classes))
            rows = sorted((*_ROWS, len(self._classes)))[1]
            self._table.setFixedHeight((rows + 1) * _ROW)  # the header is a little lower
            for row, info in enumerate(self._classes):
                self._fill(row, info)
        self.select(current or next((info.id for info in self._classes), 0))
        self._remove.setEnabled(len(self._classes) > 1)

    def replace_with(self, classes: Sequence[ClassInfo], used: Collection[int]) -> None:
        """Take over a table from a file; other classes stay if their ids are `used`."""
        taken = {info.id for info in classes}
        others = [info for info in self._classes if info.id not in taken]
        self._removed |= {info.id: info for info in others}
        self.set_classes(classes)
        self.ensure([info for info in others if info.id in used])
        self.changed.emit()

    def mark_background(self, class_id: int) -> None:
        """Mark a class as what remains where annotation is complete, and no other."""
        for info in self._classes:
            if info.background != (info.id == class_id):
                self._edit(info.id, background=info.id == class_id)

    def add(self, name: str = "", colour: str = "") -> ClassInfo:
        """Add a class with the next free id.

        Raises
        ------
        InputError
            The table is full, or another class has the name.
        """
        taken = {info.id for info in self._classes}
        last = max(taken | set(self._removed), default=0)
        free = [last + 1, *range(1, MAX_CLASSES + 1)]  # an erased class's id is used again last
        new = next((i for i in free if i not in taken and i <= MAX_CLASSES), None)
        if new is None:
            raise InputError(f"The table is full with {MAX_CLASSES} classes; remove one first.")
        (info,) = default_classes([new])
        info = replace(
            info, name=self._checked_name(name, new) if name else self._unique(info.name)
        )
        self._removed.pop(new, None)
        self.set_classes([*self._classes, replace(info, colour=colour or info.colour)])
        self.select(new)
        self.changed.emit()
        self.selected.emit(new)
        return self._classes[self._row(new)]

    def rename(self, class_id: int, name: str) -> None:
        """Rename a class.

        Raises
        ------
        InputError
            The name is empty, too long or taken.
        """
        self._edit(class_id, name=self._checked_name(name, class_id))

    def recolour(self, class_id: int, colour: str) -> None:
        """Give a class another colour, ``#rrggbb``."""
        self._edit(class_id, colour=QColor(colour).name())

    def remove(self, class_id: int) -> None:
        """Remove a class; its name comes back if undo brings its pixels back."""
        info = self._classes[self._row(class_id)]
        self._removed[class_id] = info
        self.set_classes([other for other in self._classes if other is not info])
        self.changed.emit()
        self.selected.emit(self.current)

    def ensure(self, classes: Sequence[ClassInfo]) -> None:
        """Add those of `classes` whose id has no row; an unnamed one gets its removed row back."""
        taken = {info.id for info in self._classes}
        missing = []
        for info in (i for i in classes if i.id not in taken):
            removed = self._removed.pop(info.id, info)
            missing.append(removed if (info,) == default_classes([info.id]) else info)
        for info in missing:  # one by one, as two of them may share a name
            self.set_classes([*self._classes, replace(info, name=self._unique(info.name))])
        if missing:
            self.changed.emit()

    def select(self, class_id: int) -> int:
        """Select a row, if there is one, without a word to anyone; returns the selected class."""
        row = self._row(class_id)
        if row >= 0 and row != self._table.currentRow():
            with signals_blocked(self._table):
                self._table.setCurrentCell(row, _NAME)
        return self.current

    def set_counts(self, pixels: Mapping[int, int], strokes: Mapping[int, int]) -> None:
        """Show how many pixels of each class are painted, and in how many strokes."""
        self._pixels, self._strokes = dict(pixels), dict(strokes)
        with signals_blocked(self._table):
            for row in range(len(self._classes)):
                self._fill_counts(row)

    def _row(self, class_id: int) -> int:
        return next((r for r, info in enumerate(self._classes) if info.id == class_id), -1)

    def _fill(self, row: int, info: ClassInfo) -> None:
        pixmap = QPixmap(_SWATCH, _SWATCH)
        pixmap.fill(QColor(info.colour))
        icon = QIcon(pixmap)
        icon.addPixmap(pixmap, QIcon.Mode.Selected)  # or Qt would tint it
        key = QTableWidgetItem(str(row + 1) if row < 9 else "")
        swatch, name = QTableWidgetItem(icon, ""), QTableWidgetItem(info.name)
        if key.text():
            key.setToolTip(f"Class {info.id}: on the canvas, press {key.text()} to paint with it")
        swatch.setToolTip(f"Class {info.id}: click to change its colour")
        name.setToolTip(f"Class {info.id}: double-click to rename")
        if info.id == find_background(self._classes):
            font = name.font()
            font.setItalic(True)
            name.setFont(font)
            name.setToolTip(f"{name.toolTip()}. It is the background of reviewed regions.")
        cells = (key, swatch, name, QTableWidgetItem(), QTableWidgetItem())
        for column, item in enumerate(cells):
            if item is not name:
                item.setFlags(item.flags() & ~Qt.ItemFlag.ItemIsEditable)
            self._table.setItem(row, column, item)
        self._fill_counts(row)

    def _fill_counts(self, row: int) -> None:
        info = self._classes[row]
        for column, counts in ((_STROKES, self._strokes), (_PIXELS, self._pixels)):
            item, n = self._table.item(row, column), counts.get(info.id, 0)
            item.setText(f"{n:,}" if n else "–")
            item.setToolTip("" if n else f"No labels yet for {info.name} in this image")
            item.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)

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
        for info in self._classes:
            if info.id != source:
                self._merge.addAction(info.name, partial(self.merge_asked.emit, source, info.id))

    def _edit(self, class_id: int, **values: Any) -> None:
        row = self._row(class_id)
        if row < 0:
            raise InputError(f"There is no class {class_id} in the table; add it first.")
        self._classes[row] = replace(self._classes[row], **values)
        with signals_blocked(self._table):
            for row, info in enumerate(self._classes):  # another may have become the background
                self._fill(row, info)
        self.changed.emit()

    def _checked_name(self, name: str, class_id: int) -> str:
        name = " ".join(name.split())
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise InputError(f"A class needs a name of 1 to {_MAX_NAME} characters; type another.")
        if any(i.name.casefold() == name.casefold() and i.id != class_id for i in self._classes):
            raise InputError(f"Another class is called '{name}' already; type another name.")
        return name

    def _unique(self, name: str) -> str:
        taken = {info.name.casefold() for info in self._classes}
        endings = ("", *(f" ({n})" for n in range(2, MAX_CLASSES + 2)))
        return next(name + end for end in endings if (name + end).casefold() not in taken)

    def _on_add(self) -> None:
        try:
            self.add()
        except InputError as error:
            self.refused.emit(str(error))
        else:
            self._on_rename()

    def _on_rename(self) -> None:
        row = self._table.currentRow()
        if row >= 0:
            self._table.editItem(self._table.item(row, _NAME))

    def _on_remove(self) -> None:
        if self.current and len(self._classes) > 1:
            self.removal_asked.emit(self.current)

    def _on_item_changed(self, item: QTableWidgetItem) -> None:
        if item.column() != _NAME:
            return
        info = self._classes[item.row()]
        try:
            self.rename(info.id, item.text())
        except InputError as error:
            with signals_blocked(self._table):
                item.setText(info.name)
            self.refused.emit(str(error))

    def _on_selection(self) -> None:
        if self.current:
            self.selected.emit(self.current)

    def _on_cell_clicked(self, row: int, column: int) -> None:
        if column != _COLOUR:
            return
        info = self._classes[row]
        colour = QColorDialog.getColor(QColor(info.colour), self, f"Colour of {info.name}")
        if colour.isValid():
            self.recolour(info.id, colour.name())
