"""Has what the user paints written, within seconds, in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.project import Manifest, Project, recovery
from napari_convlora.project.background_writer import Writer
from napari_convlora.widget.autosave.image_work import ImageWork, follow, place_job, view_job
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.open_images import OpenImages

logger = logging.getLogger(__name__)
AUTOSAVE_MS = 3000
_REST = 30
"""Autosaves are at least this many times as far apart as copying the layers takes."""


class Autosave(QObject):
    """The project that work goes to, and what of it is not there yet.

    Parameters
    ----------
    images
        Whose layers are saved.
    manifest
        Returns classes and settings as they are chosen now.

    Attributes
    ----------
    project
        Where everything goes; None before there is anything.
    works
        What is known of the images that were opened.
    writer
        Writes in the background, in order.
    closed
        Whether nothing more is saved.

    Signals
    -------
    changed
        The project has changed.
    failed
        What went wrong, in one sentence.
    wrote
        The writer has come this far; may be emitted from its thread.
    """

    changed = Signal()
    failed = Signal(str)
    wrote = Signal()

    def __init__(
        self, images: OpenImages, manifest: Callable[[], Manifest], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._images, self._manifest = images, manifest
        self.project: Project | None = None
        self.works: list[ImageWork] = []
        self.writer = Writer()
        self.closed = False
        self._said: set[str] = set()
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.setInterval(AUTOSAVE_MS)
        self._soon.timeout.connect(self._autosave)
        self.wrote.connect(self._on_wrote)
        images.changed.connect(self._follow)
        images.leaving.connect(self._on_leaving)

    @property
    def layers(self) -> dict[tuple[str, int | None], ImageWork]:
        """The images that were opened, by the name and the channel axis of their layer."""
        return {(k.record.image.name, k.record.channel_axis): k for k in self.works}

    def find(self, record: ImageLayers | None) -> ImageWork | None:
        """Return what is known of an image's work."""
        return next((k for k in self.works if k.record is record), None)

    def save(self) -> None:
        """Hand everything that is not on disk yet to the writer; returns at once."""
        self._soon.stop()
        self._follow()
        begun = time.monotonic()
        for kept in self.works:
            if kept.dirty:
                self.keep(kept)
            left = kept.record.left
            if left is not None:  # what was rejected stays so until the next prediction
                self.keep_prediction(kept, left)
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
            for kept in self.works:
                self.writer.put(place_job(kept, project))
            self.writer.put(self.wrote.emit)

    def touch(self, *_: object) -> None:
        """Save within seconds, as something has changed."""
        if not self.closed and not self._soon.isActive():
            self._soon.start()

    def settle(self, *, rounds: bool = False) -> None:
        """Wait until everything is on disk, as layers, or the project, are to be closed."""
        self.save()
        self.writer.flush()
        if rounds and self.writer.waiting:
            raise InputError(
                "The last round could not be written and is in memory only; free some space and "
                "try again, or press Export adapter to keep it elsewhere."
            )
        if any(kept.dirty for kept in self.works):
            raise InputError(
                self.writer.failures.popleft()
                if self.writer.failures
                else "What is painted could not be saved; mend the layer named above first."
            )

    def close(self) -> None:
        """Write what is left, as there will be no later try."""
        self.wrote.disconnect(self._on_wrote)
        self.writer.last_try.set()
        self.save()
        self._soon.stop()
        self.writer.flush()
        self.writer.retry()  # what found no room before it was known that this is the last try
        self.writer.flush()
        for sentence in self.writer.failures:  # there is no window any more to say it in
            logger.warning(sentence)
        self.closed = True

    def enlist(self, kept: ImageWork | None) -> None:
        """Put an image that was learnt from on the list, even if nothing was painted on it."""
        if kept is not None and kept.stem is None:
            self.keep(kept, blank=True)

    def keep(self, kept: ImageWork, *, blank: bool = False) -> None:
        """Have what is painted now written."""
        try:
            job = kept.job(self.need_project, blank=blank)
        except ConvLoRAError as error:
            self.failed.emit(str(error))
            return
        if job is not None:
            self.writer.put(job)

    def keep_prediction(self, kept: ImageWork, labels: np.ndarray) -> None:
        """Have a prediction written, or what is left of it."""
        project, home = self.project, kept.home

        def write() -> None:
            if project is not None and home.stem is not None:
                project.keep_prediction(home.stem, labels)

        self.writer.put(write)

    def need_project(self) -> Project:
        """Return the project; one is set aside if the user has none."""
        if self.project is None:
            self.project = recovery.begin(self._manifest())
        return self.project

    def _autosave(self) -> None:
        if self.writer.busy:
            self._soon.start()
        else:
            self.save()

    def _follow(self) -> None:
        follow(self.works, self._images.records, self.touch)

    def _on_leaving(self, record: ImageLayers | None, why: str) -> None:
        kept = self.find(record)
        if kept is not None and kept.dirty:
            self.keep(kept)

    def _on_wrote(self) -> None:
        if not (self.writer.failures or self.writer.waiting or any(k.dirty for k in self.works)):
            self._said.clear()
        while self.writer.failures:
            sentence = self.writer.failures.popleft()
            if sentence not in self._said:  # a full disk is not news at every try
                self.failed.emit(sentence)
            self._said.add(sentence)
            self.touch()  # the disk may have room again
        self.changed.emit()
