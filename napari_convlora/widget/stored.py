"""The images of a project that are not open: they are learnt from, and relabelled, all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.annotations import find_background
from napari_convlora.project import ImageEntry, Project
from napari_convlora.project.writer import Writer
from napari_convlora.widget.images import Images
from napari_convlora.widget.jobs import Snapshot


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Pixels of a project's image that is not open; read by whoever makes an array of it."""

    entry: ImageEntry
    folder: Path

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """Return the pixels as a layer would hold them."""
        return np.asarray(self.entry.as_layer(self.entry.read(self.folder)), dtype)


def stored_snapshot(project: Project, entry: ImageEntry, background_id: int | None) -> Snapshot:
    """Return an image of a project that is not open, to learn from."""
    painted, regions = project.annotated(entry.stem)
    how = OnDisk(entry, project.folder), entry.rgb, entry.channel_axis
    return Snapshot(entry.name, *how, painted, None, regions, background_id, entry.stem)


class StoredImages:
    """What there is to do with images that are on disk only.

    Parameters
    ----------
    project
        Returns the project there is, or None.
    opened
        Returns the stems of the images that are open.
    images
        The open ones.
    writer
        Writes in the background, in order.
    """

    def __init__(
        self,
        project: Callable[[], Project | None],
        opened: Callable[[], set[str | None]],
        images: Images,
        writer: Writer,
    ) -> None:
        self._project, self._opened = project, opened
        self._images, self._writer = images, writer

    def entries(self) -> list[ImageEntry]:
        """Return the images that are not open, in the order of the list."""
        project, here = self._project(), self._opened()
        return [] if project is None else [e for e in project.manifest.images if e.stem not in here]

    def snapshots(self) -> list[Snapshot]:
        """Return annotated ones with as many channels as the current image, to learn from."""
        project, current = self._project(), self._images.need()
        background = find_background(self._images.classes)
        return [
            stored_snapshot(project, entry, background)
            for entry in self.entries()
            if project is not None and entry.annotated and entry.shape[3] == current.n_channels
        ]

    def painted_with(self, class_id: int) -> int:
        """Return how many pixels are annotated with a class."""
        return sum(entry.counts.get(class_id, 0) for entry in self.entries())

    def relabel(self, class_id: int, to: int) -> None:
        """Give a class's pixels to another, in the background."""
        project = self._project()
        for entry in self.entries() if project is not None else ():
            self._writer.put(partial(project.relabel, entry.stem, class_id, to))
