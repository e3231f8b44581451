"""Projects: a folder of annotations, rounds, settings and references to images."""

from __future__ import annotations

from napari_convlora.project.folder import Project
from napari_convlora.project.manifest import ImageEntry, Manifest, Settings, View, split_missing
from napari_convlora.project.missing import LostLabelsError
from napari_convlora.project.owner import LockedError
from napari_convlora.project.recipe import Recipe
from napari_convlora.project.rounds import RoundRecord

__all__ = [
    "ImageEntry",
    "LockedError",
    "LostLabelsError",
    "Manifest",
    "Project",
    "Recipe",
    "RoundRecord",
    "Settings",
    "View",
    "split_missing",
]
