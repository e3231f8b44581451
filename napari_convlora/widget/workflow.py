"""The loop on a viewer: what the panel's buttons do, and what comes back from the thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.layers import Image, Labels
from qtpy.QtCore import QObject, Signal

from napari_convlora import events
from napari_convlora.config import ClassInfo, ConvLoRAError, InputError
from napari_convlora.widget import jobs
from napari_convlora.widget.class_colours import known_classes
from napari_convlora.widget.counting import PixelCounter
from napari_convlora.widget.layers import ImageLayers
from napari_convlora.widget.worker import Runner

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.session import Session

_HOW = {
    "stopped": "was stopped",
    "time": "used up its time",
    "plateau": "had no more to gain and is done",
}
_LOADED = "The adapter is loaded; press Predict to use it on an image."
_PREDICTED = (
    "The prediction is ready. Correct mistakes by painting on it, then press Adapt; or export."
)

Phase = Literal["idle", "starting", "training", "predicting"]


class Workflow(QObject):
    """Images, their layers, and the one job that may run.

    Signals
    -------
    changed
        Anything the panel shows may have changed: phase, layers, installed adapter.
    said
        What has just happened, or what went well, in one sentence.
    failed
        What went wrong, in one sentence, and whether it is our fault rather than the input's.
    counted
        Painted pixels of the current image per class id.
    found
        Classes that a layer or an adapter brings along.
    started, stepped, scored, tiled
        Progress: (total steps, held out), list of `Step`, `Scored`, `Tiles`.
    ready
        Titles of the backbones on this computer, by name.
    """

    changed = Signal()
    said = Signal(str)
    failed = Signal(str, bool)
    counted = Signal(dict)
    found = Signal(object)
    started = Signal(int, bool)
    stepped = Signal(list)
    scored = Signal(object)
    tiled = Signal(object)
    ready = Signal(dict)

    def __init__(
        self, viewer: Viewer, session: Session | None = None, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.viewer = viewer
        self.classes: tuple[ClassInfo, ...] = ()
        self.current: ImageLayers | None = None
        self.phase: Phase = "idle"
        self.counts: dict[int, int] = {}
        self._records: dict[tuple[Image, int | None], ImageLayers] = {}
        self._target: ImageLayers | None = None
        self._outcome = ""
        self._score = ""
        self.runner = Runner(session)
        self.runner.on_messages = self._on_messages
        self.runner.on_error = self._on_error
        self.runner.on_end = self._on_end
        self.counter = PixelCounter(self._pieces, self)
        self.counter.counted.connect(self._on_counted)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        viewer.dims.events.current_step.connect(self._on_plane)
        self.runner.warm_up()

    @property
    def running(self) -> bool:
        """Whether a job runs."""
        return self.runner.busy

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
        self.counter.stop()
        self.viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self.viewer.dims.events.current_step.disconnect(self._on_plane)
        for record in self._records.values():
            with contextlib.suppress(ConvLoRAError):
                record.collect_corrections()  # or the next session would take them for its own
        return self.runner.close()

    def set_image(self, image: Image | None, channel_axis: int | None = None) -> None:
        """Work on `image` from now on; the layers of other images stay as they are."""
        record = None
        if image is not None:
            key = (image, None if image.rgb else channel_axis)
            if key not in self._records:
                self._records[key] = ImageLayers(self.viewer, image, self.classes, key[1])
            record = self._records[key]
        if record is self.current:
            return
        if self.running and self._target is not None:
            self._abandon("Stopped because another image was chosen; what was learnt is kept.")
        self.current = record
        self.look_for_layers()
        self.counter.touch()
        self.changed.emit()

    def look_for_layers(self) -> None:
        """Take up layers of the current image that the sample data or a reader brought."""
        record = self.current
        if record is not None and record.find_layers():
            for layer in (record.annotations, record.prediction):
                self._learn_classes(layer)
            record.show_classes(self.classes)
            self._listen(record)
            self.counter.touch()

    def set_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Show `classes` in every layer of ours."""
        self.classes = tuple(classes)
        for record in self._records.values():
            record.show_classes(self.classes)

    def select_class(self, class_id: int) -> None:
        """Paint with this class from now on."""
        if self.current is not None:
            for layer in (self.current.annotations, self.current.prediction):
                if layer is not None:
                    layer.selected_label = class_id

    def start_annotating(self, class_id: int = 1) -> Labels:
        """Create the annotations layer, or bring it back, and take up the brush."""
        record = self._need_image()
        layer = record.annotate()
        self._listen(record)
        layer.selected_label = class_id
        layer.brush_size = max(3, round(min(record.planes_shape[1:]) / 60))
        layer.mode = "paint"
        self.viewer.layers.selection.active = layer
        self.counter.touch()
        self.changed.emit()
        return layer

    def use_annotations(self, layer: Labels) -> None:
        """Take the user's own Labels layer for annotations of the current image."""
        record = self._need_image()
        if layer is record.annotations:
            return
        if self.running and self._target is record:
            self._abandon("Stopped because other annotations were chosen; what was learnt is kept.")
        self._learn_classes(layer)
        record.adopt(layer)
        self._listen(record)
        self.counter.touch()
        self.changed.emit()

    def erase_class(self, class_id: int) -> int:
        """Erase a class from every image; Ctrl-Z on the annotations brings its strokes back."""
        count = sum(record.erase(class_id) for record in self._records.values())
        self.counter.touch()
        return count

    def adapt(self, recipe: jobs.Recipe) -> None:
        """Start a round on everything painted so far."""
        record = self._need_image()
        others = [
            other
            for other in self._records.values()
            if other is not record and other.annotating and other.n_channels == record.n_channels
        ]
        snapshots = [record.snapshot()]
        snapshots += [s for s in (o.snapshot() for o in others) if s.annotations.any()]
        self._start(jobs.adapt(snapshots, self.classes, recipe), record, "Loading the backbone…")

    def predict(self, recipe: jobs.Recipe) -> None:
        """Predict the current image with the installed adapter."""
        record = self._need_image()
        if not self.has_adapter:
            raise InputError("There is no adapter yet; press Adapt or load an adapter first.")
        self._start(jobs.predict(record.snapshot(), recipe), record, "Predicting…")

    def load_adapter(self, path: Path, recipe: jobs.Recipe) -> None:
        """Install the adapter in a file, and predict the current image if there is one."""
        snapshot = None if self.current is None else self.current.snapshot()
        self._start(jobs.load(path, snapshot, recipe), self.current, f"Loading {path.name}…")

    def stop(self) -> None:
        """End training and keep what was learnt, or cancel a prediction."""
        controls = self.runner.controls
        if self.running and controls is not None:
            if self.phase == "predicting" or controls.training.stopping:
                controls.predicting.stop()
            controls.training.stop()
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
        from napari_convlora.export import save_masks

        save_masks(self._need_image().predicted_labels(), path, self.classes)
        self.said.emit(f"Masks written to {path.name}, class names to classes.json beside it.")

    def export_adapter(self, path: Path) -> None:
        """Write the installed adapter."""
        session = self.runner.session
        if session is None or session.installed is None:
            raise InputError("There is no adapter yet; press Adapt first.")
        session.installed.save(path)
        self.said.emit(f"Adapter written to {path.name}; it predicts other images too.")

    def _need_image(self) -> ImageLayers:
        if self.current is None:
            raise InputError("No image is chosen; open one, for example from File > Open Sample.")
        return self.current

    def _start(self, job: jobs.Job, target: ImageLayers | None, what: str) -> None:
        self.runner.start(job)
        self._target, self._outcome, self._score = target, "", ""
        self.phase = "starting"
        self._on_plane()
        self.said.emit(what)
        self.changed.emit()

    def _abandon(self, why: str) -> None:
        self.runner.stop()
        self._target, self._outcome = None, why
        self.said.emit(why)

    def _learn_classes(self, layer: Labels | None) -> None:
        if layer is not None:
            meta = {n: getattr(layer, n) for n in ("metadata", "features", "colormap")}
            self.found.emit(known_classes(meta))

    def _listen(self, record: ImageLayers) -> None:
        layer = record.annotations
        if layer is not None:  # connecting twice is connecting once
            for event in (layer.events.paint, layer.events.set_data, layer.events.data):
                event.connect(self.counter.touch)

    def _pieces(self) -> Iterator[np.ndarray]:
        return iter(()) if self.current is None else self.current.count()

    def _on_counted(self, counts: dict[int, int]) -> None:
        self.counts = counts
        self.counted.emit(counts)
        self.changed.emit()

    def _on_plane(self, event: Any = None) -> None:
        controls = self.runner.controls
        if self.running and self._target is not None and controls is not None:
            controls.training.visible = (0, self._target.plane())

    def _on_layer_removed(self, event: Any) -> None:
        layer = event.value
        for key, record in list(self._records.items()):
            if layer not in (record.image, record.annotations, record.prediction):
                continue
            if self.running and record is self._target:
                self._abandon(f"Stopped because '{layer.name}' was removed; nothing else is lost.")
            record.let_go(layer)
            if layer is record.image:
                del self._records[key]
                if record is self.current:
                    self.current = None
        self.counter.touch()
        self.changed.emit()

    def _on_messages(self, messages: list[Any]) -> None:
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
                self.started.emit(message.total_steps, message.held_out)
                self.said.emit(f"Training on {message.device}: {self._learning_from(message)}.")
                self.changed.emit()
            case events.Scored():
                where = "held-out" if message.held_out else "training"
                self._score = f" with a score of {message.score:.2f} on {where} labels"
                self.scored.emit(message)
            case events.Paused():
                self.said.emit(f"Paused after step {message.step}; press Resume to go on.")
            case events.Preview() if self._target is not None:
                shown = self._target.show(message.labels, message.plane)
                if shown and message.stage == "detail":
                    self.said.emit("A first preview, from local filters; now SAM is adapted.")
                self.changed.emit()
            case events.Finished():
                self._finish(message)
            case events.Failed():
                self._outcome = message.message
                self.failed.emit(message.message, False)
            case jobs.Loaded():
                self.found.emit(message.adapter.classes)
                self._outcome = _LOADED
            case jobs.Tiles():
                if self.phase != "predicting":
                    self.phase = "predicting"
                    self.changed.emit()
                self.tiled.emit(message)
            case jobs.Predicted():
                self._install(message.labels)

    def _learning_from(self, message: events.Started) -> str:
        names = {info.id: info.name for info in self.classes}
        used = [names.get(i, str(i)) for i, n in message.pixels.items() if n]
        return f"{sum(message.pixels.values()):,} painted pixels of {', '.join(used)}"

    def _finish(self, message: events.Finished) -> None:
        session = self.runner.session
        if self._outcome:  # it was broken off, and why is known
            return
        if not message.adapter.summary["steps"]:
            self._outcome = "Stopped before the first step; nothing has changed."
            return
        number = len(session.rounds) if session is not None else 1
        how = _HOW.get(message.reason, "is done")
        self._outcome = (
            f"Round {number} {how}{self._score}. Correct mistakes by painting on 'prediction', "
            "then press Adapt again; or export."
        )

    def _install(self, labels: np.ndarray | None) -> None:
        if labels is None:
            self._outcome = self._outcome or "The prediction was cancelled; the adapter is kept."
        elif self._target is not None:
            self._target.show(labels)
            if self._outcome in ("", _LOADED):
                self._outcome = _PREDICTED
            self.changed.emit()

    def _on_error(self, error: Exception) -> None:
        ours = not isinstance(error, ConvLoRAError) or type(error).__name__ == "JobError"
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._outcome = f"It broke off: {text}" if ours else str(error)
        self.failed.emit(self._outcome, ours)

    def _on_end(self) -> None:
        self.phase, self._target = "idle", None
        self.said.emit(self._outcome)
        self._outcome = ""
        self.changed.emit()
