"""What a round reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from napari_convlora.model.adapter import Adapter


SECONDS_BETWEEN_REPORTS = 0.1
"""Ten reports a second read as live; one at every step would take time from the window."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` tiles of a prediction."""

    done: int
    total: int


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


def batched(messages: Iterable[Any]) -> Iterator[list[Any]]:
    """Hand messages on, steps and tiles at most ten times a second, anything else at once."""
    waiting: list[Any] = []
    last = 0.0
    for message in messages:
        waiting.append(message)
        often = isinstance(message, Step | Progress)
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
