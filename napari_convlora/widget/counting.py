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
_PIECE = 2**20


def pixels_by_id(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pixels per id so far, a piece of `labels` at a time; ids of no class come last."""
    flat = labels.reshape(-1)
    total = np.zeros(MAX_CLASSES + 2, np.int64)
    for start in range(0, flat.size, _PIECE):
        piece = np.clip(flat[start : start + _PIECE], 0, MAX_CLASSES + 1)
        total += np.bincount(piece, minlength=MAX_CLASSES + 2)
        yield total


class PixelCounter(QObject):
    """Counts again soon after `touch`, a hundredth of a second at a time.

    Parameters
    ----------
    labels
        Returns what to count; None if there is nothing.
    """

    counted = Signal(dict)

    def __init__(
        self, labels: Callable[[], np.ndarray | None], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._labels = labels
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
        try:
            labels = self._labels()
        except ConvLoRAError:  # the layer has just lost its size; Adapt says what is wrong
            return
        self._pieces = iter(()) if labels is None else pixels_by_id(labels)
        self._total = np.zeros(0, np.int64)
        self._go_on()

    def _go_on(self) -> None:
        until = time.monotonic() + _SLICE_SECONDS
        for total in self._pieces:
            self._total = total
            if time.monotonic() > until:
                self._next.start()
                return
        ids = np.flatnonzero(self._total[: MAX_CLASSES + 1])
        self.counted.emit({int(i): int(self._total[i]) for i in ids if i})
