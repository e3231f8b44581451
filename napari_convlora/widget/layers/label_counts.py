"""Counts what is annotated, in a thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal
from skimage.measure import label

from napari_convlora.config import MAX_CLASSES
from napari_convlora.errors import ConvLoRAError
from napari_convlora.labels.reviewed import Outlines, inside_outlines
from napari_convlora.widget.threads import in_thread

logger = logging.getLogger(__name__)
_DELAY_MS = 150


@dataclass(frozen=True)
class LabelCounts:
    """What is annotated in one image.

    Parameters
    ----------
    pixels, strokes
        Painted pixels, and connected groups of them in a plane, per class id.
    regions
        Reviewed regions.
    remaining
        Unpainted pixels inside them.
    """

    pixels: dict[int, int] = field(default_factory=dict)
    strokes: dict[int, int] = field(default_factory=dict)
    regions: int = 0
    remaining: int = 0


def count(labels: np.ndarray, outlines: Outlines = ()) -> LabelCounts:
    """Count what is painted in `labels` (P, H, W) int, and what remains inside `outlines`."""
    pixels = np.zeros(MAX_CLASSES + 1, np.int64)
    strokes = np.zeros(MAX_CLASSES + 1, np.int64)
    remaining = 0
    for p, plane in enumerate(labels):
        here = [vertices for plane_index, vertices in outlines if plane_index == p]
        if here:
            inside = inside_outlines((1, *plane.shape), [(0, vertices) for vertices in here])[0]
            remaining += int(np.count_nonzero(inside & (plane == 0)))
        rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
        if not len(rows) or not len(columns):
            continue
        part = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part = np.where((part > 0) & (part <= MAX_CLASSES), part, 0).astype(np.uint8)
        pixels += np.bincount(part.ravel(), minlength=MAX_CLASSES + 1)
        groups, n_groups = label(part, connectivity=2, return_num=True)
        classes = np.zeros(n_groups + 1, np.uint8)
        classes[groups] = part
        strokes += np.bincount(classes[1:], minlength=MAX_CLASSES + 1)
    used = [int(i) for i in np.flatnonzero(pixels) if i]
    return LabelCounts(
        {i: int(pixels[i]) for i in used},
        {i: int(strokes[i]) for i in used},
        len(outlines),
        remaining,
    )


class Counter(QObject):
    """Counts again soon after `touch`, in a thread.

    Parameters
    ----------
    annotated
        Returns labels and outlines to count; None if there are none.
    """

    counted = Signal(object)

    def __init__(
        self,
        annotated: Callable[[], tuple[np.ndarray, Outlines] | None],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._annotated = annotated
        self._busy = self._again = self._stopped = False
        self._soon = QTimer(self)
        self._soon.setInterval(_DELAY_MS)
        self._soon.setSingleShot(True)
        self._soon.timeout.connect(self._begin)

    def touch(self, event: Any = None) -> None:
        """Something was painted; also fit to be connected to a napari event."""
        if not self._soon.isActive() and not self._stopped:
            self._soon.start()

    def stop(self) -> None:
        """Count no more."""
        self._stopped = True
        self._soon.stop()

    def _begin(self) -> None:
        if self._busy:
            self._again = True
            return
        try:
            annotated = self._annotated()
        except ConvLoRAError:  # the layer has just lost its size; Adapt says what is wrong
            return
        if annotated is None:
            self.counted.emit(LabelCounts())
            return
        self._busy, self._again = True, False
        # The array is read while the user paints on: what is missed is counted the next time.
        in_thread(count, *annotated, then=self._on_counted, failed=self._on_failed)

    def _on_failed(self, error: Exception) -> None:
        self._busy = False
        logger.error("Counting broke", exc_info=error)

    def _on_counted(self, counts: LabelCounts) -> None:
        self._busy = False
        if self._stopped:
            return
        self.counted.emit(counts)
        if self._again:
            self.touch()
