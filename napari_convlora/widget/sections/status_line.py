"""The sentence that says what has happened and what to do next."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QLabel, QWidget

_LINES = 3


class StatusLine(QLabel):
    """One sentence, in bold if something went wrong.

    Attributes
    ----------
    sentence
        What it says.
    wrong
        Whether that is what went wrong.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.sentence, self.wrong = "", False
        self.setWordWrap(True)
        self.setAlignment(Qt.AlignmentFlag.AlignTop)
        # Room for most sentences, so that what is below stays where it is.
        self.setMinimumHeight(_LINES * self.fontMetrics().lineSpacing() + 6)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    def say(self, sentence: str, *, wrong: bool = False) -> None:
        """Show `sentence`; nothing if it is empty. What went wrong stays so when it is repeated."""
        if sentence and (wrong or sentence != self.sentence):
            self.sentence, self.wrong = sentence, wrong
            font = self.font()
            font.setBold(wrong)
            self.setFont(font)
            self.setText(sentence)
