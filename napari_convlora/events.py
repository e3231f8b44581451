"""What a round reports while it runs, and how it is told to stop, pause or take new labels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.annotations import LabelledImage
from napari_convlora.blocks import Block, overlap

if TYPE_CHECKING:
    from napari_convlora.adapter_file import Adapter

SECONDS_BETWEEN_REPORTS = 0.1
"""Ten reports a second read as live; one at every step would take time from the window."""


@dataclass(frozen=True)
class Started:
    """The labels are accepted and training begins.

    Parameters
    ----------
    total_steps
        Upper bound on optimiser steps.
    pixels
        Labelled pixels per class id.
    held_out
        Whether scores come from labels kept out of training.
    device
        Where it runs.
    nbytes
        What its adapter will take on disk.
    """

    total_steps: int
    pixels: dict[int, int]
    held_out: bool
    device: str
    nbytes: int = 0


@dataclass(frozen=True)
class Planned:
    """What a round takes, measured on its first steps; comes once, unless it is very short.

    Parameters
    ----------
    seconds_per_step
        Of the steps that adapt the encoder, if the method does.
    peak_memory
        Most bytes that a step had in use: of the GPU, or of the whole process.
    seconds_left
        Of the first steps' `Step.seconds_left`.
    """

    seconds_per_step: float
    peak_memory: int
    seconds_left: float

    @property
    def needs(self) -> str:
        """What does not change as the round goes on."""
        return (
            f"A step takes {self.seconds_per_step:.2g} s and up to {self.peak_memory / 1e9:.1f} GB "
            "of memory"
        )

    def __str__(self) -> str:
        return f"{self.needs}; about {duration_text(self.seconds_left)} to go."


@dataclass(frozen=True)
class Adjusted:
    """Memory ran out, and the round goes on with less; `message` is one sentence for the user."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Silent:
    """Nothing was heard of a round for so many seconds; 0 once it is heard again.

    It comes from whoever waits for the round, not from the round.
    """

    seconds: float

    def __str__(self) -> str:
        if not self.seconds:
            return "The trainer goes on."
        return (
            f"The trainer has said nothing for {self.seconds / 60:.0f} minutes; Stop ends it and "
            "keeps the last snapshot."
        )


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Parameters
    ----------
    step, total_steps
        Its 1-based number, and the most there will be.
    loss
        NaN for a step that was left out.
    seconds
        Since training began, pauses not counted.
    seconds_left
        About how long the round will yet take, by what its last steps took, and what is known to
        follow them; None until that is known. It may end before, when its score no longer rises.
    """

    step: int
    total_steps: int
    loss: float
    seconds: float
    seconds_left: float | None = None


@dataclass(frozen=True)
class Scored:
    """Mean IoU in [0, 1] after `step` steps, on held-out labels or on training labels."""

    step: int
    score: float
    held_out: bool


@dataclass(frozen=True)
class Preview:
    """Predicted class ids (H, W) of one plane of one training image.

    `stage` is ``"detail"`` for the detail branch alone, ``"adapted"`` for the whole model.
    """

    image: int
    plane: int
    labels: np.ndarray
    stage: str


@dataclass(frozen=True)
class Paused:
    """The round waits after `step` steps; optimiser and model stay as they are."""

    step: int


@dataclass(frozen=True)
class Interim:
    """What was learnt by `step`, in case the round is broken off; only where it is asked for."""

    step: int
    adapter: Adapter


@dataclass(frozen=True)
class Finished:
    """The round ended with a usable adapter.

    `reason` is ``"steps"``, ``"time"``, ``"plateau"``, ``"stopped"``, or ``"terminated"`` if it did
    not stop in time, so that the adapter is what it had learnt shortly before. `learnt` tells which
    pixels it learnt from, see `training.compare.Learnt`; None where that is not known.
    """

    adapter: Adapter
    reason: str
    learnt: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Failed:
    """The round broke off; `message` is one sentence for the user.

    `adapter` is what it had learnt shortly before, None if that is nothing.
    """

    message: str
    adapter: Adapter | None = None


Event = (
    Started | Planned | Adjusted | Step | Scored | Preview | Paused | Interim | Finished | Failed
)


@dataclass(frozen=True)
class Tiles:
    """`done` of `total` tiles of a prediction."""

    done: int
    total: int


def batched(messages: Iterable[Any]) -> Iterator[list[Any]]:
    """Hand messages on, steps and tiles at most ten times a second, anything else at once."""
    waiting: list[Any] = []
    last = 0.0
    for message in messages:
        waiting.append(message)
        often = isinstance(message, Step | Tiles)
        if not often or time.monotonic() - last >= SECONDS_BETWEEN_REPORTS:
            yield waiting
            waiting, last = [], time.monotonic()
    if waiting:
        yield waiting


def duration_text(seconds: float) -> str:
    """Return a duration in words, such as ``1 min 05 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


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
