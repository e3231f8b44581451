"""What sections are made of: rows of widgets, words, what unfolds them, and who gets the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtCore import QLocale, Qt
from qtpy.QtGui import QValidator
from qtpy.QtWidgets import (
    QAbstractButton,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QLabel,
    QListWidget,
    QPushButton,
    QTableView,
    QWidget,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from magicgui.widgets.bases import ValueWidget


def words(text: str = "") -> QLabel:
    """Return a label whose text takes as many lines as it needs."""
    label = QLabel(text)
    label.setWordWrap(True)
    return label


class Form(QWidget):
    """Rows of a label and a widget; the labels share one column, whichever rows are shown.

    Parameters
    ----------
    widgets
        By whose `label` the rows are called.
    """

    def __init__(self, widgets: Sequence[ValueWidget], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._form = QFormLayout(self)
        self._form.setContentsMargins(0, 0, 0, 0)
        self._form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for widget in widgets:
            self._form.addRow(widget.label, widget.native)
            self._form.labelForField(widget.native).setToolTip(widget.tooltip)

    def show_row(self, widget: ValueWidget, shown: bool) -> None:
        """Show or hide a row, its label included."""
        self._form.setRowVisible(widget.native, shown)


class Unfolding(QPushButton):
    """Button that shows and hides `content`, which begins hidden."""

    def __init__(self, title: str, content: QWidget, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title, self._content = title, content
        self.clicked.connect(lambda: self.unfold(self._content.isHidden()))
        self.unfold(False)

    def unfold(self, shown: bool) -> None:
        """Show or hide the content."""
        self._content.setVisible(shown)
        self.set_title(self._title)

    def set_title(self, title: str) -> None:
        """Say something else on the button."""
        self._title = title
        self.setText(f"{title} {'▸' if self._content.isHidden() else '▾'}")


class _EitherPoint(QValidator):
    """Takes a comma for the point of a number box, whichever it is given."""

    def __init__(self, box: QDoubleSpinBox) -> None:
        super().__init__(box)
        self._box = box

    def validate(self, text: str | None, position: int) -> tuple[QValidator.State, str, int]:
        """Replace commas in `text`, and ask the box about the rest."""
        return self._box.validate((text or "").replace(",", "."), position)


def read_points_and_commas(panel: QWidget) -> None:
    """Let every field of `panel` read 2.5 and 2,5 alike, whatever the computer's language is.

    A box drops what it does not expect, or takes it for a mark of thousands: one of the two is 25.
    """
    plain = QLocale(QLocale.Language.C)
    plain.setNumberOptions(
        QLocale.NumberOption.OmitGroupSeparator | QLocale.NumberOption.RejectGroupSeparator
    )
    for box in panel.findChildren(QDoubleSpinBox):
        box.setLocale(plain)
        box.lineEdit().setValidator(_EitherPoint(box))


def leave_keys_to_canvas(panel: QWidget) -> None:
    """Let nothing in `panel` keep the keys after a click; it can still be reached with Tab.

    Or Space would press a button again instead of moving the view, and N or 2 would choose an
    entry of a combo instead of the next place or a class.
    """
    for kind in (QAbstractButton, QComboBox, QTableView, QListWidget):
        for part in panel.findChildren(kind):
            if part.focusPolicy() != Qt.FocusPolicy.NoFocus:
                part.setFocusPolicy(Qt.FocusPolicy.TabFocus)
