"""Annotations, reviewed regions and predictions of the images in a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from napari_convlora.errors import InputError
from napari_convlora.files.atomic import make_folder
from napari_convlora.formats.opening import read_labels
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project.image_entry import ImageEntry
from napari_convlora.project.label_files import (
    VERSION_SECONDS,
    keep_version,
    read_current,
    read_newest,
    write_label_file,
    write_regions,
)
from napari_convlora.project.layout import ANNOTATIONS, PREDICTIONS
from napari_convlora.project.lost_labels import lost_files, read_painted, read_reviewed, with_counts
from napari_convlora.project.manifest import Manifest
from napari_convlora.project.manifest_folder import ManifestFolder

T = TypeVar("T")


class LabelledFolder(ManifestFolder):
    """What is painted and predicted in the images of a folder, by the name of their files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self._damaged: set[Path] = set()

    def annotations(self, stem: str) -> tuple[np.ndarray | None, str]:
        """Return annotations (P, H, W) int32, None if there are none, and what is odd about them.

        An older version takes the place of what is gone or damaged.

        Raises
        ------
        InputError
            Neither they nor an older version can be read.
        """
        entry = self.entry(stem)
        read = partial(read_painted, entry=entry)
        return self._newest(entry, ".tif", read, expected=entry.annotated)

    def regions(self, stem: str) -> tuple[Outlines, str]:
        """Return the reviewed regions of an image, and what is odd about them.

        Raises
        ------
        InputError
            Neither they nor an older version can be read.
        """
        entry = self.entry(stem)
        read = partial(read_reviewed, entry=entry)
        found, note = self._newest(entry, ".json", read, expected=bool(entry.regions))
        return found or (), note

    def _newest(
        self, entry: ImageEntry, suffix: str, read: Callable[[Path], T | None], *, expected: bool
    ) -> tuple[T | None, str]:
        path = self.own(ANNOTATIONS, f"{entry.stem}{suffix}")
        found, note = read_newest(path, read)
        if note:
            self._damaged.add(path)
        elif found is None and expected:
            note = str(lost_files(entry.name, path))
        return found, note

    def _keep_version(self, path: Path) -> None:
        """Keep an older version now and then, and in any case what is damaged."""
        keep_version(path, least=0 if path in self._damaged else VERSION_SECONDS)
        self._damaged.discard(path)

    def keep_annotations(self, stem: str, labels: np.ndarray, regions: Outlines = ()) -> None:
        """Write annotations (P, H, W) and reviewed regions, keep an older version, and count.

        Raises
        ------
        InputError
            They cannot be written.
        """
        with self.lock:
            path = self.own(ANNOTATIONS, f"{stem}.tif")
            make_folder(path.parent)
            self._keep_version(path)
            write_label_file(path, labels)
            path = self.own(ANNOTATIONS, f"{stem}.json")
            if regions or path.exists():
                self._keep_version(path)
                write_regions(path, regions)
            self._replace_entry(with_counts(self.entry(stem), labels, regions))

    def relabel(self, stem: str, class_id: int, to: int) -> None:
        """Give a class's annotated pixels of an image to another; 0 erases them.

        Raises
        ------
        InputError
            The annotations cannot be read or written.
        """
        with self.lock:
            if class_id in self.entry(stem).counts:
                labels, regions = self.annotated(stem)
                self.keep_annotations(stem, np.where(labels == class_id, to, labels), regions)

    def prediction(self, stem: str) -> np.ndarray | None:
        """Return the model's last prediction (P, H, W) int32 of an image; None if there is none."""
        path = self.own(PREDICTIONS, f"{stem}.tif")
        return read_labels(path, self.entry(stem).shape[:3]) if path.is_file() else None

    def keep_prediction(self, stem: str, labels: np.ndarray) -> None:
        """Write what the model predicted (P, H, W)."""
        with self.lock:
            path = self.own(PREDICTIONS, f"{stem}.tif")
            make_folder(path.parent)
            write_label_file(path, labels)

    def predicted(self, stem: str) -> bool:
        """Whether there is a prediction of an image."""
        return (self.folder / PREDICTIONS / f"{stem}.tif").is_file()  # no more is done with it

    def annotated(self, stem: str) -> tuple[np.ndarray, Outlines]:
        """Return annotations (P, H, W) int32, all 0 if nothing was painted, and reviewed regions.

        Raises
        ------
        LostLabelsError
            One of them is gone or damaged, or holds nothing of what was painted, whether there is
            an older version or not.
        """
        entry = self.entry(stem)
        labels: np.ndarray = np.zeros(entry.shape[:3], np.int32)
        regions: Outlines = ()
        path, other = (self.own(ANNOTATIONS, f"{stem}{suffix}") for suffix in (".tif", ".json"))
        try:
            if entry.annotated or path.exists():
                labels = read_current(path, partial(read_painted, entry=entry))
            path = other
            if entry.regions or path.exists():
                regions = read_current(path, partial(read_reviewed, entry=entry))
        except InputError as error:
            raise lost_files(entry.name, path) from error
        return labels, regions
