"""The job that runs: what it works on, and what it has come to so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from napari_convlora.control import Controls
from napari_convlora.events import Failed, Finished, Scored
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.session.snapshot import Snapshot
from napari_convlora.widget.layers.image_layers import ImageLayers

Phase = Literal["idle", "starting", "training", "predicting"]


class Outcome(Enum):
    """What a job has come to; one that says more hides those below it."""

    BROKEN = auto()
    INTERRUPTED = auto()
    FAILED = auto()
    LEARNT = auto()
    PREDICTED = auto()
    CANCELLED = auto()
    LOADED = auto()
    EMPTIED = auto()
    STOPPED = auto()
    NOTHING = auto()


@dataclass(eq=False)
class RunningJob:
    """The one job that runs.

    Attributes
    ----------
    target
        The image that shows what comes; None if there is none, or none any more.
    snapshots, settings
        What a round learns from, and how.
    keep_labels
        Whether the prediction stays as it is while its uncertainty comes.
    ours
        Whether the adapter that is loaded is of a round of ours.
    controls
        Stop, pause, what is seen.
    phase
        How far it is.
    reading
        Whether it still waits for what is on disk.
    number
        Of the round.
    finished, failed, scored, loaded, predicted, cancelled, emptied
        What has come back.
    interrupted
        Why the user's doing has ended it; "" if it has not.
    error
        What broke it.
    """

    target: ImageLayers | None = None
    snapshots: Sequence[Snapshot] = ()
    settings: RoundSettings | None = None
    keep_labels: bool = False
    ours: bool = False
    controls: Controls = field(default_factory=Controls)
    phase: Phase = "starting"
    reading: bool = False
    number: int = 0
    finished: Finished | None = None
    failed: Failed | None = None
    scored: Scored | None = None
    loaded: bool = False
    predicted: bool = False
    cancelled: bool = False
    emptied: bool = False
    interrupted: str = ""
    error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether it is asked to end."""
        return self.controls.training.stopping

    @property
    def outcome(self) -> Outcome:
        """What it has come to so far."""
        if self.error is not None:
            return Outcome.BROKEN
        if self.interrupted:
            return Outcome.INTERRUPTED
        if self.failed is not None:
            return Outcome.FAILED
        if self.finished is not None:
            return Outcome.LEARNT
        if self.predicted:
            return Outcome.PREDICTED
        if self.cancelled and (self.target is not None or not self.loaded):
            return Outcome.CANCELLED
        if self.loaded:
            return Outcome.LOADED
        if self.emptied:
            return Outcome.EMPTIED
        return Outcome.STOPPED if self.stopping else Outcome.NOTHING
