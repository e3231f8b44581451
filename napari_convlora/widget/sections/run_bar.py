"""Adapt or Stop, Pause or Resume, and how far the run has come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from qtpy.QtCore import QTimer, Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import QHBoxLayout, QProgressBar, QPushButton, QShortcut, QVBoxLayout, QWidget

from napari_convlora.events import Step, duration_text
from napari_convlora.widget.form import words
from napari_convlora.widget.sections.status_line import StatusLine

ADAPT_KEY, STOP_KEY = "Ctrl+Return", "Ctrl+."
_RECENT = 50
"""Steps whose mean is shown as the seconds of one."""

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
        self._recent = deque[Step](maxlen=_RECENT)
        self._said = 0.0
        self._since = 0.0
        self._clock = QTimer(self)
        self._clock.setInterval(1000)
        self._clock.timeout.connect(self._show_wait)
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
            self._wait()
        elif phase == "idle":
            self._clock.stop()
            self.words.setText(" ")

    def restart(self) -> None:
        """Begin the count of a round."""
        self._recent.clear()
        self._wait()  # the detail branch is fitted before the first step

    def show_steps(self, steps: Sequence[Step]) -> None:
        """Show the last step, and every second what each takes and the time left."""
        last = steps[-1]
        self._clock.stop()
        self.bar.setRange(0, last.total_steps)
        self.bar.setValue(last.step)
        new = not self._recent
        self._recent.extend(steps)
        if not new and last.seconds - self._said < 1 and last.step < last.total_steps:
            return
        self._said = last.seconds
        text = f"step {last.step} of {last.total_steps}"
        first = self._recent[0]
        if last.step > first.step:
            pace = (last.seconds - first.seconds) / (last.step - first.step)
            text += f" · {pace:.2f} s per step"
        if last.seconds_left is not None:
            text += f" · about {duration_text(last.seconds_left)} left"
        self.words.setText(text)

    def show_tiles(self, tiles: Any) -> None:
        """Show how much of the image is predicted."""
        self._clock.stop()
        self.bar.setRange(0, tiles.total)
        self.bar.setValue(tiles.done)
        self.words.setText(f"predicting: tile {tiles.done} of {tiles.total}")

    def _wait(self) -> None:
        """Show the seconds until something can be counted.

        Qt's own bar without an end is drawn so often that it takes a part of a core from training.
        """
        if self._clock.isActive():
            return
        self._since = time.monotonic()
        self.bar.setRange(0, 1)
        self.bar.setValue(0)
        self._show_wait()
        self._clock.start()

    def _show_wait(self) -> None:
        self.words.setText(f"preparing · {duration_text(time.monotonic() - self._since)}")

    def _on_key(self, stops: bool) -> None:
        if self._running == stops and self.main_button.isEnabled():
            self._on_main()

    def _on_main(self) -> None:
        (self.stop_pressed if self._running else self.adapt_pressed).emit()

    def _on_pause(self) -> None:
        self.pause_pressed.emit(not self._paused)
