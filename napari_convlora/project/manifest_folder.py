"""A folder with a manifest: what is in it, and how the manifest changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from napari_convlora.errors import InputError
from napari_convlora.project.image_entry import ImageEntry
from napari_convlora.project.layout import MANIFEST, inside
from napari_convlora.project.manifest import Manifest


class ManifestFolder:
    """A folder whose manifest is replaced as a whole, never changed.

    Parameters
    ----------
    folder
        Where it is.
    manifest
        What its ``project.json`` holds.

    Attributes
    ----------
    lock
        Held while something is written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.lock = threading.RLock()

    def own(self, *parts: str) -> Path:
        """Return the path of something of the project; see `inside`."""
        return inside(self.folder, *parts)

    def entry(self, stem: str) -> ImageEntry:
        """Return an image by the name of its files."""
        for entry in self.manifest.images:
            if entry.stem == stem:
                return entry
        raise InputError(f"There is no image '{stem}' in this project; choose one from its list.")

    def update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest by what `change` makes of it, and write it if it differs."""
        with self.lock:
            manifest = change(self.manifest)
            if manifest != self.manifest:
                manifest.write(self.own(MANIFEST))
                self.manifest = manifest

    def _replace_entry(self, entry: ImageEntry) -> None:
        self.update(
            lambda m: replace(
                m, images=tuple(entry if e.stem == entry.stem else e for e in m.images)
            )
        )

    def install(self, number: int) -> None:
        """Make a round the one that predicts."""
        self.update(lambda m: replace(m, installed=number))
