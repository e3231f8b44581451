"""Keeps what the user paints in a project on disk: a named one, or one set aside for recovery."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal

from napari_convlora.config import ClassInfo, ConvLoRAError, InputError
from napari_convlora.project import ImageEntry, Manifest, Project, RoundRecord, Settings, recovery
from napari_convlora.project.writer import Writer
from napari_convlora.rounds import Correction
from napari_convlora.widget.jobs import Recipe, Snapshot
from napari_convlora.widget.layers import ImageLayers
from napari_convlora.widget.workflow import Workflow

if TYPE_CHECKING:
    from napari.layers import Image

    from napari_convlora.events import Finished

AUTOSAVE_MS = 3000


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Pixels of a project's image that is not open; read by whoever makes an array of it."""

    entry: ImageEntry
    folder: Path

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """Return the pixels as a layer would hold them."""
        return np.asarray(self.entry.as_layer(self.entry.read(self.folder)), dtype)


class Kept:
    """What is known of an image's layers: where its work is kept, and whether some is not yet.

    Parameters
    ----------
    record
        The layers; they are remembered even when they leave the viewer.
    touched
        Called when something was painted.
    """

    def __init__(self, record: ImageLayers, touched: Callable[[], None]) -> None:
        self.record, self._touched = record, touched
        self.stem: str | None = None
        self.dirty = False
        self.written = b""
        self.follow()

    def follow(self) -> None:
        """Listen to the layers there are; connecting twice is connecting once."""
        for layer in (self.record.annotations, self.record.prediction):
            if layer is not None:
                for event in (layer.events.paint, layer.events.set_data):  # undo says set_data
                    event.connect(self.touch)

    def touch(self, event: Any = None) -> None:
        """Take note that something may have been painted."""
        self.dirty = True
        self._touched()


