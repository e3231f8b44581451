"""Work on disk: annotations, rounds, settings, references to images; no window, no training."""

from __future__ import annotations

from napari_convlora.project.folder import Project
from napari_convlora.project.image_entry import ImageEntry, Viewpoint
from napari_convlora.project.lock import LockedError
from napari_convlora.project.lost_labels import LostLabelsError
from napari_convlora.project.manifest import Manifest, Settings, split_missing
from napari_convlora.project.recipe import Recipe
from napari_convlora.project.round_store import RoundRecord

__all__ = [
    "ImageEntry",
    "LockedError",
    "LostLabelsError",
    "Manifest",
    "Project",
    "Recipe",
    "RoundRecord",
    "Settings",
    "Viewpoint",
    "split_missing",
]
