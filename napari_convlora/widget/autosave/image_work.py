"""What is known of each image's work: its layers, its place in the project, and what is unsaved."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from napari.layers import Labels, Shapes
from qtpy.QtCore import QTimer

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project import ImageEntry, Project
from napari_convlora.widget.layers import copies
from napari_convlora.widget.layers.camera import view_of
from napari_convlora.widget.layers.image_layers import ImageLayers


@dataclass(eq=False)
class Home:
    """Where an image's work is kept; from the first job that names it on, the writer's alone.

    Attributes
    ----------
    stem
        What the project calls the image; None until it is on its list.
    digest
        Of what is on disk, so that only changes are written.
    failed
        Whether something could not be written, and is to be tried again.
    """

    stem: str | None = None
    digest: bytes = b""
    failed: bool = False


class ImageWork:
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
        self.home = Home()
        self._unsaved = self._begun = False
        self._annotations: Labels | None = None
        self._reviewed: Shapes | None = None
        self._regions: Outlines = ()
        self.follow()

    @property
    def stem(self) -> str | None:
        """What the project calls the image; None until it is on its list."""
        return self.home.stem

    @property
    def dirty(self) -> bool:
        """Whether something may not be on disk, nor on its way there."""
        return self._unsaved or self.home.failed

    def follow(self) -> None:
        """Listen to the layers there are; connecting twice is connecting once."""
        for layer in (self.record.annotations, self.record.prediction):
            if layer is not None:
                for event in (layer.events.paint, layer.events.set_data):  # undo says set_data
                    event.connect(self.touch)
        if self.record.annotations is not self._annotations:
            self._annotations = self.record.annotations
            self.touch()  # a layer of the user's own may come with strokes on it
        if self.record.reviewed is not self._reviewed:
            self._reviewed = self.record.reviewed
            if self._reviewed is None:
                # Later, as regions that leave together with their image are kept.
                QTimer.singleShot(0, self._on_regions)
            else:
                self._reviewed.events.data.connect(self._on_regions)
                self._on_regions()

    def close(self) -> None:
        """Take the layers out of the viewer, their corrections taken up."""
        record, layers = self.record, self.record.viewer.layers
        with contextlib.suppress(ConvLoRAError):
            record.collect_corrections()  # which may make a layer of annotations
        self.follow()
        record.extra.put_away()
        # Regions go after their image, whose record would take note that they are no more.
        for layer in (record.prediction, record.annotations, record.image, record.reviewed):
            if layer is not None and layer in layers:
                layers.remove(layer)

    def touch(self, event: Any = None) -> None:
        """Take note that something may have been painted."""
        self._unsaved = True
        self._touched()

    def _on_regions(self, event: Any = None) -> None:
        record = self.record
        if record.reviewed is not None or record.image in record.viewer.layers:
            self._regions = record.outlines()
            self.touch()

    def job(
        self, project: Callable[[], Project], *, blank: bool = False
    ) -> Callable[[], None] | None:
        """Copy what is painted, and return what writes it if it is not on disk yet.

        Parameters
        ----------
        project
            Returns where to write; not asked if there is nothing to write.
        blank
            Whether to write an image in which nothing was ever annotated, too.

        Raises
        ------
        ConvLoRAError
            The layers do not fit their image, or there is nowhere to write.
        """
        painted, regions = copies.work(self.record), self._regions
        blank = blank or bool(regions) or self._begun
        if blank and self.record.annotations is None and painted is None:
            painted = np.zeros(self.record.planes_shape, np.uint8)
        if painted is None or not (blank or self.stem is not None or painted.any()):
            self._unsaved = self.home.failed = False
            return None
        self._begun = True
        home, folder, entry = self.home, project(), entry_of(self.record)
        snapshot = copies.snapshot_of(self.record, painted)
        self._unsaved = home.failed = False

        def write() -> None:
            digest = _digest(painted, regions)
            if digest == home.digest:
                return
            homeless = ""
            try:
                if home.stem is None:
                    own = folder.add(entry, snapshot.planes())
                    home.stem, homeless = own.stem, own.homeless
                folder.keep_annotations(home.stem, painted, regions)
            except BaseException:
                home.failed = True
                raise
            home.digest = digest
            if homeless:  # what is painted is safe now, but its image is not
                raise InputError(homeless)

        return write

    @property
    def bare(self) -> bool:
        """Whether nothing is painted or reviewed."""
        painted = copies.work(self.record)
        return not self._regions and (painted is None or not painted.any())

    def move_to(self, stem: str) -> None:
        """Be kept under `stem` from now on; what is on its way goes where it was to go."""
        self.home = replace(self.home, stem=stem)

    def wrote(self, painted: np.ndarray, regions: Outlines) -> None:
        """Take note of what is on disk, so that only changes are written."""
        self.home = replace(self.home, digest=_digest(painted, regions))
        self._begun = True


def view_job(kept: ImageWork | None, project: Project) -> Callable[[], None]:
    """Return what writes how an image is looked at now."""
    home, view = (None, None) if kept is None else (kept.home, view_of(kept.record))

    def write() -> None:
        if home is not None and home.stem is not None and view is not None:
            project.keep_view(home.stem, view)

    return write


def place_job(kept: ImageWork, project: Project) -> Callable[[], None]:
    """Return what writes where an image lies now."""
    home, image = kept.home, kept.record.image
    place = tuple(map(float, image.scale)), tuple(map(float, image.translate))

    def write() -> None:
        if home.stem is not None:
            project.keep_place(home.stem, *place)

    return write


def follow(
    known: list[ImageWork], records: Sequence[ImageLayers], touched: Callable[[], None]
) -> None:
    """Listen to the layers of every image, and add to what is known those that are new."""
    for record in records:
        kept = next((k for k in known if k.record is record), None)
        for other in known:
            # An image that was removed and opened again finds its annotations in the viewer.
            same = other.record.annotations is record.annotations is not None
            if kept is None and same and other.record not in records:
                kept, other.record = other, record
        if kept is None:
            kept = ImageWork(record, touched)
            known.append(kept)
            kept.touch()  # it may have come with strokes on it
        kept.follow()


def take_up(
    known: list[ImageWork], record: ImageLayers, stem: str, touched: Callable[[], None]
) -> ImageWork:
    """Return what is known of an image that the project calls `stem`, from now on by `record`."""
    before = next((k for k in known if k.stem == stem), None)
    kept = next((k for k in known if k.record is record), None)
    if kept is None:
        kept = ImageWork(record, touched)
        known.append(kept)
    if before is not None and before is not kept:
        # Its image was removed from the viewer; its strokes were not.
        record.annotations = record.annotations or before.record.annotations
        known.remove(before)
    kept.move_to(stem)
    return kept


def entry_of(record: ImageLayers) -> ImageEntry:
    """Describe an image for a project, which gives it a stem."""
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


def _digest(painted: np.ndarray, regions: Outlines) -> bytes:
    digest = hashlib.blake2b(painted.astype(np.int32).data)
    digest.update(repr([(plane, v.tolist()) for plane, v in regions]).encode())
    return digest.digest()
