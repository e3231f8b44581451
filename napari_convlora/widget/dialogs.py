"""Questions to the user: file names, and whether to remove or merge a class."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qtpy.QtWidgets import QFileDialog, QMessageBox, QWidget

from napari_convlora.formats.plain import READABLE_SUFFIXES

_MASKS = "TIFF (*.tif *.tiff);;PNG (*.png)"
_INSTANCES = "TIFF and table (*.tif *.tiff);;Table alone (*.csv)"
_ADAPTER = "Adapter (*.safetensors)"
_CLASSES = "Class table (*.json)"
_IMAGES = f"Images ({' '.join(f'*{s}' for s in READABLE_SUFFIXES)});;All files (*)"
_CHECKPOINT = "Checkpoint (*.pth *.pt *.safetensors);;All files (*)"

Action = Callable[[str], None]
"""What to do with the chosen path; nothing is done when the user cancels."""


def with_masks(parent: QWidget, action: Action) -> None:
    """Ask where to write masks."""
    _save(parent, action, "Export masks", "masks.tif", _MASKS)


def with_new_adapter(parent: QWidget, action: Action) -> None:
    """Ask where to write an adapter."""
    _save(parent, action, "Export adapter", "adapter.safetensors", _ADAPTER)


def with_adapter(parent: QWidget, action: Action) -> None:
    """Ask for an adapter file."""
    _open(parent, action, "Load adapter", _ADAPTER)


def with_recipe(parent: QWidget, action: Action) -> None:
    """Ask where to write a recipe."""
    _save(parent, action, "Export recipe", "recipe.json", "Recipe (*.json)")


def with_image(parent: QWidget, action: Action, maybe_folder: bool = False) -> None:
    """Ask for one image file, or for a folder if the image may be one."""
    title, question = "Where is the image?", "Is it a folder, such as a zarr?"
    yes = QMessageBox.StandardButton.Yes
    if not maybe_folder or QMessageBox.question(parent, title, question) != yes:
        _open(parent, action, title, _IMAGES)
    elif path := QFileDialog.getExistingDirectory(parent, title):
        action(path)


def with_images(parent: QWidget, action: Callable[[list[str]], None]) -> None:
    """Ask for image files."""
    paths, _ = QFileDialog.getOpenFileNames(parent, "Add images", "", _IMAGES)
    if paths:
        action(paths)


def with_folder(parent: QWidget, action: Action) -> None:
    """Ask for the folder of a project."""
    path = QFileDialog.getExistingDirectory(parent, "Folder of the project")
    if path:
        action(path)


def with_new_folder(parent: QWidget, action: Action) -> None:
    """Ask where to make the folder of a project."""
    _save(parent, action, "Folder of the new project", "project", "")


def with_checkpoint(parent: QWidget, action: Action) -> None:
    """Ask for a checkpoint file."""
    _open(parent, action, "Checkpoint of a Segment Anything model", _CHECKPOINT)


def with_instances(parent: QWidget, action: Action) -> None:
    """Ask where to write instances."""
    _save(parent, action, "Export instances", "instances.tif", _INSTANCES)


def with_classes(parent: QWidget, action: Action) -> None:
    """Ask for a class table."""
    _open(parent, action, "Load class table", _CLASSES)


def with_new_classes(parent: QWidget, action: Action) -> None:
    """Ask where to write a class table."""
    _save(parent, action, "Save class table", "classes.json", _CLASSES)


def may_remove(parent: QWidget, name: str, painted: int) -> bool:
    """Whether to remove a class of `painted` pixels; not asked if there are none."""
    question = (
        f"Remove '{name}' and erase its {painted:,} painted pixels in all images? Undo (Ctrl-Z on "
        "the annotations layer) brings back those of the images that are open."
    )
    return not painted or _agreed(parent, "Remove class", question)


def may_merge(parent: QWidget, name: str, into: str, stored: int) -> bool:
    """Whether to merge a class of `stored` pixels in closed images; not asked if there are none."""
    question = (
        f"Merge '{name}' into '{into}'? Its {stored:,} painted pixels in images that are not open "
        "are merged for good, as undo does not reach them."
    )
    return not stored or _agreed(parent, "Merge classes", question)


def may_remove_image(parent: QWidget, name: str, painted: int) -> bool:
    """Whether to remove an image of `painted` pixels from the project."""
    question = (
        f"Remove '{name}' and its {painted:,} painted pixels from the project? The image file and "
        "all rounds stay; Undo does not bring the strokes back."
    )
    return _agreed(parent, "Remove image", question)


def may_open_anyway(parent: QWidget, locked: str) -> bool:
    """Whether to open a project although it is open elsewhere, as `locked` says."""
    question = (
        f"{locked} Open it anyway? What is saved last replaces what was painted there in the "
        "meantime."
    )
    return _agreed(parent, "Open project", question)


def may_go_on_without(parent: QWidget, lost: str) -> bool:
    """Whether a round may begin without the images whose labels are lost, as `lost` says."""
    return _agreed(parent, "Labels are missing", f"{lost} Adapt without them?")


def _agreed(parent: QWidget, title: str, question: str) -> bool:
    return QMessageBox.question(parent, title, question) == QMessageBox.StandardButton.Yes


def _save(parent: QWidget, action: Action, title: str, name: str, kinds: str) -> None:
    path, kind = QFileDialog.getSaveFileName(parent, title, name, kinds)
    endings = re.findall(r"\*(\.\w+)", kind or kinds)
    if path and endings and not Path(path).suffix:
        path += endings[0]
        question = f"Replace '{Path(path).name}'?"  # Qt has asked about the name without ending
        yes = QMessageBox.StandardButton.Yes
        if Path(path).exists() and QMessageBox.question(parent, title, question) != yes:
            return
    if path:
        action(path)


def _open(parent: QWidget, action: Action, title: str, kinds: str) -> None:
    path, _ = QFileDialog.getOpenFileName(parent, title, "", kinds)
    if path:
        action(path)