class Keeper(QObject):
    """The project behind a viewer.

    Parameters
    ----------
    workflow
        Whose images and rounds are kept.
    recipe
        Returns what the user has chosen.

    Attributes
    ----------
    project
        Where everything goes; None before there is anything.
    named
        Whether the user has given it a folder.
    records, curve
        The history, and by round number what later corrections say of it.

    Signals
    -------
    changed
        Images, rounds or the project itself have changed.
    opened
        An image layer to work on from now on, and its channel axis.
    loaded
        The `Manifest` of a project that was opened: its classes and settings are to be shown.
    said
        What has happened, in one sentence.
    failed
        What went wrong, in one sentence.
    """

    changed = Signal()
    opened = Signal(object, object)
    loaded = Signal(object)
    said = Signal(str)
    failed = Signal(str)
    _wrote = Signal()

    def __init__(
        self, workflow: Workflow, recipe: Callable[[], Recipe], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.project: Project | None = None
        self.named = False
        self.records: list[RoundRecord] = []
        self.curve: dict[int, Correction] = {}
        self._workflow, self._images, self._recipe = workflow, workflow.images, recipe
        self._writer = Writer()
        self._kept: list[Kept] = []
        self._round: int | None = None
        self._history: list[Any] = []
        self._closed = False
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.setInterval(AUTOSAVE_MS)
        self._soon.timeout.connect(self._autosave)
        self._wrote.connect(self._on_wrote)
        self._images.changed.connect(self._follow)
        self._images.leaving.connect(self._on_leaving)
        workflow.elsewhere = self._elsewhere
        workflow.started.connect(lambda *_: self._history.clear())
        workflow.stepped.connect(self._history.extend)
        workflow.scored.connect(self._history.append)
        workflow.learnt.connect(self._on_learnt)
        workflow.predicted.connect(self._on_predicted)

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """The images of the project."""
        return () if self.project is None else self.project.manifest.images

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The class table."""
        return self._images.classes

    @property
    def installed(self) -> int | None:
        """Number of the round that predicts."""
        return None if self.project is None else self.project.manifest.installed

    @property
    def current(self) -> str | None:
        """Stem of the image that is worked on."""
        kept = self._find(self._images.current)
        return None if kept is None else kept.stem

    def create(self, folder: Path) -> None:
        """Save everything so far as a project in a new or empty folder, and go on there.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written.
        """
        self.save()
        self._writer.flush()
        if self.project is None:
            self.project = Project.create(folder, self._manifest(Manifest()))
        else:
            before, self.project = self.project, self.project.save_as(folder)
            before.close()
            if not self.named:
                recovery.discard(before.folder)
        self.named = True
        self.said.emit(f"The project is in {folder}; it saves itself from now on.")
        self.changed.emit()

    def open(self, folder: Path, *, named: bool = True) -> None:
        """Close the project there is, if any, and open the one in `folder` where it was left.

        Raises
        ------
        InputError
            There is none, it cannot be read, or another process has it open.
        """
        if self._workflow.running:
            raise InputError("A round is running; press Stop first, then open the project.")
        project = Project.open(folder)
        self._leave_project()
        self.project, self.named = project, named
        self.records, self.curve = project.rounds(), {}
        self._workflow.earlier = max((r.number for r in self.records), default=0)
        self.loaded.emit(project.manifest)
        self._install_adapter(show=False)
        self.changed.emit()
        stems = [e.stem for e in project.manifest.images]
        if stems:
            current = project.manifest.current
            self.show_image(current if current in stems else stems[0])
        self._count_corrections()

    def save(self) -> None:
        """Hand everything that is not on disk yet to the writer; returns at once."""
        self._soon.stop()
        self._follow()
        for kept in self._kept:
            if kept.dirty:
                self._keep(kept)
        if self.project is not None:
            project, chosen = self.project, self._manifest(Manifest())

            def write() -> None:
                now = replace(chosen, current=self.current)  # known once its image is written
                project.update(lambda m: replace(now, images=m.images, installed=m.installed))

            self._writer.put(write)
            self._writer.put(self._wrote.emit)

    def close(self) -> None:
        """Write what is left and let go of the folder; unsaved work is kept for the next start."""
        if self._closed:
            return
        self._closed = True
        self._wrote.disconnect(self._on_wrote)
        self.save()
        self._soon.stop()
        self._writer.flush()
        self._release()

    def add_files(self, paths: list[Path]) -> None:
        """Add image files to the list, in the background."""
        project = self._need_project()
        for path in paths:
            self._writer.put(partial(project.add_file, path))
        self._writer.put(self._wrote.emit)

    def locate(self, stem: str, path: Path) -> None:
        """Take note where an image is now, and open it."""
        self._need_project().locate(stem, path)
        self.show_image(stem)

    def step(self, by: int) -> None:
        """Go to the image `by` places further down the list; the ends stay the ends."""
        stems = [e.stem for e in self.entries]
        if stems:
            at = stems.index(self.current) if self.current in stems else -1
            self.show_image(stems[min(max(at + by, 0), len(stems) - 1)])

    def show_image(self, stem: str) -> None:
        """Open an image of the list with its annotations and prediction; close the one before.

        Raises
        ------
        InputError
            The image or its annotations cannot be read; the image before stays open then.
        """
        if stem == self.current:
            return
        project = self._need_project()
        kept = next((k for k in self._kept if k.stem == stem), None)
        self.save()
        self._writer.flush()
        entry = project.entry(stem)
        painted, note = project.annotations(stem)
        predicted = project.prediction(stem)
        before = self._find(self._images.current)
        image = None if kept is None else kept.record.image
        if image not in self._images.viewer.layers:
            image, pixels = None, entry.as_layer(entry.read(project.folder))
        if before is not None and before.stem is not None:  # now that nothing can fail any more
            self._close_layers(before)
        if image is None:
            image = self._add_layer(entry, pixels)
        self.opened.emit(image, entry.channel_axis)
        record = self._images.need()
        again = self._find(record)
        if again is None:
            again = Kept(record, self._touch)
            self._kept.append(again)
        if kept is not None and kept is not again:
            # Its image was removed from the viewer; its strokes were not.
            record.annotations = record.annotations or kept.record.annotations
            self._kept.remove(kept)
        again.stem = stem
        self._images.restore(painted, predicted)
        again.follow()
        if note:
            self.failed.emit(note)
        self.changed.emit()

    def install(self, number: int) -> None:
        """Roll back or forward: let a round's adapter predict from now on."""
        project = self._need_project()
        if self._workflow.running:
            raise InputError("A round is running; wait for it or press Stop, then install.")
        self._writer.flush()
        project.install(number)
        self._install_adapter(show=True)
        self.changed.emit()

    def export_recipe(self, number: int, path: Path) -> None:
        """Write what repeats a round without the window."""
        self._writer.flush()
        self._need_project().export_recipe(number, path)
        self.said.emit(
            f"Repeat round {number} with: napari-convlora adapt --recipe {path.name} "
            "--out adapter.safetensors"
        )

    def _touch(self) -> None:
        if not self._soon.isActive() and not self._closed:
            self._soon.start()

    def _autosave(self) -> None:
        if self._writer.busy:
            self._soon.start()
        else:
            self.save()

    def _follow(self) -> None:
        for record in self._images.records:
            kept = self._find(record)
            if kept is None:
                kept = Kept(record, self._touch)
                self._kept.append(kept)
                kept.touch()  # it may have come with strokes on it
            kept.follow()

    def _find(self, record: ImageLayers | None) -> Kept | None:
        return next((k for k in self._kept if k.record is record), None)

    def _on_leaving(self, record: ImageLayers | None, why: str) -> None:
        kept = self._find(record)
        if kept is not None and kept.dirty:
            self._keep(kept)

    def _keep(self, kept: Kept) -> None:
        """Copy what is painted now and have it written if it differs from what was written."""
        kept.dirty = False
        try:
            painted = kept.record.work()
            if painted is None or (kept.stem is None and not painted.any()):
                return
            project, entry = self._need_project(), _entry(kept.record)
        except ConvLoRAError as error:
            kept.dirty = True
            self.failed.emit(str(error))
            return
        snapshot = Snapshot(
            entry.name,
            kept.record.pixels,
            kept.record.image.rgb,
            kept.record.channel_axis,
            painted,
        )

        def write() -> None:
            digest = hashlib.blake2b(np.ascontiguousarray(painted).data).digest()
            if digest == kept.written:
                return
            try:
                if kept.stem is None:
                    kept.stem = project.add(entry, snapshot.planes()).stem
                project.keep_annotations(kept.stem, painted)
            except BaseException:
                kept.dirty = True
                raise
            kept.written = digest

        self._writer.put(write)

    def _need_project(self) -> Project:
        """Return the project; one is set aside if the user has none."""
        if self.project is None:
            self.project = recovery.begin(self._manifest(Manifest()))
        return self.project

    def _manifest(self, base: Manifest) -> Manifest:
        chosen = self._recipe()
        settings = Settings(chosen.backbone, chosen.model, chosen.train)
        return replace(base, classes=self._images.classes, settings=settings)

    def _on_wrote(self) -> None:
        while self._writer.failures:
            self.failed.emit(self._writer.failures.popleft())
            self._touch()  # the disk may have room again
        if self.project is not None:
            self.records = self.project.rounds()
        self.changed.emit()

    def _on_learnt(self, message: Finished, snapshots: list[Snapshot]) -> None:
        self.save()
        project = self._need_project()
        chosen = self._manifest(Manifest()).settings
        history = list(self._history)
        by_name = {k.record.image.name: k for k in self._kept}

        def write() -> None:
            stems = {e.name: e.stem for e in project.manifest.images}
            labels = {}
            for snapshot in snapshots:
                kept = by_name.get(snapshot.name)
                stem = stems.get(snapshot.name) if kept is None else kept.stem
                if stem is not None and snapshot.annotations.any():
                    labels[stem] = snapshot.annotations
            record = project.add_round(message.adapter, labels, chosen, history)
            self._round = record.number if record.better else None

        self._writer.put(write)
        self._count_corrections()

    def _on_predicted(self, record: ImageLayers, labels: np.ndarray) -> None:
        kept, project = self._find(record), self.project
        if kept is None or project is None:
            return

        def write() -> None:
            if kept.stem is not None:
                project.keep_prediction(kept.stem, labels)
                if self._round is not None:
                    project.keep_round_prediction(self._round, kept.stem, labels)

        self._writer.put(write)
        self._writer.put(self._wrote.emit)

    def _count_corrections(self) -> None:
        project = self._need_project()

        def count() -> None:
            self.curve = {r.number: project.corrections(r.number) for r in project.rounds()}

        self._writer.put(count)
        self._writer.put(self._wrote.emit)

    def _elsewhere(self) -> list[Snapshot]:
        """Annotated images of the project that are not in the viewer, as many channels."""
        if self.project is None:
            return []
        self.save()
        self._writer.flush()
        current = self._images.need()
        here = {k.stem for k in self._kept if k.record in self._images.records}
        found = []
        for entry in self.entries:
            if entry.counts and entry.stem not in here and entry.shape[3] == current.n_channels:
                painted, _ = self.project.annotations(entry.stem)
                assert painted is not None
                pixels = OnDisk(entry, self.project.folder)
                found.append(Snapshot(entry.name, pixels, entry.rgb, entry.channel_axis, painted))
        return found

    def _add_layer(self, entry: ImageEntry, pixels: np.ndarray) -> Image:
        place = {n: getattr(entry, n) for n in ("scale", "translate") if getattr(entry, n)}
        return self._images.viewer.add_image(pixels, name=entry.name, rgb=entry.rgb, **place)

    def _close_layers(self, kept: Kept) -> None:
        record, layers = kept.record, self._images.viewer.layers
        for layer in (record.prediction, record.annotations, record.image):
            if layer is not None and layer in layers:
                layers.remove(layer)
        if kept.dirty:  # corrections have become annotations meanwhile
            self._keep(kept)
        self._kept.remove(kept)

    def _leave_project(self) -> None:
        self.save()
        if self.named:
            for kept in [k for k in self._kept if k.stem is not None]:
                self._close_layers(kept)
        self._writer.flush()
        self._kept.clear()
        self._release()
        self.project = None
        self._round = None

    def _release(self) -> None:
        if self.project is not None:
            self.project.close()
            if not self.named and not any(e.counts for e in self.entries):
                recovery.discard(self.project.folder)

    def _install_adapter(self, *, show: bool) -> None:
        project, number = self._need_project(), self.installed
        if number is not None:
            labels = [(entry.name, array) for entry, array in project.round_labels(number)]
            path = project.round_folder(number) / "adapter.safetensors"
            self._workflow.load_adapter(path, self._recipe(), labels, show=show)


def _entry(record: ImageLayers) -> ImageEntry:
    image = record.image
    return ImageEntry(
        stem="",
        name=image.name,
        path="",
        absolute=str(image.source.path or ""),
        shape=(*record.planes_shape, record.n_channels),
        layer_shape=tuple(record.pixels.shape),
        rgb=image.rgb,
        channel_axis=record.channel_axis,
        dtype=str(record.pixels.dtype),
        scale=tuple(map(float, image.scale)),
        translate=tuple(map(float, image.translate)),
    )
