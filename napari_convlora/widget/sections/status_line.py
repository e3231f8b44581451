"""The sentence that says what has happened and what to do next."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QLabel, QWidget

_LINES = 3


class StatusLine(QLabel):
    """One sentence, in bold if something went wrong, and what was added to it.

    Attributes
    ----------
    wrong
        Whether it says what went wrong.
    hinting
        Whether it says what to do next, whatever was added.
    added
        What was added.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.wrong = self.hinting = False
        self.added: tuple[str, ...] = ()
        self._sentence = ""
        self.setWordWrap(True)
        self.setAlignment(Qt.AlignmentFlag.AlignTop)
        # Room for most sentences, so that what is below stays where it is.
        self.setMinimumHeight(_LINES * self.fontMetrics().lineSpacing() + 6)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    @property
    def sentence(self) -> str:
        """All that it says."""
        return " ".join((self._sentence, *self.added)).strip()

    def say(self, sentence: str, *, wrong: bool = False, hint: bool = False) -> None:
        """Show `sentence`; nothing if it is empty. What went wrong stays so when it is repeated."""
        if sentence and (wrong or sentence != self.sentence):
            self._sentence, self.added = sentence, ()
            self.hinting = hint
            self._show(wrong)

    def add(self, sentence: str) -> None:
        """Add a sentence, unless it was said already."""
        if sentence not in (self._sentence, *self.added):
            self.added = (*self.added, sentence)
            self._show(wrong=False)

    def _show(self, wrong: bool) -> None:
        self.wrong = wrong
        font = self.font()
        font.setBold(wrong)
        self.setFont(font)
        self.setText(self.sentence)
