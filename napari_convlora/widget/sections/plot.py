"""Small plots, drawn with the colours of the palette."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QFontMetrics, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

_GAP = 6.0
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with what the legend says of them, and how they are drawn."""

    label: str
    points: Points
    width: float = 1.6
    accented: bool = False
    dotted: bool = False
    faint: Points = ()
    """The same, less smooth."""


class Plot(QWidget):
    """Curves in a frame whose height is from 0 to 1."""

    EMPTY: ClassVar[str]
    """What to say where nothing is plotted."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._accent: QColor | None = None
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def curves(self) -> list[Curve]:
        """Return what to draw."""
        raise NotImplementedError

    def ends(self) -> tuple[float, float, str, str]:
        """Return x at the left and the right edge, and what is written there."""
        raise NotImplementedError

    def set_accent(self, colour: str) -> None:
        """Draw what matters most in `colour`; the palette's highlight serves until then."""
        self._accent = QColor(colour)
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
        curves = self.curves()
        some = any(curve.points for curve in curves)
        painter.setPen(QPen(faint, 1))
        for share in (0.0, 0.5, 1.0) if some else (0.0, 1.0):
            y = frame.bottom() - share * frame.height()
            painter.drawLine(QPointF(frame.left(), y), QPointF(frame.right(), y))
        self._legend(painter, curves, text, accent)
        painter.setPen(text)
        if not some:
            painter.drawText(frame, Qt.AlignmentFlag.AlignCenter, self.EMPTY)
            return
        first, last, left, right = self.ends()
        bottom = QRectF(frame.left(), frame.bottom() + 2, frame.width(), line)
        painter.drawText(bottom, Qt.AlignmentFlag.AlignLeft, left)
        painter.drawText(bottom, Qt.AlignmentFlag.AlignRight, right)

        def place(points: Points) -> QPolygonF:
            return QPolygonF(
                [
                    QPointF(
                        frame.left() + frame.width() * (x - first) / max(1e-9, last - first),
                        frame.bottom() - frame.height() * min(1.0, max(0.0, y)),
                    )
                    for x, y in points
                ]
            )

        for curve in curves:
            colour = accent if curve.accented else text
            painter.setPen(QPen(faint, 1))
            painter.drawPolyline(place(curve.faint))
            painter.setPen(QPen(colour, curve.width))
            painter.drawPolyline(place(curve.points))
            painter.setBrush(colour)
            for point in place(curve.points) if curve.dotted else ():
                painter.drawEllipse(point, 2.5, 2.5)

    def _legend(
        self, painter: QPainter, curves: Sequence[Curve], text: QColor, accent: QColor
    ) -> None:
        metrics = QFontMetrics(self.font())
        x, middle = 0.0, metrics.height() / 2
        for curve in curves:
            painter.setPen(QPen(accent if curve.accented else text, curve.width))
            painter.drawLine(QPointF(x, middle), QPointF(x + 14, middle))
            painter.setPen(text)
            painter.drawText(QPointF(x + 18, metrics.ascent() + 0.0), curve.label)
            x += 18 + metrics.horizontalAdvance(curve.label) + 14


class TrainingPlot(Plot):
    """Loss (faint: every step, full: smoothed) and score of one round against its steps."""

    EMPTY = "no step yet"

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.held_out = False
        self._total = 1
        self.setToolTip("Loss falls and score rises while the model learns.")

    @property
    def score_label(self) -> str:
        """What the score was measured on."""
        return "held-out" if self.held_out else "on training labels"

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

    def curves(self) -> list[Curve]:
        """Return loss, as a part of the greatest one, and score."""
        loss = f"loss {_smoothed(self.losses)[-1][1]:.2f}" if self.losses else "loss"
        score = f"score {self.scores[-1][1]:.2f}, {self.score_label}" if self.scores else "score"
        top = max((value for _, value in self.losses), default=0) or 1.0
        scaled = [(step, value / top) for step, value in self.losses]
        return [
            Curve(loss, _smoothed(scaled), faint=scaled),
            Curve(score, self.scores, 2.2, accented=True, dotted=True),
        ]

    def ends(self) -> tuple[float, float, str, str]:
        """Return the steps of the round."""
        return 0, self._total, "0", f"step {self._total}"


class RoundsPlot(Plot):
    """Score of each round, and how its prediction agrees with what was painted later."""

    EMPTY = "no round yet"

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.scores: Points = ()
        self.later: Points = ()
        self.setToolTip(
            "Mean IoU of each round, 0 to 1: on held-out or training labels, and on what you "
            "painted later. You paint where it is wrong, so the second line is the lower one."
        )

    def show_rounds(self, scores: Points, later: Points) -> None:
        """Show (number, mean IoU) pairs, oldest first."""
        self.scores, self.later = scores, later
        self.update()

    def curves(self) -> list[Curve]:
        """Return scores and later corrections."""
        return [
            Curve("score", self.scores, dotted=True),
            Curve("on later corrections", self.later, 2.2, accented=True, dotted=True),
        ]

    def ends(self) -> tuple[float, float, str, str]:
        """Return the first and the last round."""
        numbers = [int(x) for x, _ in (*self.scores, *self.later)]
        first, last = min(numbers), max(numbers)
        return first, last, f"round {first}", f"round {last}"


def _smoothed(values: Points, keep: float = 0.8) -> list[tuple[float, float]]:
    """Exponential mean that starts at the first value."""
    result: list[tuple[float, float]] = []
    for step, value in values:
        mean = keep * result[-1][1] + (1 - keep) * value if result else value
        result.append((step, mean))
    return result
