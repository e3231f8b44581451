"""The loop on a viewer: what the panel's buttons do, and what comes back from the thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from qtpy.QtCore import QObject, Signal

from napari_convlora import events
from napari_convlora.config import listed
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.evaluation.gate import decide
from napari_convlora.session import jobs, snapshot
from napari_convlora.widget.engine.runner import Runner
from napari_convlora.widget.layers import copies, learnable, showing
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.open_images import OpenImages

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.session.session import Session

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
_STOPPED = (
    "The prediction was stopped: what was done by then is shown, the rest is as before; press "
    "Predict for all of it."
)
_PREDICTED = (
    "The prediction is ready. Paint over its mistakes, then press Adapt; or press Export masks."
)
Phase = Literal["idle", "starting", "training", "predicting"]


class Workflow(QObject):
    """Images, and the one job that may run on them.

    Attributes
    ----------
    elsewhere
        Returns annotated images that are not in the viewer, to learn from as well.
    earlier
        Rounds of an earlier session, which count too.
    resting
        Whether the panel is put away, so that nothing begins by itself.

    Signals
    -------
    changed
        Anything the panel shows may have changed: phase, layers, installed adapter.
    said
        What has just happened, or what went well, in one sentence.
    failed
        What went wrong, in one sentence, and whether it is our fault rather than the input's.
    found
        Classes that a layer or an adapter brings along.
    started, planned, stepped, scored, tiled
        Progress: (total steps, held out, bytes of the adapter), `Planned`, list of `Step`,
        `Scored`, `Tiles`.
    kept
        What the process keeps for the next round: `Kept`.
    learnt
        A round has ended: `Finished`, or `Failed` with the adapter of its last snapshot, then the
        snapshots of images that it learnt from, and its `Recipe`.
    predicted
        The image that was predicted, and what the model said (P, H, W).
    loaded
        An adapter was loaded; whether it is of a round of ours.
    interrupted
        The user took away what a job works on, which ends it.
    ready
        Titles of the backbones on this computer, by name.
    """

    changed = Signal()
    said = Signal(str)
    failed = Signal(str, bool)
    found = Signal(object)
    started = Signal(int, bool, object)
    planned = Signal(object)
    stepped = Signal(list)
    scored = Signal(object)
    tiled = Signal(object)
    kept = Signal(object)
    learnt = Signal(object, list, object)
    predicted = Signal(object, object)
    loaded = Signal(bool)
    interrupted = Signal()
    ready = Signal(dict)

    def __init__(
        self, viewer: Viewer, session: Session | None = None, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.images = OpenImages(viewer, self)
        self.phase: Phase = "idle"
        self.earlier = 0
        self.resting = False
        self.elsewhere: Callable[[], list[snapshot.Snapshot]] = list
        self._target: ImageLayers | None = None
        self._learning: tuple[list[snapshot.Snapshot], jobs.RoundSettings | None] = [], None
        self._outcome = ""
        self._score = ""
        self._keep_labels = self._ours = False
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
        return self.runner.busy

    @property
    def _stopping(self) -> bool:
        controls = self.runner.controls
        return controls is not None and controls.training.stopping

    @property
    def paused(self) -> bool:
        """Whether the round is asked to wait."""
        controls = self.runner.controls
        return self.running and controls is not None and controls.training.paused

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter can predict."""
        return self.runner.session is not None and self.runner.session.installed is not None

    def close(self) -> bool:
        """Stop what runs and wait a bounded time for it; False if it goes on a little longer."""
        self._dims.events.current_step.disconnect(self._on_plane)
        self.images.close()
        return self.runner.close()

    def rest(self) -> None:
        """End what runs, with what it has learnt, and the process; images stay as they are."""
        self.resting = True
        self.runner.rest()

    def wake(self) -> None:
        """Be ready for the next job."""
        self.resting = False
        if not self.runner.alive:
            self.kept.emit(jobs.CacheUse(0, 0))
        self.runner.prepare(jobs.warm_up, jobs.prepare_training)
        self.changed.emit()

    def adapt(self, recipe: jobs.RoundSettings) -> None:
        """Start a round on everything painted so far."""
        record = self.images.need()
        first, *others = (
            copies.snapshot(other) for other in learnable.learnable_images(self.images)
        )
        others += self.elsewhere()
        snapshots = [
            first,
            *(other for other in others if other.annotations.any() or other.reviewed),
        ]
        showing.keep_previous(record)
        if len(learnable.learnable_pixels(self.images)) > 1:
            showing.prepare_prediction(record)
        job = jobs.adapt_job(snapshots, self.images.classes, recipe)
        self._start(job, record, "Loading the backbone…")
        self._learning = snapshots, recipe

    def predict(self, recipe: jobs.RoundSettings) -> None:
        """Predict the current image with the installed adapter."""
        record = self.images.need()
        if not self.has_adapter:
            raise InputError("There is no adapter yet; press Adapt or load an adapter first.")
        self._start(jobs.predict_job(copies.snapshot(record), recipe), record, "Predicting…")

    def find_uncertainty(self, recipe: jobs.RoundSettings) -> None:
        """Predict again for the uncertainty; a prediction of the same adapter stays as it is."""
        record = self.images.need()
        session = self.runner.session
        keep = record.predicted and session is not None and record.adapter is session.installed
        self.predict(replace(recipe, uncertainty=True))
        self._keep_labels = keep

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
        self._start(jobs.load_job(path, snapshot, recipe, labels), record, f"Loading {path.name}…")
        self._ours = ours

    def empty_cache(self) -> None:
        """Let the process forget the frozen features that it keeps."""
        self._start(jobs.empty_cache(), None, "Emptying the cache…")
        self._outcome = "The cache is empty; the next round computes the features again."

    def stop(self) -> None:
        """End training and keep what was learnt, or cancel a prediction."""
        controls = self.runner.controls
        if self.running and controls is not None:
            again = self.phase == "predicting" or controls.training.stopping
            controls.stop() if again else controls.training.stop()
            self.said.emit("Stopping after this step…")
            self.changed.emit()

    def pause(self, paused: bool) -> None:
        """Let the round wait after its current step, or go on."""
        controls = self.runner.controls
        if self.phase in ("starting", "training") and controls is not None:
            control = controls.training
            control.pause() if paused else control.resume()
            self.said.emit("Pausing after this step…" if paused else "Training goes on.")
            self.changed.emit()

    def export_masks(self, path: Path) -> None:
        """Write the prediction, annotations on top, and the class table beside it."""
        from napari_convlora.config import CLASSES_FILE
        from napari_convlora.exports.masks import save_masks

        table = save_masks(self.images.need().predicted_labels(), path, self.images.classes)
        why = f", which counts before the {CLASSES_FILE} of other masks there"
        self.said.emit(
            f"Masks written to {path.name}, class names to {table.name} beside it"
            f"{why * (table.name != CLASSES_FILE)}."
        )

    def export_adapter(self, path: Path) -> None:
        """Write the installed adapter."""
        session = self.runner.session
        if session is None or session.installed is None:
            raise InputError("There is no adapter yet; press Adapt first.")
        session.installed.save(path)
        self.said.emit(f"Adapter written to {path.name}; it predicts other images too.")

    def _start(self, job: jobs.Job, target: ImageLayers | None, what: str) -> None:
        self.runner.start(job)
        self._target, self._outcome, self._score = target, "", ""
        self._keep_labels = False
        self.phase = "starting"
        self._on_plane()
        self.said.emit(what)
        self.changed.emit()

    def release(self, record: ImageLayers) -> None:
        """Show nothing more on `record`, as its layers are put away; a round on it goes on."""
        controls = self.runner.controls
        if self.running and record is self._target and controls is not None:
            controls.predicting.stop()
            self._target = None

    def _on_leaving(self, record: ImageLayers | None, why: str) -> None:
        if why and self.running and record is not None and record is self._target:
            self.runner.stop()
            self._target = None
            self._outcome = f"Stopped because {why}; what was learnt and painted is kept."
            self.said.emit(self._outcome)
            self.interrupted.emit()

    def _on_plane(self, event: Any = None) -> None:
        controls = self.runner.controls
        if self.running and self._target is not None and controls is not None:
            record, training = self._target, controls.training
            training.visible = (0, record.plane() if record.in_view else None)
            training.seen = record.seen(record.prediction, record.annotations)
            controls.predicting.seen = training.seen

    def _on_messages(self, messages: list[Any]) -> None:
        self._on_plane()  # where the camera is only shows once napari has drawn
        for message in messages:
            try:
                self._handle(message)
            except ConvLoRAError as error:
                self.failed.emit(str(error), False)
        steps = [m for m in messages if isinstance(m, events.Step)]
        if steps:
            self.stepped.emit(steps)

    def _handle(self, message: Any) -> None:
        match message:
            case jobs.Ready():
                self.ready.emit(message.backbones)
            case events.Started():
                self.phase = "training"
                self.started.emit(message.total_steps, message.held_out, message.nbytes)
                self.said.emit(f"Training on {message.device}: {self._learning_from(message)}.")
                self.changed.emit()
            case events.Planned():
                self.planned.emit(message)
                if not self._stopping:
                    # The bar says what is left, which changes; this line would stay.
                    self.said.emit(f"{message.needs}.")
            case events.Adjusted() | events.Silent():
                self.said.emit(str(message))
            case events.Scored():
                where = "held-out" if message.held_out else "training"
                self._score = f" with a score of {message.score:.2f} on {where} labels"
                self.scored.emit(message)
            case events.Paused():
                self.said.emit(f"Paused after step {message.step}; press Resume to go on.")
            case events.Preview() if self._target is not None:
                shown = showing.show(self._target, message.labels, message.plane)
                if shown and message.stage == "detail":
                    self.said.emit(
                        "A first preview; SAM itself is learning now. You can go on "
                        "painting, pause or stop."
                    )
                self.changed.emit()
            case events.Finished():
                self.learnt.emit(message, *self._learning)
                self._finish(message)
            case events.Failed():
                if not self._outcome:  # or it was broken off, and why is known
                    self._outcome = message.message
                if message.adapter is not None:
                    self.learnt.emit(message, *self._learning)
                    if not decide(message.adapter.summary).better:
                        self._outcome += " It is in Rounds, and the round before stays installed."
                if not self._stopping:
                    self.failed.emit(self._outcome, False)
            case jobs.Loaded():
                if not self._ours:
                    self.found.emit(message.adapter.classes)
                    if message.adapter.remark:
                        self.failed.emit(message.adapter.remark, False)
                self.loaded.emit(self._ours)
                self._outcome = _LOADED
            case jobs.CacheUse():
                self.kept.emit(message)
            case jobs.Tiles():
                if self.phase != "predicting":
                    self.phase = "predicting"
                    self.changed.emit()
                self.tiled.emit(message)
            case jobs.Remark():
                self.failed.emit(message.sentence, False)
            case jobs.Parts() if self._target is not None:
                if not self._keep_labels:
                    showing.show_parts(self._target, message.labels)
                    self._target.adapter = None  # some of it may still be another one's
                if message.uncertainty:
                    self._target.extra.show_uncertain_parts(message.uncertainty)
                self.changed.emit()
            case jobs.Predicted() if self._target is not None:
                self._predicted(self._target, message)
            case jobs.Cancelled() if self._target is not None:
                so_far = self._outcome.removesuffix(_NEXT).removesuffix(_LOADED).strip()
                self._outcome = f"{so_far} {_STOPPED}".strip()
            case jobs.Cancelled():
                self._outcome = self._outcome or "The prediction was stopped; the adapter is kept."

    def _learning_from(self, message: events.Started) -> str:
        names = {info.id: info.name for info in self.images.classes}
        used = [names.get(i, str(i)) for i, n in message.pixels.items() if n]
        taught = [s for s in self._learning[0] if s.annotations.any() or s.reviewed]
        images = listed([f"'{snapshot.name}'" for snapshot in taught])
        return f"{sum(message.pixels.values()):,} painted pixels of {', '.join(used)} in {images}"

    def _finish(self, message: events.Finished) -> None:
        session = self.runner.session
        if self._outcome:  # it was broken off, and why is known
            return
        number = self.earlier + (len(session.rounds) if session is not None else 1)
        how = _HOW.get(message.reason, "is done")
        verdict = decide(message.adapter.summary)
        if message.reason == "terminated" and verdict.better:
            how += "; press Predict to see what it learnt"
        reason = f" {verdict.reason}" if message.adapter.summary.get("compared") else ""
        here = self._target is not None and self._target is self.images.current
        self._outcome = (
            f"Round {number} {how}{self._score}.{reason} {_NEXT if here else _PREDICT_HERE}"
        )

    def _predicted(self, record: ImageLayers, message: jobs.Predicted) -> None:
        """Take note that the whole image is predicted."""
        session = self.runner.session
        record.adapter = None if session is None else session.installed
        if message.uncertainty:
            record.extra.scored = True
        else:
            record.extra.show_uncertainty(None)
        if not self._keep_labels:
            said = record.predicted_view().copy() if message.labels is None else message.labels
            self.predicted.emit(record, said)
        if self._outcome in ("", _LOADED):
            self._outcome = _PREDICTED
        self.changed.emit()

    def _on_error(self, error: Exception) -> None:
        ours = not isinstance(error, ConvLoRAError) or type(error).__name__ == "JobError"
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._outcome = f"It broke off: {text.rstrip('.')}. {_KEPT}" if ours else str(error)
        self.failed.emit(self._outcome, ours)

    def _on_end(self) -> None:
        if not self._outcome and self._stopping:
            predicting = self.phase == "predicting"
            self._outcome = _STOPPED if predicting else "Stopped; nothing has changed."
        if self._target is not None:
            showing.withdraw_prediction(self._target)
        self.phase, self._target = "idle", None
        self.said.emit(self._outcome)
        self._outcome = ""
        self.changed.emit()
