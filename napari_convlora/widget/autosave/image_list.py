"""The images of a project: those that are open, and going from one to another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from qtpy.QtCore import QObject, Signal

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.labels.classes import find_background
from napari_convlora.project import ImageEntry
from napari_convlora.widget.autosave.closed_images import closed_images_reader
from napari_convlora.widget.autosave.image_work import ImageWork, take_up
from napari_convlora.widget.autosave.saving import Autosave
from napari_convlora.widget.engine.workflow import ClosedImages, Workflow
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.new_layer import image_of


class ImageList(QObject):
    """The list of images, and which of them is worked on.

    Parameters
    ----------
    autosave, workflow
        Where their work is kept, and what runs on them.

    Attributes
    ----------
    named
        Whether the user has given the project a folder.

    Signals
    -------
    changed
        The list, or what is open, has changed.
    opened
        An image layer to work on from now on, and its channel axis.
    said, failed
        What has happened, or went wrong, in one sentence.
    """

    changed = Signal()
    opened = Signal(object, object)
    said = Signal(str)
    failed = Signal(str)

    def __init__(
        self, autosave: Autosave, workflow: Workflow, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._autosave, self._workflow, self._images = autosave, workflow, workflow.images
        self.named = False
        self._images.relabelled.connect(self._on_relabelled)
        workflow.elsewhere = self._elsewhere
        workflow.predicted.connect(self._on_predicted)

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """The images of the project."""
        return () if self._autosave.project is None else self._autosave.project.manifest.images

    @property
    def stored(self) -> list[ImageEntry]:
        """The images of the project that are not open."""
        here = {k.stem for k in self._autosave.works if k.record in self._images.records}
        return [entry for entry in self.entries if entry.stem not in here]

    @property
    def removed(self) -> set[str]:
        """Stems of images that the user took out of the viewer; none in a named project."""
        if self.named:
            return set()
        records = self._images.records
        return {
            k.stem for k in self._autosave.works if k.stem is not None and k.record not in records
        }

    @property
    def others(self) -> list[ImageEntry]:
        """The images but the current one from which a round may learn."""
        records = self._images.records
        silent = {
            k.stem for k in self._autosave.works if k.record in records and not k.record.teaching
        }
        silent |= {self.current, *self.removed}
        return [entry for entry in self.entries if entry.stem not in silent]

    @property
    def current(self) -> str | None:
        """Stem of the image that is worked on."""
        kept = self._autosave.find(self._images.current)
        return None if kept is None else kept.stem

    def add_files(self, paths: list[Path]) -> None:
        """Add image files to the list, in the background."""
        project = self._autosave.need_project()
        for path in paths:
            self._autosave.writer.put(partial(project.add_file, path))
        self._autosave.writer.put(self._autosave.wrote.emit)

    def locate(self, stem: str, path: Path) -> None:
        """Take note where an image is now, and open it."""
        self._autosave.need_project().locate(stem, path)
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
        self._autosave.settle()
        project, name = (
            self._autosave.need_project(),
            self._autosave.need_project().entry(stem).name,
        )
        if stem == self.current:  # the next one comes before this one goes; see `show_image`
            with contextlib.suppress(ConvLoRAError):
                self.step(-1 if stem == self.entries[-1].stem else 1)
        for kept in [k for k in self._autosave.works if k.stem == stem]:
            self.close_layers(kept)
        self._autosave.writer.flush()
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
        project = self._autosave.need_project()
        kept = next((k for k in self._autosave.works if k.stem == stem), None)
        self._autosave.settle()
        entry = project.entry(stem)
        painted, note = project.annotations(stem)
        regions, other_note = project.regions(stem)
        predicted = project.prediction(stem)
        before, layers = self._autosave.find(self._images.current), self._images.viewer.layers
        image = None if kept is None else kept.record.image
        if image not in layers:
            image = image_of(entry, entry.levels(project.folder))
        # Nothing can fail any more. The new image comes before the old one goes: where Mesa draws,
        # a canvas that lost all its layers at once has crashed.
        if image not in layers:
            layers.append(image)
        # What no file holds stays in the viewer, as nothing could bring it back.
        if before and before.stem and not project.entry(before.stem).homeless:
            self.close_layers(before)
        self.opened.emit(image, entry.channel_axis)
        again = take_up(self._autosave.works, self._images.need(), stem, self._autosave.touch)
        self._autosave.writer.put(partial(project.update, lambda m: replace(m, current=stem)))
        self._images.restore(painted, predicted, regions, entry.view)
        again.follow()
        older = (note and painted is not None) or (other_note and regions)
        if kept is None and not older and (painted is not None or entry.annotated):
            # An older version is written in place of what is lost; where there is none, nothing is.
            again.wrote(np.zeros(entry.shape[:3]) if painted is None else painted, regions)
        if note or other_note:
            self.failed.emit(note or other_note)
        self.changed.emit()

    def close_layers(self, kept: ImageWork) -> None:
        """Take the layers of an image out of the viewer, and have what is on them written."""
        self._workflow.release(kept.record)
        kept.close()
        if kept.dirty:  # corrections have become annotations meanwhile
            self._autosave.keep(kept)
        self._autosave.works.remove(kept)

    def _on_predicted(self, record: ImageLayers, labels: np.ndarray) -> None:
        kept = self._autosave.find(record)
        if kept is not None:
            self._autosave.keep_prediction(kept, labels)
            self._autosave.writer.put(self._autosave.wrote.emit)

    def _elsewhere(self) -> Callable[[], ClosedImages] | None:
        """Return what reads annotated images of the project that are not in the viewer."""
        kept, images = self._autosave, self._images
        if kept.project is None:
            return None
        kept.save()
        here = [work for work in kept.works if work.record in images.records]
        removed = [] if self.named else [work for work in kept.works if work not in here]
        channels, background = images.need().n_channels, find_background(images.classes)
        return closed_images_reader(kept.project, kept.writer, here, removed, channels, background)

    def _on_relabelled(self, class_id: int, to: int) -> None:
        for kept in self._autosave.works:  # strokes of images that were taken out of the viewer
            layer = kept.record.annotations
            if layer is not None and kept.record not in self._images.records:
                layer.data[layer.data == class_id] = to
        project, writer = self._autosave.project, self._autosave.writer
        if project is not None:
            for entry in self.stored:
                writer.put(partial(project.relabel, entry.stem, class_id, to))
            writer.put(self._autosave.wrote.emit)
