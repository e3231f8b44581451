"""The section of the project: its images, and the offer to recover what a crash left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import (
    QFrame,
    QGridLayout,
    QHBoxLayout,
    QListWidget,
    QListWidgetItem,
    QPushButton,
    QShortcut,
    QVBoxLayout,
    QWidget,
)
from superqt.utils import signals_blocked

from napari_convlora.errors import ConvLoRAError
from napari_convlora.project import ImageEntry, LockedError, recovery
from napari_convlora.widget import dialogs
from napari_convlora.widget.autosave.project_keeper import ProjectKeeper
from napari_convlora.widget.form import words

_STEM = Qt.ItemDataRole.UserRole
_ROWS = 7


def _trying(section: ProjectSection | RecoveryOffer, action: Callable[[], Any]) -> Callable:
    """Return a slot that does `action` and has the section say what goes wrong."""

    def attempt(*_: Any) -> None:
        try:
            action()
        except ConvLoRAError as error:
            section.failed.emit(str(error))

    return attempt


def _open(
    section: ProjectSection | RecoveryOffer, keeper: ProjectKeeper, folder: Path, *, named: bool
) -> None:
    """Open a project; one that is open elsewhere only if the user wants to all the same."""
    try:
        keeper.open(folder, named=named)
    except LockedError as locked:
        if dialogs.may_open_anyway(section, str(locked)):
            keeper.open(folder, named=named, anyway=True)


class ProjectSection(QWidget):
    """List of a project's images, and what can be done with them.

    Signals
    -------
    failed
        What went wrong, in one sentence.
    """

    failed = Signal(str)

    def __init__(self, keeper: ProjectKeeper, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._keeper = keeper
        self._rows: list[tuple[str, str]] = []  # as they are shown
        self.where = words()
        self.images = QListWidget()
        self.images.setMaximumHeight(_ROWS * (self.images.fontMetrics().lineSpacing() + 6))
        # A long name loses its middle, so that the counts at the end are seen.
        self.images.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.images.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.images.itemActivated.connect(lambda item: self._show(item))
        self.images.itemClicked.connect(lambda item: self._show(item))
        grid = QGridLayout()
        grid.setContentsMargins(0, 0, 0, 0)
        buttons: list[tuple[str, str, Callable[[], None]]] = [
            ("Save as…", "Give it a folder; it saves itself from then on.", self._create),
            ("Open…", "Open the folder of a project.", self._open),
            ("Add images…", "Put image files on the list.", self._add),
            ("Remove…", "Take the selected image and its strokes off the list.", self._remove),
            ("Previous", "The image before (Ctrl+PgUp).", partial(keeper.step, -1)),
            ("Next", "The next image (Ctrl+PgDown).", partial(keeper.step, 1)),
            ("Locate…", "Show where the selected image is now.", self._locate),
        ]
        for i, (title, tip, action) in enumerate(buttons):
            button = QPushButton(title)
            button.setToolTip(tip)
            button.clicked.connect(_trying(self, action))
            grid.addWidget(button, i // 2, i % 2)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(self.where)
        column.addWidget(self.images)
        column.addLayout(grid)
        keeper.changed.connect(self.refresh)
        self.refresh()

    def step_by_keys(self, panel: QWidget) -> None:
        """Let Ctrl+PgUp and Ctrl+PgDown step through the images while `panel` is shown."""
        for key, by in (("Ctrl+PgUp", -1), ("Ctrl+PgDown", 1)):
            step = _trying(self, partial(self._keeper.step, by))
            QShortcut(QKeySequence(key), panel).activated.connect(step)

    def following(self) -> str:
        """Name of the image after the current one on the list; "" if there is none."""
        entry = self._keeper.neighbour(1)
        return "" if entry is None or entry.stem == self._keeper.current else entry.name

    def refresh(self) -> None:
        """Show the project as it is."""
        keeper = self._keeper
        folder = None if keeper.project is None else keeper.project.folder
        if keeper.named:
            self.where.setText(f"{folder}; saves itself.")
        else:
            self.where.setText("No project yet; your strokes are kept aside. Save as… makes one.")
        with signals_blocked(self.images):
            removed = keeper.removed
            rows = [(e.stem, self._text(e, e.stem in removed)) for e in keeper.entries]
            if rows != self._rows:
                self._rows = rows
                self.images.clear()
                for stem, text in rows:
                    item = QListWidgetItem(text)
                    item.setData(_STEM, stem)
                    item.setToolTip(text)
                    self.images.addItem(item)
            for i in self._range():
                if self.images.item(i).data(_STEM) == keeper.current:
                    self.images.setCurrentRow(i)

    def _range(self) -> range:
        return range(self.images.count())

    def _text(self, entry: ImageEntry, removed: bool) -> str:
        names = {info.id: info.name for info in self._keeper.classes}
        project = self._keeper.project
        assert project is not None
        marks = ("✎" if entry.annotated else "·") + ("●" if project.predicted(entry.stem) else "")
        counts = [f"{names.get(i, i)} {n:,}" for i, n in entry.counts.items()]
        if entry.regions:
            counts.append(f"{entry.regions} reviewed")
        if removed:
            counts.append("not in the viewer, not learnt from")
        return f"{marks} {entry.name}" + (f"  ({', '.join(counts)})" if counts else "")

    def _show(self, item: QListWidgetItem) -> None:
        _trying(self, lambda: self._keeper.show_image(item.data(_STEM)))()

    def _create(self) -> None:
        dialogs.with_new_folder(self, lambda p: self._keeper.create(Path(p)))

    def _open(self) -> None:
        dialogs.with_folder(self, lambda p: _open(self, self._keeper, Path(p), named=True))

    def _add(self) -> None:
        dialogs.with_images(self, lambda paths: self._keeper.add_files([*map(Path, paths)]))

    def _locate(self) -> None:
        item = self.images.currentItem()
        if item is not None:
            entry = self._keeper.need_project().entry(item.data(_STEM))
            dialogs.with_image(
                self,
                lambda p: self._keeper.locate(entry.stem, Path(p)),
                maybe_folder=not entry.fingerprint,
            )

    def _remove(self) -> None:
        item = self.images.currentItem()
        if item is not None:
            entry = self._keeper.need_project().entry(item.data(_STEM))
            if dialogs.may_remove_image(self, entry.name, sum(entry.counts.values())):
                self._keeper.remove(entry.stem)


class RecoveryOffer(QFrame):
    """One sentence on unsaved work of an earlier session, and two buttons; hidden if none.

    Signals
    -------
    failed
        What went wrong, in one sentence.
    """

    failed = Signal(str)

    def __init__(self, keeper: ProjectKeeper, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._keeper = keeper
        self.sentence = words()
        self.recover_button, self.discard_button = QPushButton("Recover"), QPushButton("Discard")
        self.recover_button.clicked.connect(_trying(self, self._recover))
        self.discard_button.clicked.connect(self._discard)
        buttons = QHBoxLayout()
        for button in (self.recover_button, self.discard_button):
            buttons.addWidget(button)
        column = QVBoxLayout(self)
        column.addWidget(self.sentence)
        column.addLayout(buttons)
        self._left = recovery.leftovers()
        self._show()

    def _show(self) -> None:
        if not self._left:
            self.hide()
        else:
            self.sentence.setText(self._left[0].sentence)

    def _recover(self) -> None:
        folder = self._left[0].folder
        _open(self, self._keeper, folder, named=False)
        if self._keeper.project is not None and self._keeper.project.folder == folder:
            self._left = []  # the others are offered at the next start
            self._show()

    def _discard(self) -> None:
        recovery.discard(self._left.pop(0).folder)
        self._show()
