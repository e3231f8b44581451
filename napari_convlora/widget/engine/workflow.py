"""The loop on a viewer: what the panel's buttons do, and what comes back from the thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QObject

from napari_convlora import events
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.session import jobs
from napari_convlora.session.process import Job
from napari_convlora.session.snapshot import Snapshot
from napari_convlora.widget.engine import messages, sentences
from napari_convlora.widget.engine.runner import BUSY, Runner
from napari_convlora.widget.engine.running_job import Phase, RunningJob
from napari_convlora.widget.engine.signals import JobSignals
from napari_convlora.widget.layers import copies, learnable, showing
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.open_images import OpenImages
from napari_convlora.widget.threads import in_thread

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.session.session import Session


@dataclass(frozen=True)
class ClosedImages:
    """What is read of images that are not open.

    Attributes
    ----------
    snapshots
        Those to learn from.
    remark
        A sentence on those that are missing; "" if none is.
    lost
        What to say and to ask if labels are lost; None if none are.
    """

    snapshots: Sequence[Snapshot] = ()
    remark: str = ""
    lost: ConvLoRAError | None = None


class Workflow(JobSignals):
    """Images, and the one job that may run on them.

    Attributes
    ----------
    elsewhere
        Returns what reads annotated images that are not in the viewer, to learn from as well; it
        is called in a thread. None if there are none to be read.
    go_on_without
        Asks whether a round may begin without images whose labels are lost, as a sentence says.
    earlier
        Rounds of an earlier session, which count too.
    resting
        Whether the panel is put away, so that nothing begins by itself.
    """

    def __init__(
        self, viewer: Viewer, session: Session | None = None, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.images = OpenImages(viewer, self)
        self.earlier = 0
        self.resting = False
        self.elsewhere: Callable[[], Callable[[], ClosedImages] | None] = lambda: None
        self.go_on_without: Callable[[str], bool] = lambda sentence: False
        self._job: RunningJob | None = None
        self.runner = Runner(session)
        self.runner.on_messages = self._on_messages
        self.runner.on_error = self._on_error
        self.runner.on_end = self._on_end
        self.images.leaving.connect(self._on_leaving)
        self.images.changed.connect(self.changed)
        self.images.found.connect(self.found)
        self.images.failed.connect(lambda sentence: self.failed.emit(sentence, False))
        self._dims = viewer.dims
        viewer.dims.events.current_step.connect(self._on_plane)
        self.wake()

    @property
    def running(self) -> bool:
        """Whether a job runs."""
        return self.runner.busy or (self._job is not None and self._job.reading)

    @property
    def phase(self) -> Phase:
        """How far the job is."""
        return "idle" if self._job is None else self._job.phase

    @property
    def paused(self) -> bool:
        """Whether the round is asked to wait."""
        return self.running and self._job is not None and self._job.controls.training.paused

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter can predict."""
        return self.runner.session is not None and self.runner.session.installed is not None

    def close(self) -> bool:
        """Stop what runs and wait a bounded time for it; False if it goes on a little longer."""
        self._dims.events.current_step.disconnect(self._on_plane)
        self.images.close()
        if self._job is not None:
            self._job.controls.stop()  # what is still to be read begins no round
        return self.runner.close()

    def rest(self) -> None:
        """End what runs, with what it has learnt, and the process; images stay as they are."""
        self.resting = True
        if self._job is not None:
            self._job.controls.stop()
        self.runner.rest()

    def wake(self) -> None:
        """Be ready for the next job."""
        self.resting = False
        if not self.runner.alive:
            self.kept.emit(jobs.CacheUse(0, 0))
        self.runner.prepare(jobs.warm_up, jobs.prepare_training)
        self.changed.emit()

    def adapt(self, recipe: jobs.RoundSettings) -> None:
        """Start a round on everything painted so far; what is not open is read in a thread."""
        if self.running:
            raise ConvLoRAError(BUSY)
        record = self.images.need()
        snapshots = [copies.snapshot(other) for other in learnable.learnable_images(self.images)]
        self.begun.emit()
        job, read = RunningJob(record, snapshots, recipe), self.elsewhere()
        if read is None:
            self._adapt(job, ClosedImages())
            return
        job.reading, self._job = True, job
        self.said.emit(sentences.READING)
        self.changed.emit()
        in_thread(read, then=self._on_read, failed=self._on_unread)

    def predict(self, recipe: jobs.RoundSettings, *, keep_labels: bool = False) -> None:
        """Predict the current image with the installed adapter, or its uncertainty alone."""
        record = self.images.need()
        if not self.has_adapter:
            raise InputError("There is no adapter yet; press Adapt or load an adapter first.")
        job = RunningJob(record, keep_labels=keep_labels)
        self._start(jobs.predict_job(copies.snapshot(record), recipe), job, "Predicting…")

    def find_uncertainty(self, recipe: jobs.RoundSettings) -> None:
        """Predict again for the uncertainty; a prediction of the same adapter stays as it is."""
        record = self.images.need()
        session = self.runner.session
        keep = record.predicted and session is not None and record.adapter is session.installed
        self.predict(replace(recipe, uncertainty=True), keep_labels=keep)

    def load_adapter(
        self,
        path: Path,
        recipe: jobs.RoundSettings,
        labels: Sequence[tuple[str, np.ndarray]] = (),
        *,
        show: bool = True,
        ours: bool = False,
    ) -> None:
        """Install the adapter in a file, and predict the current image if there is one.

        Parameters
        ----------
        path
            Of the adapter.
        recipe
            What the user has chosen.
        labels
            What it learnt from, if that is known: names and annotations (P, H, W).
        show
            Whether to predict.
        ours
            Whether it is of a round of ours: classes that have left the table since stay away.
        """
        record = self.images.current if show else None
        snapshot = None if record is None else copies.snapshot(record)
        if record is not None:
            showing.keep_previous(record)
        load = jobs.load_job(path, snapshot, recipe, labels)
        self._start(load, RunningJob(record, ours=ours), f"Loading {path.name}…")

    def empty_cache(self) -> None:
        """Let the process forget the frozen features that it keeps."""
        self._start(jobs.empty_cache(), RunningJob(emptied=True), "Emptying the cache…")

    def stop(self) -> None:
        """End training and keep what was learnt, or cancel a prediction."""
        job = self._job
        if self.running and job is not None:
            again = job.phase == "predicting" or job.stopping
            job.controls.stop() if again else job.controls.training.stop()
            self.said.emit("Stopping after this step…")
            self.changed.emit()

    def pause(self, paused: bool) -> None:
        """Let the round wait after its current step, or go on."""
        if self._job is not None and self._job.phase in ("starting", "training"):
            control = self._job.controls.training
            control.pause() if paused else control.resume()
            self.said.emit("Pausing after this step…" if paused else "Training goes on.")
            self.changed.emit()

    def release(self, record: ImageLayers) -> None:
        """Show nothing more on `record`, as its layers are put away; a round on it goes on."""
        job = self._job
        if self.running and job is not None and record is job.target:
            job.controls.predicting.stop()
            job.target = None

    def _start(self, work: Job, job: RunningJob, what: str) -> None:
        if self.running and self._job is not job:
            raise ConvLoRAError(BUSY)
        self.runner.start(work, job.controls)
        job.reading, self._job = False, job
        self._on_plane()
        self.said.emit(what)
        self.changed.emit()

    def _adapt(self, job: RunningJob, closed: ClosedImages) -> None:
        """Begin a round, as all that it learns from is known."""
        assert job.settings is not None
        first, *others = *job.snapshots, *closed.snapshots
        taught = [other for other in others if other.annotations.any() or other.reviewed]
        job.snapshots = [first, *taught]
        if job.target is not None:
            showing.keep_previous(job.target)
            if len(learnable.learnable_pixels(self.images)) > 1:
                showing.prepare_prediction(job.target)
        work = jobs.adapt_job(job.snapshots, self.images.classes, job.settings)
        self._start(work, job, sentences.LOADING)

    def _on_read(self, closed: ClosedImages) -> None:
        job = self._job
        if job is None or not job.reading:
            return
        lost = closed.lost
        if lost is not None and not job.stopping and not self.go_on_without(str(lost)):
            self._on_unread(lost)
            return
        if job.stopping or self.runner.closed:
            self._on_end()
            return
        if closed.remark:
            self.failed.emit(closed.remark, False)
        try:
            self._adapt(job, closed)
        except ConvLoRAError as error:
            self._on_unread(error)

    def _on_unread(self, error: Exception) -> None:
        self._on_error(error)
        self._on_end()

    def _on_leaving(self, record: ImageLayers | None, why: str) -> None:
        job = self._job
        if not why or not self.running or job is None or record is None:
            return
        if record is job.target:
            job.controls.stop()
            job.target, job.interrupted = None, why
            self.said.emit(sentences.at_the_end(job, here=False))
            self.interrupted.emit()

    def _on_plane(self, event: Any = None) -> None:
        job = self._job
        if self.running and job is not None and job.target is not None:
            record, training = job.target, job.controls.training
            training.visible = (0, record.plane() if record.in_view else None)
            training.seen = record.seen(record.prediction, record.annotations)
            job.controls.predicting.seen = training.seen

    def _on_messages(self, news: list[Any]) -> None:
        self._on_plane()  # where the camera is only shows once napari has drawn
        job = self._job or RunningJob()  # nobody's, while the process is prepared
        session = self.runner.session
        for message in news:
            try:
                messages.on_round(message, job, self, self.images.classes)
                adapter = None if session is None else session.installed
                messages.on_prediction(message, job, self, adapter)
            except ConvLoRAError as error:
                self.failed.emit(str(error), False)
        steps = [m for m in news if isinstance(m, events.Step)]
        if steps:
            self.stepped.emit(steps)

    def _on_error(self, error: Exception) -> None:
        if self._job is not None:
            self._job.error = error
        self.failed.emit(sentences.broken(error), sentences.is_our_fault(error))

    def _on_end(self) -> None:
        job, self._job = self._job or RunningJob(), None
        session = self.runner.session
        job.number = self.earlier + (len(session.rounds) if session is not None else 1)
        here = job.target is not None and job.target is self.images.current
        sentence = sentences.at_the_end(job, here=here)
        if job.target is not None:
            showing.withdraw_prediction(job.target)
        self.said.emit(sentence)
        self.changed.emit()
