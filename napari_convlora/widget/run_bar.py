"""Adapt or Stop, Pause or Resume, and how far the run has come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import (
    QHBoxLayout,
    QProgressBar,
    QPushButton,
    QShortcut,
    QVBoxLayout,
    QWidget,
)

from napari_convlora.events import Planned, Step, duration_text
from napari_convlora.widget.form import words
from napari_convlora.widget.status_line import StatusLine

ADAPT_KEY, STOP_KEY = "Ctrl+Return", "Ctrl+."
_ADAPT = "Learn from everything painted so far, then predict the image (Ctrl+Enter)."
_STOP = f"End this and keep what was learnt ({STOP_KEY})."


class RunBar(QWidget):
    """One button that starts and stops, one that pauses and resumes, a bar and its words.

    Attributes
    ----------
    status
        What has happened and what to do next.

    Signals
    -------
    adapt_pressed, stop_pressed
        The main button, in either meaning.
    pause_pressed
        True to pause, False to resume.
    """

    adapt_pressed = Signal()
    stop_pressed = Signal()
    pause_pressed = Signal(bool)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._running = self._paused = False
        self._first: Step | None = None
        self._max_seconds: float | None = None
        self._planned: Planned | None = None
        self._end = 0.0
        self.main_button = QPushButton("Adapt")
        self.pause_button = QPushButton("Pause")
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.words = words(" ")
        self.words.hide()  # until something has run
        self.status = StatusLine()
        font = self.main_button.font()
        font.setBold(True)
        self.main_button.setFont(font)
        self.main_button.setMinimumHeight(34)
        self.pause_button.setMinimumHeight(34)
        self.pause_button.setToolTip("Let the round wait after its present step, or go on.")
        for key, stops in ((ADAPT_KEY, False), ("Ctrl+Enter", False), (STOP_KEY, True)):
            shortcut = QShortcut(QKeySequence(key), self)
            shortcut.activated.connect(partial(self._on_key, stops))
        buttons = QHBoxLayout()
        buttons.addWidget(self.main_button, 3)
        buttons.addWidget(self.pause_button, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(buttons)
        layout.addWidget(self.status)
        layout.addWidget(self.bar)
        layout.addWidget(self.words)
        self.main_button.clicked.connect(self._on_main)
        self.pause_button.clicked.connect(self._on_pause)
        self.show_state("idle", paused=False, can_adapt=False)

    def show_state(self, phase: str, *, paused: bool, can_adapt: bool) -> None:
        """Make buttons and bar say what `phase` allows."""
        self._running, self._paused = phase != "idle", paused
        self.main_button.setText("Stop" if self._running else "Adapt")
        self.main_button.setToolTip(_STOP if self._running else _ADAPT)
        self.bar.setVisible(self._running)
        if self._running:
            self.words.show()
            policy = self.bar.sizePolicy()
            policy.setRetainSizeWhenHidden(True)  # from now on, what is below stays where it is
            self.bar.setSizePolicy(policy)
        self.main_button.setEnabled(self._running or can_adapt)
        self.pause_button.setText("Resume" if paused else "Pause")
        self.pause_button.setEnabled(phase in ("starting", "training"))
        if phase == "starting":
            self.bar.setRange(0, 0)
            self.words.setText(" ")
        elif phase == "idle":
            self.words.setText(" ")

    def restart(self, total_steps: int, max_minutes: float | None = None) -> None:
        """Begin the count of a round."""
        self._first = self._planned = None
        self._end = 0.0
        self._max_seconds = None if max_minutes is None else 60 * max_minutes
        self.bar.setRange(0, 0)  # the detail branch is fitted before the first step
        self.words.setText(f"step 0 of {total_steps}")

    def show_plan(self, planned: Planned) -> None:
        """Take up what the round takes, as later steps take longer than the first."""
        self._planned = planned

    def show_steps(self, steps: Sequence[Step]) -> None:
        """Show the last step, the seconds each takes and the time left."""
        last = steps[-1]
        self._first = self._first or steps[0]
        self.bar.setRange(0, last.total_steps)
        self.bar.setValue(last.step)
        text = f"step {last.step} of {last.total_steps}"
        if self._planned is not None:
            self._end = last.seconds + self._planned.seconds_left
            self._planned = None
        done = last.step - self._first.step
        if done > 0:
            pace = (last.seconds - self._first.seconds) / done
            left = max(pace * (last.total_steps - last.step), self._end - last.seconds)
            if self._max_seconds is not None:
                left = min(left, max(0.0, self._max_seconds - last.seconds))
            text += f" · {pace:.2f} s per step · {duration_text(left)} left"
        self.words.setText(text)

    def show_tiles(self, tiles: Any) -> None:
        """Show how much of the image is predicted."""
        self.bar.setRange(0, tiles.total)
        self.bar.setValue(tiles.done)
        self.words.setText(f"predicting: tile {tiles.done} of {tiles.total}")

    def _on_key(self, stops: bool) -> None:
        if self._running == stops and self.main_button.isEnabled():
            self._on_main()

    def _on_main(self) -> None:
        (self.stop_pressed if self._running else self.adapt_pressed).emit()

    def _on_pause(self) -> None:
        self.pause_pressed.emit(not self._paused)
