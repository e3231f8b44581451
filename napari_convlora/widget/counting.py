"""Counts painted pixels without holding up the window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal

from napari_convlora.config import MAX_CLASSES, ConvLoRAError

_DELAY_MS = 150
_SLICE_SECONDS = 0.01


class PixelCounter(QObject):
    """Counts again soon after `touch`, a hundredth of a second at a time.

    Parameters
    ----------
    pieces
        Starts a count: yields pixels per id so far, (256,) or longer.
    """

    counted = Signal(dict)

    def __init__(
        self, pieces: Callable[[], Iterator[np.ndarray]], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._start = pieces
        self._pieces: Iterator[np.ndarray] = iter(())
        self._total = np.zeros(0, np.int64)
        self._soon, self._next = QTimer(self), QTimer(self)
        self._soon.setInterval(_DELAY_MS)
        self._soon.timeout.connect(self._begin)
        self._next.timeout.connect(self._go_on)
        for timer in (self._soon, self._next):
            timer.setSingleShot(True)

    def touch(self, event: Any = None) -> None:
        """Something was painted; also fit to be connected to a napari event."""
        if not self._soon.isActive():
            self._soon.start()

    def stop(self) -> None:
        """Count no more."""
        self._soon.stop()
        self._next.stop()

    def _begin(self) -> None:
        self._pieces, self._total = self._start(), np.zeros(0, np.int64)
        self._go_on()

    def _go_on(self) -> None:
        until = time.monotonic() + _SLICE_SECONDS
        try:
            for total in self._pieces:
                self._total = total
                if time.monotonic() > until:
                    self._next.start()
                    return
        except ConvLoRAError:  # the layer has just lost its size; Adapt says what is wrong
            return
        ids = np.flatnonzero(self._total[: MAX_CLASSES + 1])
        self.counted.emit({int(i): int(self._total[i]) for i in ids if i})
