"""Changes of the class table, and what they do to what is painted."""

from __future__ import annotations

from pathlib import Path

from napari_convlora.config import ClassInfo
from napari_convlora.labels.classes import read_classes, write_classes
from napari_convlora.widget.layers import copies
from napari_convlora.widget.wiring.parts import PanelParts


class ClassEdits:
    """The class table, and the images and projects that use its classes.

    Attributes
    ----------
    untouched
        Whether the table is still the one of the start.
    """

    def __init__(self, parts: PanelParts) -> None:
        self._parts = parts
        self.untouched = True
        parts.images.relied = self.relied

    def used(self) -> set[int]:
        """Return the ids that are painted anywhere."""
        parts = self._parts
        return copies.used_classes(parts.images.records).union(
            *(e.counts for e in parts.keeper.stored)
        )

    def relied(self) -> tuple[ClassInfo, ...]:
        """Return the classes that somebody relies on: of the table at the start, those in use."""
        classes = self._parts.table.classes
        if self._parts.workflow.has_adapter or not self.untouched:
            return classes
        used = self.used()
        return tuple(info for info in classes if info.id in used)

    def take_up(self, classes: tuple[ClassInfo, ...]) -> None:
        """Take up classes that come with a layer or an adapter."""
        if self.untouched and classes:
            self._parts.table.set_classes(())
        self._parts.table.ensure(classes)

    def remove(self, class_id: int) -> None:
        """Remove a class and what is painted with it."""
        self._parts.attempt(lambda: self._parts.images.erase_class(class_id))
        self._parts.table.remove(class_id)

    def merge(self, class_id: int, into: int) -> None:
        """Merge a class into another."""
        self._parts.attempt(lambda: self._parts.images.merge_class(class_id, into))
        self._parts.table.select(into)
        self._parts.table.remove(class_id)

    def load(self, path: Path) -> None:
        """Take over a class table; classes that it lacks are kept if an image uses them."""
        table = self._parts.table
        self._parts.attempt(lambda: table.replace_with(read_classes(path), self.used()))

    def save(self, path: Path) -> None:
        """Write the class table."""
        self._parts.attempt(lambda: write_classes(path, self._parts.table.classes))
