"""What comes back from a job: shown on its image, noted, and told to whoever listens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from napari_convlora import events
from napari_convlora.config import ClassInfo
from napari_convlora.session import jobs
from napari_convlora.widget.engine import sentences
from napari_convlora.widget.engine.running_job import RunningJob
from napari_convlora.widget.engine.signals import JobSignals
from napari_convlora.widget.layers import showing

if TYPE_CHECKING:
    from napari_convlora.model.adapter import Adapter


def on_round(
    message: Any, job: RunningJob, signals: JobSignals, classes: Sequence[ClassInfo]
) -> None:
    """Take up what a round says."""
    match message:
        case events.Started():
            job.phase = "training"
            signals.started.emit(message.total_steps, message.held_out, message.nbytes)
            signals.said.emit(sentences.learning(job, message, classes))
            signals.changed.emit()
        case events.Planned():
            signals.planned.emit(message)
            if not job.stopping:
                # The bar says what is left, which changes; this line would stay.
                signals.said.emit(f"{message.needs}.")
        case events.Adjusted() | events.Silent():
            signals.said.emit(str(message))
        case events.Scored():
            job.scored = message
            signals.scored.emit(message)
        case events.Paused():
            signals.said.emit(f"Paused after step {message.step}; press Resume to go on.")
        case events.Preview() if job.target is not None:
            shown = showing.show(job.target, message.labels, message.plane)
            if shown and message.stage == "detail":
                signals.said.emit(sentences.FIRST_PREVIEW)
            signals.changed.emit()
        case events.Finished():
            job.finished = message
            signals.learnt.emit(message, list(job.snapshots), job.settings)
        case events.Failed():
            job.failed = message
            if message.adapter is not None:
                signals.learnt.emit(message, list(job.snapshots), job.settings)
            if not job.stopping:
                signals.failed.emit(sentences.at_the_end(job, here=False), False)


def on_prediction(
    message: Any, job: RunningJob, signals: JobSignals, adapter: Adapter | None
) -> None:
    """Take up what a prediction says, or a process that has loaded or forgotten something.

    Parameters
    ----------
    message, job, signals
        What is said, by which job, and where it is told.
    adapter
        The installed one.
    """
    match message:
        case jobs.Ready():
            signals.ready.emit(message.backbones)
        case jobs.Loaded():
            if not job.ours:
                signals.found.emit(message.adapter.classes)
                if message.adapter.remark:
                    signals.failed.emit(message.adapter.remark, False)
            signals.loaded.emit(job.ours)
            job.loaded, job.interrupted = True, ""  # nothing is lost with the image
        case jobs.CacheUse():
            signals.kept.emit(message)
        case events.Tiles():
            if job.phase != "predicting":
                job.phase = "predicting"
                signals.changed.emit()
            signals.tiled.emit(message)
        case jobs.Remark():
            signals.failed.emit(message.sentence, False)
        case jobs.Parts() if job.target is not None:
            if not job.keep_labels:
                showing.show_parts(job.target, message.labels)
                job.target.adapter = None  # some of it may still be another one's
            if message.uncertainty:
                job.target.extra.show_uncertain_parts(message.uncertainty)
            signals.changed.emit()
        case jobs.Predicted() if job.target is not None:
            record, job.predicted = job.target, True
            record.adapter = adapter
            if message.uncertainty:
                record.extra.scored = True
            else:
                record.extra.show_uncertainty(None)
            if not job.keep_labels:
                said = record.predicted_view().copy() if message.labels is None else message.labels
                signals.predicted.emit(record, said)
            signals.changed.emit()
        case jobs.Cancelled():
            job.cancelled = True
