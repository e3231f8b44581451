"""Label files that a project counts on, or does not, and what is gone or cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from napari_convlora.config import listed
from napari_convlora.errors import InputError
from napari_convlora.formats.opening import read_labels
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project.image_entry import ImageEntry
from napari_convlora.project.label_files import label_versions, read_regions
from napari_convlora.project.layout import ANNOTATIONS, inside


@dataclass(frozen=True)
class Lost:
    """Annotations or reviewed regions of an image: its name, their file, and if it has older ones.

    The file is given from the project's folder on.
    """

    image: str
    file: str
    older: bool


class LostLabelsError(InputError):
    """Labels that were there once cannot be read, which must not count as none.

    Parameters
    ----------
    lost
        Whose, an item each.
    """

    def __init__(self, *lost: Lost) -> None:
        self.lost = lost
        images = listed([f"'{item.image}' ({item.file})" for item in lost])
        files, them = ("file", "image") if len(lost) == 1 else ("files", "images")
        remedy = f"put the {files} back from a copy"
        if any(item.older for item in lost):
            remedy += f", or open the {them} in the window, which takes up the newest older version"
            remedy += " (annotations/versions)"
        super().__init__(f"The annotations of {images} are gone or cannot be read; {remedy}.")

    def __reduce__(self) -> tuple[type[LostLabelsError], tuple[Lost, ...]]:
        return type(self), self.lost


def lost_files(image: str, path: Path) -> LostLabelsError:
    """Return the error that a label file in `path` cannot be read."""
    older = bool(label_versions(path))
    return LostLabelsError(Lost(image, f"{path.parent.name}/{path.name}", older))


def read_painted(path: Path, entry: ImageEntry) -> np.ndarray | None:
    """Return the annotations (P, H, W) in a file; None if it holds none but some were painted."""
    labels = read_labels(path, entry.shape[:3])
    return None if entry.counts and not labels.any() else labels


def read_reviewed(path: Path, entry: ImageEntry) -> Outlines | None:
    """Return the reviewed regions in a file; None if it holds none but there were some."""
    regions = read_regions(path, entry.shape[0])
    return None if entry.regions and not regions else regions


def with_counts(entry: ImageEntry, labels: np.ndarray, regions: Outlines) -> ImageEntry:
    """Return an entry that counts what is annotated."""
    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return replace(entry, counts=found, regions=len(regions))


def with_first_counts(entry: ImageEntry, folder: Path) -> ImageEntry:
    """Return an entry of a project that may have ended before it counted an image's first labels.

    Raises
    ------
    InputError
        They cannot be read.
    """
    if entry.annotated:
        return entry
    painted, reviewed = (
        inside(folder, ANNOTATIONS, f"{entry.stem}{suffix}") for suffix in (".tif", ".json")
    )
    labels = read_labels(painted, entry.shape[:3]) if painted.is_file() else np.zeros(0, np.int32)
    regions = read_regions(reviewed, entry.shape[0]) if reviewed.is_file() else ()
    return with_counts(entry, labels, regions)
