"""A recipe: everything that repeats a round without the window, in one JSON file."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from napari_convlora.annotations import LabelledImage, parse_classes
from napari_convlora.config import ClassInfo, InputError
from napari_convlora.files import read_labels
from napari_convlora.project.checked import build, read_json, write_json
from napari_convlora.project.manifest import ImageEntry, Settings, check_entries

FORMAT = 1
_PACKAGES = ("napari-convlora", "torch", "numpy", "scikit-image", "scikit-learn")


@dataclass(frozen=True)
class Recipe:
    """What a round learnt from and how.

    Parameters
    ----------
    classes, settings
        As they were.
    images
        In the order in which they were handed in; `labels` has a folder of ``<stem>.tif`` beside
        the recipe that holds their annotations.
    labels
        Name of that folder.
    start
        Adapter file, beside the recipe, that the round went on from; None for the base.
    stop_after
        Step after which somebody stopped it; None if it ended by itself.
    threads
        Of torch; another number may round differently.
    versions
        Of the packages it ran with.
    command
        What repeats it.
    """

    classes: tuple[ClassInfo, ...]
    settings: Settings
    images: tuple[ImageEntry, ...]
    labels: str = "annotations"
    start: str | None = None
    stop_after: int | None = None
    threads: int = 1
    versions: tuple[str, ...] = ()
    command: str = ""

    def write(self, path: Path) -> None:
        """Write the recipe, with the versions of today and the command that repeats it."""
        own = {
            "versions": versions(),
            "command": f"napari-convlora adapt --recipe {path.name} --out adapter.safetensors",
        }
        write_json(path, {"format": FORMAT, **asdict(self), **own})

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe; nothing in it is trusted.

        Raises
        ------
        InputError
            The file is absent, damaged or of a newer format.
        """
        data = read_json(path, FORMAT)
        try:
            recipe = build(cls, data)
            parse_classes({"classes": data["classes"]}, path.name)
            check_entries(recipe.images)
            if any(Path(name).name != name for name in (recipe.labels, recipe.start or "a")):
                raise ValueError("its files are not beside it")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' is damaged ({error}); export it again.") from error
        return recipe

    def labelled(self, folder: Path) -> list[LabelledImage]:
        """Return images and annotations of a recipe in `folder`.

        Raises
        ------
        InputError
            One is absent, unreadable or of another size.
        """
        return [
            LabelledImage(
                entry.read(folder),
                read_labels(folder / self.labels / f"{entry.stem}.tif", entry.shape[:3]),
                name=entry.name,
            )
            for entry in self.images
        ]


def versions() -> list[str]:
    """Return the versions of what a round's result depends on."""
    return [f"python {platform.python_version()}"] + [
        f"{name} {metadata.version(name)}" for name in _PACKAGES
    ]
