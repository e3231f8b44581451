"""Label files that a project counts on, and that are gone or cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from napari_convlora.config import InputError, listed
from napari_convlora.project.labels import versions


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


def lost(image: str, path: Path) -> LostLabelsError:
    """Return the error that a label file in `path` cannot be read."""
    older = bool(versions(path))
    return LostLabelsError(Lost(image, f"{path.parent.name}/{path.name}", older))
