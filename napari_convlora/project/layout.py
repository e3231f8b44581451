"""Names of the files of a project, and the guard that none of them leads away through a link."""

from __future__ import annotations

import os
from pathlib import Path

from napari_convlora.errors import InputError

MANIFEST, IMAGES = "project.json", "images"
ANNOTATIONS, PREDICTIONS, ROUNDS = "annotations", "predictions", "rounds"
RECORD, RECIPE, HISTORY = "round.json", "recipe.json", "history.csv"
ADAPTER, START = "adapter.safetensors", "start.safetensors"


def inside(folder: Path, *parts: str) -> Path:
    """Return the path of something in a project or a recipe's folder.

    Parameters
    ----------
    folder
        May itself be reached through a link, as its user has named it.
    parts
        Names of folders and a file below it.

    Raises
    ------
    InputError
        One of them is a link, or leads out of the folder: a stranger may have made it.
    """
    path = folder
    for part in parts:
        if part in ("", ".", "..") or Path(part).name != part:
            raise InputError(f"'{part}' is no name of a file in '{folder}'; restore a copy of it.")
        path = path / part
        _refuse_link(path)
    return path


def check_plain(folder: Path) -> None:
    """Raise an `InputError` unless all that is in a folder, at any depth, is files and folders."""
    _refuse_link(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            _refuse_link(path)
            if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
                raise InputError(f"'{path}' is neither a file nor a folder; remove it.")


def _refuse_link(path: Path) -> None:
    try:
        os.readlink(path)  # of junctions of Windows, too
    except (OSError, ValueError):
        return
    raise InputError(
        f"'{path}' is a link, which perhaps leads out of the project; put what it points to in "
        "its place if that is yours, or remove it."
    )
