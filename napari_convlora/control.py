"""How a round is told to stop, pause or take new labels."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from napari_convlora.images.regions import Block, overlap
from napari_convlora.labels.annotations import LabelledImage


class RunControl:
    """Requests to a running round, safe to call from any thread.

    Attributes
    ----------
    visible
        Image and plane index that previews show; assign to look elsewhere. What `seen` shows of
        `places` comes before it. Without a plane, all planes of the first image are seen edge-on.
    seen
        What the viewer shows of the image that is predicted; assign as it changes.
    places
        Where the first images lie, if they are parts of a large one.
    keep_every
        Seconds between `Interim` events; None asks for none.
    planes_after
        How many planes of the first image are predicted when the round is over; assign where that
        is known, for the time left.
    hurry
        Assign True before `stop` to leave out the comparison with the installed adapter as well.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._running = threading.Event()
        self._running.set()
        self._lock = threading.Lock()
        self._images: Sequence[LabelledImage] | None = None
        self.seen: Block | None = None
        self.places: Sequence[Block] = ()
        self._visible: tuple[int, int | None] = (0, 0)
        self.keep_every: float | None = None
        self.planes_after = 0
        self.hurry = False

    @property
    def visible(self) -> tuple[int, int | None]:
        """Image and plane index that previews show."""
        if self._visible[1] is None:
            return self._visible
        seen = self.seen
        shown = [0 if seen is None else overlap(place, seen) for place in self.places]
        return (shown.index(max(shown)), 0) if any(shown) else self._visible

    @visible.setter
    def visible(self, where: tuple[int, int | None]) -> None:
        self._visible = where

    def stop(self) -> None:
        """End the round after the current step, keeping what it has learnt."""
        self._stop.set()
        self._running.set()

    def pause(self) -> None:
        """Wait after the current step until `resume` or `stop`."""
        self._running.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running.set()

    def update_annotations(self, images: Sequence[LabelledImage]) -> None:
        """Train on these annotations of the same images from the next step on.

        Annotations that this round cannot take (none left, a class it does not know) are left to
        the next one.
        """
        with self._lock:
            self._images = images

    def take_annotations(self) -> Sequence[LabelledImage] | None:
        """Return annotations that came since the last call, or None."""
        with self._lock:
            images, self._images = self._images, None
        return images

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    @property
    def paused(self) -> bool:
        """Whether the round is asked to wait."""
        return not self._running.is_set()

    def wait(self) -> None:
        """Block while paused."""
        self._running.wait()


@dataclass(frozen=True)
class Controls:
    """Training and the prediction that follows it end apart: Stop keeps what was learnt."""

    training: RunControl = field(default_factory=RunControl)
    predicting: RunControl = field(default_factory=RunControl)

    def stop(self) -> None:
        """End both as soon as possible."""
        self.training.hurry = True
        self.training.stop()
        self.predicting.stop()
