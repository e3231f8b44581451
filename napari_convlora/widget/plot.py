"""A live plot of loss and score, drawn with the colours of the palette."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QFontMetrics, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

_GAP = 6.0


class TrainingPlot(QWidget):
    """Loss (faint: every step, full: smoothed) and score of one round against its steps."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.held_out = False
        self._total = 1
        self._accent: QColor | None = None
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setToolTip("Loss falls and score rises while the model learns.")

    @property
    def score_label(self) -> str:
        """What the score was measured on."""
        return "held-out" if self.held_out else "on training labels"

    def set_accent(self, colour: str) -> None:
        """Draw the score in `colour`; the palette's highlight serves until then."""
        self._accent = QColor(colour)
        self.update()

    def restart(self, total_steps: int, held_out: bool) -> None:
        """Begin an empty plot of a round of at most `total_steps`."""
        self.losses, self.scores = [], []
        self._total, self.held_out = max(1, total_steps), held_out
        self.update()

    def add(
        self,
        losses: Sequence[tuple[int, float]] = (),
        scores: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Append (step, value) pairs."""
        self.losses.extend(losses)
        self.scores.extend(scores)
        self.update()

    def sizeHint(self) -> QSize:
        """Return a wide, low size."""
        return QSize(260, 8 * QFontMetrics(self.font()).height())

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Draw legend, frame and curves."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().windowText().color()
        accent = self._accent or self.palette().highlight().color()
        if text.lightness() < 128:  # on a light ground
            accent = accent.darker(170)
        line = QFontMetrics(self.font()).height()
        frame = QRectF(self.rect()).adjusted(3, line + _GAP, -3, -line - 2)
        faint = QColor(text)
        faint.setAlphaF(0.35)
        painter.setPen(QPen(faint, 1))
        for share in (0.0, 0.5, 1.0) if self.losses else (0.0, 1.0):
            y = frame.bottom() - share * frame.height()
            painter.drawLine(QPointF(frame.left(), y), QPointF(frame.right(), y))
        self._legend(painter, text, accent)
        painter.setPen(faint)
        bottom = QRectF(frame.left(), frame.bottom() + 2, frame.width(), line)
        if not self.losses:
            painter.setPen(text)
            painter.drawText(frame, Qt.AlignmentFlag.AlignCenter, "no step yet")
            return
        painter.setPen(text)
        painter.drawText(bottom, Qt.AlignmentFlag.AlignLeft, "0")
        painter.drawText(bottom, Qt.AlignmentFlag.AlignRight, f"step {self._total}")
        top = max(value for _, value in self.losses) or 1.0
        scaled = [(step, value / top) for step, value in self.losses]
        self._curve(painter, frame, scaled, QPen(faint, 1))
        self._curve(painter, frame, _smoothed(scaled), QPen(text, 1.6))
        self._curve(painter, frame, self.scores, QPen(accent, 2.2))
        painter.setBrush(accent)
        for point in self._points(frame, self.scores):
            painter.drawEllipse(point, 2.5, 2.5)

    def _legend(self, painter: QPainter, text: QColor, accent: QColor) -> None:
        metrics = QFontMetrics(self.font())
        loss = f"loss {_smoothed(self.losses)[-1][1]:.2f}" if self.losses else "loss"
        score = f"score {self.scores[-1][1]:.2f}, {self.score_label}" if self.scores else "score"
        x, middle = 0.0, metrics.height() / 2
        for words, colour, width in ((loss, text, 1.6), (score, accent, 2.2)):
            painter.setPen(QPen(colour, width))
            painter.drawLine(QPointF(x, middle), QPointF(x + 14, middle))
            painter.setPen(text)
            painter.drawText(QPointF(x + 18, metrics.ascent() + 0.0), words)
            x += 18 + metrics.horizontalAdvance(words) + 14

    def _points(self, frame: QRectF, values: Sequence[tuple[int, float]]) -> list[QPointF]:
        return [
            QPointF(
                frame.left() + frame.width() * step / self._total,
                frame.bottom() - frame.height() * min(1.0, max(0.0, value)),
            )
            for step, value in values
        ]

    def _curve(
        self, painter: QPainter, frame: QRectF, values: Sequence[tuple[int, float]], pen: QPen
    ) -> None:
        painter.setPen(pen)
        painter.drawPolyline(QPolygonF(self._points(frame, values)))


def _smoothed(values: Sequence[tuple[int, float]], keep: float = 0.8) -> list[tuple[int, float]]:
    """Exponential mean that starts at the first value."""
    result: list[tuple[int, float]] = []
    for step, value in values:
        mean = keep * result[-1][1] + (1 - keep) * value if result else value
        result.append((step, mean))
    return result
