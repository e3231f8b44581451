"""Keeps what the user paints in a project on disk: a named one, or one set aside for recovery."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal

from napari_convlora.config import ClassInfo, listed
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.labels.classes import find_background
from napari_convlora.project import (
    ImageEntry,
    Manifest,
    Project,
    Settings,
    recovery,
)
from napari_convlora.project.background_writer import Writer
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.widget.autosave.closed_images import closed_images_reader
from napari_convlora.widget.autosave.image_work import (
    ImageWork,
    follow,
    place_job,
    take_up,
    view_job,
)
from napari_convlora.widget.engine.workflow import ClosedImages, Workflow
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.new_layer import image_of

logger = logging.getLogger(__name__)
AUTOSAVE_MS = 3000
_REST = 30
"""Autosaves are at least this many times as far apart as copying the layers takes."""


class ProjectKeeper(QObject):
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
    automatic
        Returns whether rounds begin by themselves.
    closed
        Whether everything is written and the folder is let go of.
    writer
        Writes in the background, in order.

    Signals
    -------
    changed
        Images, rounds or the project itself have changed.
    opened
        An image layer to work on from now on, and its channel axis.
    loaded
        The `Manifest` of a project that was opened: its classes and settings are to be shown.
    wrote
        The writer has come this far; may be emitted from its thread.
    switched
        Another project is open.
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
    wrote = Signal()
    switched = Signal()

    def __init__(
        self, workflow: Workflow, recipe: Callable[[], RoundSettings], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.project: Project | None = None
        self.named = False
        self.automatic: Callable[[], bool] = lambda: False
        self._workflow, self._images, self._recipe = workflow, workflow.images, recipe
        self.writer = Writer()
        self._kept: list[ImageWork] = []
        self.closed = False
        self._said: set[str] = set()
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.setInterval(AUTOSAVE_MS)
        self._soon.timeout.connect(self._autosave)
        self.wrote.connect(self._on_wrote)
        self._images.changed.connect(self._follow)
        self._images.leaving.connect(self._on_leaving)
        self._images.relabelled.connect(self._on_relabelled)
        workflow.elsewhere = self._elsewhere
        workflow.predicted.connect(self._on_predicted)

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """The images of the project."""
        return () if self.project is None else self.project.manifest.images

    @property
    def stored(self) -> list[ImageEntry]:
        """The images of the project that are not open."""
        here = {k.stem for k in self._kept if k.record in self._images.records}
        return [entry for entry in self.entries if entry.stem not in here]

    @property
    def removed(self) -> set[str]:
        """Stems of images that the user took out of the viewer; none in a named project."""
        if self.named:
            return set()
        records = self._images.records
        return {k.stem for k in self._kept if k.stem is not None and k.record not in records}

    @property
    def others(self) -> list[ImageEntry]:
        """The images but the current one from which a round may learn."""
        records = self._images.records
        silent = {k.stem for k in self._kept if k.record in records and not k.record.teaching}
        silent |= {self.current, *self.removed}
        return [entry for entry in self.entries if entry.stem not in silent]

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The class table."""
        return self._images.classes

    @property
    def current(self) -> str | None:
        """Stem of the image that is worked on."""
        kept = self.find(self._images.current)
        return None if kept is None else kept.stem

    @property
    def layers(self) -> dict[tuple[str, int | None], ImageWork]:
        """The images that were opened, by the name and the channel axis of their layer."""
        return {(k.record.image.name, k.record.channel_axis): k for k in self._kept}

    def create(self, folder: Path) -> None:
        """Save everything so far as a project in a new or empty folder, and go on there.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written.
        """
        self._settle(rounds=True)
        removed = self.removed
        gone = [f"'{entry.name}'" for entry in self.entries if entry.stem in removed]
        if self.project is None:
            self.project = Project.create(folder, self._manifest())
        else:
            before, self.project = self.project, self.project.save_as(folder)
            before.close()
            if not self.named:
                recovery.discard(before.folder)
        self.named = True
        sentence = f"The project is in {folder}; it saves itself from now on."
        if gone:
            sentence += f" Also on its list, but taken out of the viewer: {listed(gone)}."
        self.said.emit(sentence)
        for entry in self.entries:
            if entry.homeless:
                self.failed.emit(entry.homeless)
        self.changed.emit()

    def open(self, folder: Path, *, named: bool = True, anyway: bool = False) -> None:
        """Close the project there is, if any, and open the one in `folder` where it was left.

        Raises
        ------
        LockedError
            It is open elsewhere, and not to be opened `anyway`.
        InputError
            There is none, or it cannot be read.
        """
        if self._workflow.running:
            raise InputError("A round is running; press Stop first, then open the project.")
        if self.project is not None and self.project.folder.resolve() == Path(folder).resolve():
            self.said.emit("This project is open already; it saves itself.")
            return
        self._settle(rounds=True)
        project = Project.open(folder, anyway=anyway)
        self._leave_project()
        self.project, self.named = project, named
        self._images.merged.clear()
        self._images.merged.update(project.manifest.merged)
        self.loaded.emit(project.manifest)
        self.changed.emit()
        stems = [e.stem for e in project.manifest.images]
        if stems:
            current = project.manifest.current
            try:
                self.show_image(current if current in stems else stems[0])
            except ConvLoRAError as error:  # the list shows the others
                self.failed.emit(str(error))
        self.switched.emit()

    def save(self) -> None:
        """Hand everything that is not on disk yet to the writer; returns at once."""
        self._soon.stop()
        self._follow()
        begun = time.monotonic()
        for kept in self._kept:
            if kept.dirty:
                self._keep(kept)
            left = kept.record.left
            if left is not None:  # what was rejected stays so until the next prediction
                self._keep_prediction(kept, left)
        self._soon.setInterval(max(AUTOSAVE_MS, round(_REST * 1000 * (time.monotonic() - begun))))
        self.writer.retry()
        if self.project is not None:
            project, chosen = self.project, self._manifest()
            shown = self.find(self._images.current)
            home = None if shown is None else shown.home

            def as_chosen(m: Manifest) -> Manifest:
                # An image is known once it is written, and no longer in a viewer that closes.
                current = (None if home is None else home.stem) or m.current
                own = {name: getattr(m, name) for name in ("images", "installed", "removed")}
                return replace(chosen, **own, current=current)

            self.writer.put(partial(project.update, as_chosen))
            self.writer.put(view_job(shown, project))
            for kept in self._kept:
                self.writer.put(place_job(kept, project))
            self.writer.put(self.wrote.emit)

    def close(self) -> None:
        """Write what is left and let go of the folder; unsaved work is kept for the next start."""
        if self.closed:
            return
        self.wrote.disconnect(self._on_wrote)
        self.writer.last_try.set()
        self.save()
        self._soon.stop()
        self.writer.flush()
        self.writer.retry()  # what found no room before it was known that this is the last try
        self.writer.flush()
        for sentence in self.writer.failures:  # there is no window any more to say it in
            logger.warning(sentence)
        self._release()
        self.closed = True

    def enlist(self, kept: ImageWork | None) -> None:
        """Put an image that was learnt from on the list, even if nothing was painted on it."""
        if kept is not None and kept.stem is None:
            self._keep(kept, blank=True)

    def add_files(self, paths: list[Path]) -> None:
        """Add image files to the list, in the background."""
        project = self.need_project()
        for path in paths:
            self.writer.put(partial(project.add_file, path))
        self.writer.put(self.wrote.emit)

    def locate(self, stem: str, path: Path) -> None:
        """Take note where an image is now, and open it."""
        self.need_project().locate(stem, path)
        self.show_image(stem)

    def remove(self, stem: str) -> None:
        """Take an image with its strokes off the list, and its layers out of the viewer.

        Raises
        ------
        InputError
            A round is running, or something cannot be written.
        """
        if self._workflow.running:
            raise InputError("A round is running; press Stop first, then remove the image.")
        self._settle()
        project, name = self.need_project(), self.need_project().entry(stem).name
        if stem == self.current:  # the next one comes before this one goes; see `show_image`
            with contextlib.suppress(ConvLoRAError):
                self.step(-1 if stem == self.entries[-1].stem else 1)
        for kept in [k for k in self._kept if k.stem == stem]:
            self._close_layers(kept)
        self.writer.flush()
        project.remove(stem)
        self.said.emit(f"'{name}' is off the list; rounds that learnt from it stay.")
        self.changed.emit()

    def neighbour(self, by: int) -> ImageEntry | None:
        """Return the image `by` places further down the list, if there is any; the ends stay."""
        stems = [e.stem for e in self.entries]
        at = stems.index(self.current) if self.current in stems else -1
        return self.entries[min(max(at + by, 0), len(stems) - 1)] if stems else None

    def step(self, by: int) -> None:
        """Go to the image `by` places further down the list."""
        entry = self.neighbour(by)
        if entry is not None:
            self.show_image(entry.stem)

    def show_image(self, stem: str) -> None:
        """Open an image of the list with its annotations and prediction; close the one before.

        Raises
        ------
        InputError
            The image or its annotations cannot be read; the image before stays open then.
        """
        if stem == self.current:
            return
        project = self.need_project()
        kept = next((k for k in self._kept if k.stem == stem), None)
        self._settle()
        entry = project.entry(stem)
        painted, note = project.annotations(stem)
        regions, other_note = project.regions(stem)
        predicted = project.prediction(stem)
        before, layers = self.find(self._images.current), self._images.viewer.layers
        image = None if kept is None else kept.record.image
        if image not in layers:
            image = image_of(entry, entry.levels(project.folder))
        # Nothing can fail any more. The new image comes before the old one goes: where Mesa draws,
        # a canvas that lost all its layers at once has crashed.
        if image not in layers:
            layers.append(image)
        # What no file holds stays in the viewer, as nothing could bring it back.
        if before and before.stem and not project.entry(before.stem).homeless:
            self._close_layers(before)
        self.opened.emit(image, entry.channel_axis)
        again = take_up(self._kept, self._images.need(), stem, self.touch)
        self.writer.put(partial(project.update, lambda m: replace(m, current=stem)))
        self._images.restore(painted, predicted, regions, entry.view)
        again.follow()
        older = (note and painted is not None) or (other_note and regions)
        if kept is None and not older and (painted is not None or entry.annotated):
            # An older version is written in place of what is lost; where there is none, nothing is.
            again.wrote(np.zeros(entry.shape[:3]) if painted is None else painted, regions)
        if note or other_note:
            self.failed.emit(note or other_note)
        self.changed.emit()

    def touch(self, *_: object) -> None:
        """Save within seconds, as something has changed."""
        if not self.closed and not self._soon.isActive():
            self._soon.start()

    def _autosave(self) -> None:
        if self.writer.busy:
            self._soon.start()
        else:
            self.save()

    def _follow(self) -> None:
        follow(self._kept, self._images.records, self.touch)

    def find(self, record: ImageLayers | None) -> ImageWork | None:
        """Return what is known of an image's work."""
        return next((k for k in self._kept if k.record is record), None)

    def _on_leaving(self, record: ImageLayers | None, why: str) -> None:
        kept = self.find(record)
        if kept is not None and kept.dirty:
            self._keep(kept)

    def _keep(self, kept: ImageWork, *, blank: bool = False) -> None:
        """Have what is painted now written."""
        try:
            job = kept.job(self.need_project, blank=blank)
        except ConvLoRAError as error:
            self.failed.emit(str(error))
            return
        if job is not None:
            self.writer.put(job)

    def need_project(self) -> Project:
        """Return the project; one is set aside if the user has none."""
        if self.project is None:
            self.project = recovery.begin(self._manifest())
        return self.project

    def _manifest(self) -> Manifest:
        """Return classes and settings as they are chosen now."""
        chosen = self._recipe()
        settings = Settings(chosen.backbone, chosen.model, chosen.train)
        merged = dict(self._images.merged)
        return Manifest(self._images.classes, settings, automatic=self.automatic(), merged=merged)

    def _on_wrote(self) -> None:
        if not (self.writer.failures or self.writer.waiting or any(k.dirty for k in self._kept)):
            self._said.clear()
        while self.writer.failures:
            sentence = self.writer.failures.popleft()
            if sentence not in self._said:  # a full disk is not news at every try
                self.failed.emit(sentence)
            self._said.add(sentence)
            self.touch()  # the disk may have room again
        self.changed.emit()

    def _on_predicted(self, record: ImageLayers, labels: np.ndarray) -> None:
        kept = self.find(record)
        if kept is not None:
            self._keep_prediction(kept, labels)
            self.writer.put(self.wrote.emit)

    def _keep_prediction(self, kept: ImageWork, labels: np.ndarray) -> None:
        project, home = self.project, kept.home

        def write() -> None:
            if project is not None and home.stem is not None:
                project.keep_prediction(home.stem, labels)

        self.writer.put(write)

    def _elsewhere(self) -> Callable[[], ClosedImages] | None:
        """Return what reads annotated images of the project that are not in the viewer."""
        if self.project is None:
            return None
        self.save()
        here = [k for k in self._kept if k.record in self._images.records]
        removed = [] if self.named else [k for k in self._kept if k not in here]
        n_channels, background = self._images.need().n_channels, find_background(self.classes)
        return closed_images_reader(
            self.project, self.writer, here, removed, n_channels, background
        )

    def _on_relabelled(self, class_id: int, to: int) -> None:
        for kept in self._kept:  # strokes of images that were taken out of the viewer
            layer = kept.record.annotations
            if layer is not None and kept.record not in self._images.records:
                layer.data[layer.data == class_id] = to
        if self.project is not None:
            for entry in self.stored:
                self.writer.put(partial(self.project.relabel, entry.stem, class_id, to))
            self.writer.put(self.wrote.emit)

    def _close_layers(self, kept: ImageWork) -> None:
        self._workflow.release(kept.record)
        kept.close()
        if kept.dirty:  # corrections have become annotations meanwhile
            self._keep(kept)
        self._kept.remove(kept)

    def _settle(self, *, rounds: bool = False) -> None:
        """Wait until everything is on disk, as layers, or the project, are to be closed."""
        self.save()
        self.writer.flush()
        if rounds and self.writer.waiting:
            raise InputError(
                "The last round could not be written and is in memory only; free some space and "
                "try again, or press Export adapter to keep it elsewhere."
            )
        if any(kept.dirty for kept in self._kept):
            raise InputError(
                self.writer.failures.popleft()
                if self.writer.failures
                else "What is painted could not be saved; mend the layer named above first."
            )

    def _leave_project(self) -> None:
        for kept in [k for k in self._kept if k.stem is not None]:
            self._close_layers(kept)
        self.writer.flush()
        if not self.named and any(e.annotated for e in self.entries):
            self.said.emit("What was painted before is kept aside, and offered at the next start.")
        self._kept.clear()
        self._release()
        self.project = None

    def _release(self) -> None:
        if self.project is not None:
            self.project.close()
            if not self.named and not any(e.annotated for e in self.entries):
                recovery.discard(self.project.folder)
