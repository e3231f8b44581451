"""The classes behind the table: which there are, were, and may be called what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from napari_convlora.config import MAX_CLASSES, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.classes import default_classes

_MAX_NAME = 200


class ClassList:
    """Classes by id; those that were removed are remembered.

    Attributes
    ----------
    rows
        The classes there are, by id.
    """

    def __init__(self) -> None:
        self.rows: list[ClassInfo] = []
        self._removed: dict[int, ClassInfo] = {}

    def row(self, class_id: int) -> int:
        """Return the row of a class; -1 if there is none."""
        return next((r for r, info in enumerate(self.rows) if info.id == class_id), -1)

    def replace(self, classes: Iterable[ClassInfo]) -> None:
        """Have these classes and no others."""
        self.rows = sorted(classes, key=lambda info: info.id)

    def take_over(self, classes: Sequence[ClassInfo]) -> list[ClassInfo]:
        """Have these classes; returns the others, which count as removed."""
        taken = {info.id for info in classes}
        others = [info for info in self.rows if info.id not in taken]
        self._removed |= {info.id: info for info in others}
        self.replace(classes)
        return others

    def edit(self, class_id: int, **values: Any) -> None:
        """Replace fields of a class.

        Raises
        ------
        InputError
            There is no such class.
        """
        row = self.row(class_id)
        if row < 0:
            raise InputError(f"There is no class {class_id} in the table; add it first.")
        self.rows[row] = replace(self.rows[row], **values)

    def add(self, name: str = "", colour: str = "") -> int:
        """Add a class and return its id, the next free one.

        Raises
        ------
        InputError
            The table is full, or another class has the name.
        """
        taken = {info.id for info in self.rows}
        last = max(taken | set(self._removed), default=0)
        free = [last + 1, *range(1, MAX_CLASSES + 1)]  # an erased class's id is used again last
        new = next((i for i in free if i not in taken and i <= MAX_CLASSES), None)
        if new is None:
            raise InputError(f"The table is full with {MAX_CLASSES} classes; remove one first.")
        (info,) = default_classes([new])
        name = self.checked_name(name, new) if name else self._unique(info.name)
        self._removed.pop(new, None)
        self.replace([*self.rows, replace(info, name=name, colour=colour or info.colour)])
        return new

    def remove(self, class_id: int) -> None:
        """Remove a class; it comes back under its name if it is missing again."""
        info = self.rows[self.row(class_id)]
        self._removed[class_id] = info
        self.replace([other for other in self.rows if other is not info])

    def ensure(self, classes: Iterable[ClassInfo]) -> list[int]:
        """Add those whose id is missing, an unnamed one as it was removed; returns their ids."""
        taken = {info.id for info in self.rows}
        missing = [info for info in classes if info.id not in taken]
        for info in missing:  # one by one, as two of them may share a name
            removed = self._removed.pop(info.id, info)
            new = removed if (info,) == default_classes([info.id]) else info
            self.replace([*self.rows, replace(new, name=self._unique(new.name))])
        return [info.id for info in missing]

    def checked_name(self, name: str, class_id: int) -> str:
        """Return the name that a class is to have, its white space tidied.

        Raises
        ------
        InputError
            It is empty, too long or taken.
        """
        name = " ".join(name.split())
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise InputError(f"A class needs a name of 1 to {_MAX_NAME} characters; type another.")
        if any(i.name.casefold() == name.casefold() and i.id != class_id for i in self.rows):
            raise InputError(f"Another class is called '{name}' already; type another name.")
        return name

    def _unique(self, name: str) -> str:
        taken = {info.name.casefold() for info in self.rows}
        endings = ("", *(f" ({n})" for n in range(2, MAX_CLASSES + 2)))
        return next(name + end for end in endings if (name + end).casefold() not in taken)
