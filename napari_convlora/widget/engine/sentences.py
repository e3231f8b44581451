"""What the status line says of a job, in one sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

from napari_convlora.config import ClassInfo, listed
from napari_convlora.errors import ConvLoRAError
from napari_convlora.evaluation.gate import decide
from napari_convlora.events import Failed, Started
from napari_convlora.widget.engine.running_job import Outcome, RunningJob
from napari_convlora.widget.threads import JobError

LOADING = "Loading the backbone…"
READING = "Reading the annotations of images that are not open…"
FIRST_PREVIEW = (
    "A first preview; SAM itself is learning now. You can go on painting, pause or stop."
)
_HOW = {
    "stopped": "was stopped",
    "time": "used up its time",
    "plateau": "had no more to gain and is done",
    "terminated": "was stopped in the middle of a step",
}
_LOADED = "The adapter is loaded; press Predict to use it on an image."
_NEXT = "Paint over mistakes, then press Adapt again; or press Export masks."
_PREDICT_HERE = "Press Predict to see what it makes of this image."
_KEPT = "What is painted is kept; try it again."
_CANCELLED = "The prediction was stopped; the adapter is kept."
_STOPPED = (
    "The prediction was stopped: what was done by then is shown, the rest is as before; press "
    "Predict for all of it."
)
_PREDICTED = (
    "The prediction is ready. Paint over its mistakes, then press Adapt; or press Export masks."
)


def at_the_end(job: RunningJob, *, here: bool) -> str:
    """Say what has become of a job.

    Parameters
    ----------
    job
        Which.
    here
        Whether its image is the one that is worked on.
    """
    match job.outcome:
        case Outcome.BROKEN:
            assert job.error is not None
            return broken(job.error)
        case Outcome.INTERRUPTED:
            why = f"Stopped because {job.interrupted}; what was learnt and painted is kept."
            return why + (_set_aside(job.failed) if job.failed is not None else "")
        case Outcome.FAILED:
            assert job.failed is not None
            return job.failed.message + _set_aside(job.failed)
        case Outcome.LEARNT:
            return _learnt(job, here)
        case Outcome.PREDICTED:
            return _PREDICTED
        case Outcome.CANCELLED:
            return _CANCELLED if job.target is None else _STOPPED
        case Outcome.LOADED:
            return _LOADED
        case Outcome.EMPTIED:
            return "The cache is empty; the next round computes the features again."
        case Outcome.STOPPED:
            return _STOPPED if job.phase == "predicting" else "Stopped; nothing has changed."
    return ""


def broken(error: Exception) -> str:
    """Say why a job broke off."""
    if not is_our_fault(error):
        return str(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"It broke off: {text.rstrip('.')}. {_KEPT}"


def is_our_fault(error: Exception) -> bool:
    """Whether an error is ours rather than the input's."""
    return not isinstance(error, ConvLoRAError) or isinstance(error, JobError)


def learning(job: RunningJob, started: Started, classes: Sequence[ClassInfo]) -> str:
    """Say what a round that begins learns from, and where."""
    names = {info.id: info.name for info in classes}
    used = ", ".join(names.get(i, str(i)) for i, n in started.pixels.items() if n)
    taught = [s for s in job.snapshots if s.annotations.any() or s.reviewed]
    images = listed([f"'{snapshot.name}'" for snapshot in taught])
    total = sum(started.pixels.values())
    return f"Training on {started.device}: {total:,} painted pixels of {used} in {images}."


def _learnt(job: RunningJob, here: bool) -> str:
    assert job.finished is not None
    message, summary = job.finished, job.finished.adapter.summary
    how, verdict, score = _HOW.get(message.reason, "is done"), decide(summary), ""
    if job.scored is not None:
        where = "held-out" if job.scored.held_out else "training"
        score = f" with a score of {job.scored.score:.2f} on {where} labels"
    if message.reason == "terminated" and verdict.better:
        how += "; press Predict to see what it learnt"
    reason = f" {verdict.reason}" if summary.get("compared") else ""
    if job.cancelled and job.target is not None:
        then = _STOPPED
    else:
        then = _NEXT if here else _PREDICT_HERE
    return f"Round {job.number} {how}{score}.{reason} {then}"


def _set_aside(failed: Failed) -> str:
    if failed.adapter is None or decide(failed.adapter.summary).better:
        return ""
    return " It is in Rounds, and the round before stays installed."
