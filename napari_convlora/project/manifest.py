"""``project.json``: what a project is made of, and where its images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from napari_convlora import __version__
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig, listed
from napari_convlora.errors import InputError
from napari_convlora.files.checked_json import build, read_json, write_checked_json
from napari_convlora.labels.classes import parse_classes
from napari_convlora.project.image_entry import ImageEntry, check_entries

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What a round is run with.

    Parameters
    ----------
    backbone
        Name or checkpoint path.
    model, train
        What is trained, and how.
    """

    backbone: str = "litemedsam"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Manifest:
    """What ``project.json`` holds.

    Parameters
    ----------
    classes
        The class table.
    settings
        Of the next round.
    images
        In the order of the list.
    current
        Stem of the image last worked on, or None.
    installed
        Number of the round whose adapter predicts, or None.
    automatic
        Whether rounds begin by themselves when strokes change.
    merged
        For classes that were merged, the one that has taken their pixels: adapters of earlier
        rounds still tell them apart.
    removed
        Stems of images that were removed: rounds and older versions keep the files of that name.
    """

    classes: tuple[ClassInfo, ...] = ()
    settings: Settings = field(default_factory=Settings)
    images: tuple[ImageEntry, ...] = ()
    current: str | None = None
    installed: int | None = None
    automatic: bool = False
    merged: dict[int, int] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Write the manifest, atomically."""
        write_checked_json(path, {"format": FORMAT, "package": __version__, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest; nothing in it is trusted.

        Raises
        ------
        InputError
            The file is absent, damaged, or of a newer format.
        """
        data = read_json(path, FORMAT)
        try:
            manifest = build(cls, data)
            if manifest.classes:
                parse_classes({"classes": data["classes"]}, path.name)
            check_entries(manifest.images)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' is damaged ({error}); restore a copy of it.") from error
        return manifest


def split_missing(images: Sequence[ImageEntry], folder: Path) -> tuple[list[ImageEntry], str]:
    """Return images that a round can learn from, and a sentence on those that are not found."""
    found, missing = [], []
    for entry in images:
        try:
            entry.find(folder)
            found.append(entry)
        except InputError:
            missing.append(f"'{entry.name}'")
    if not missing:
        return found, ""
    return found, (
        f"The round goes on without {listed(missing)}, not found on disk; show "
        "with Locate in the window where the image is, or remove it from the project there."
    )
