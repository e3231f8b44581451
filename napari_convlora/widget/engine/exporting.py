"""What is written on request; each says what it has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from napari_convlora.errors import InputError
from napari_convlora.widget.layers.open_images import OpenImages

if TYPE_CHECKING:
    from napari_convlora.session.session import Session


def write_masks(images: OpenImages, path: Path) -> str:
    """Write the prediction, annotations on top, and the class table beside it."""
    from napari_convlora.config import CLASSES_FILE
    from napari_convlora.exports.masks import save_masks

    table = save_masks(images.need().predicted_labels(), path, images.classes)
    why = f", which counts before the {CLASSES_FILE} of other masks there"
    return (
        f"Masks written to {path.name}, class names to {table.name} beside it"
        f"{why * (table.name != CLASSES_FILE)}."
    )


def write_adapter(session: Session | None, path: Path) -> str:
    """Write the installed adapter."""
    if session is None or session.installed is None:
        raise InputError("There is no adapter yet; press Adapt first.")
    session.installed.save(path)
    return f"Adapter written to {path.name}; it predicts other images too."
