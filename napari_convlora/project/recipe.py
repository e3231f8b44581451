"""A recipe: everything that repeats a round without the window, in one JSON file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import repeat
from pathlib import Path

import numpy as np

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import make_folder
from napari_convlora.files.checked_json import build, read_json, write_checked_json
from napari_convlora.formats.opening import read_labels
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.around_labels import labelled_parts
from napari_convlora.labels.classes import find_background, parse_classes
from napari_convlora.labels.reviewed import Outlines, fill_outlines
from napari_convlora.project.image_entry import ImageEntry, check_entries
from napari_convlora.project.label_files import read_regions, write_label_file, write_regions
from napari_convlora.project.layout import inside
from napari_convlora.project.manifest import Settings

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
        In the order in which they were handed in; `labels` has a folder beside the recipe that
        holds their annotations, ``<stem>.tif``, and reviewed regions if any, ``<stem>.json``.
    labels
        Name of that folder.
    regions
        How many reviewed regions each image had; () in recipes of before, which do not say.
    start
        Adapter file, beside the recipe, that the round went on from or, from the base, whose detail
        branch taught as well; None for neither.
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
    regions: tuple[int, ...] = ()
    start: str | None = None
    stop_after: int | None = None
    threads: int = 1
    versions: tuple[str, ...] = ()
    command: str = ""

    def write(self, path: Path) -> None:
        """Write the recipe, with the versions of today and the command that repeats it."""
        own = {
            "versions": package_versions(),
            "command": f"napari-convlora adapt --recipe {path.name} --out adapter.safetensors",
        }
        write_checked_json(path, {"format": FORMAT, **asdict(self), **own})

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
            names = recipe.labels, recipe.start or "a"
            if any(Path(name).name != name or name == ".." for name in names):
                raise ValueError("its files are not beside it")
            if len(recipe.regions) not in (0, len(recipe.images)):
                raise ValueError("it tells of the regions of other images")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' is damaged ({error}); export it again.") from error
        return recipe

    def annotations(self, folder: Path) -> list[tuple[np.ndarray, Outlines]]:
        """Return annotations (P, H, W) int32 and reviewed regions of a recipe in `folder`.

        Raises
        ------
        InputError
            Those of an image are absent, unreadable or of another size.
        """
        found = []
        for entry, n_regions in zip(self.images, self.regions or repeat(None), strict=False):
            path = inside(folder, self.labels, f"{entry.stem}.tif")
            regions = inside(folder, self.labels, f"{entry.stem}.json")
            outlines: Outlines = ()
            if n_regions or regions.is_file():
                outlines = read_regions(regions, entry.shape[0])
            if n_regions is not None and len(outlines) != n_regions:
                raise InputError(
                    f"'{regions}' holds {len(outlines)} reviewed regions, but the round learnt "
                    f"from {n_regions}; restore a copy of it."
                )
            found.append((read_labels(path, entry.shape[:3]), outlines))
        return found

    def learnt(self, folder: Path) -> list[np.ndarray]:
        """Return the annotations with the background of reviewed regions; see `annotations`."""
        background = find_background(self.classes)
        return [fill_outlines(*annotated, background) for annotated in self.annotations(folder)]

    def labelled(self, folder: Path) -> list[LabelledImage]:
        """Return what the round learnt from; see `annotations`, and images are read besides."""
        return [
            part
            for entry, labels in zip(self.images, self.learnt(folder), strict=True)
            for _, part in labelled_parts(entry.read(folder), labels, entry.name)
        ]

    def write_annotations(
        self, folder: Path, annotations: Sequence[tuple[np.ndarray, Outlines]]
    ) -> None:
        """Write annotations and reviewed regions for a recipe that is to lie in `folder`.

        Raises
        ------
        InputError
            They cannot be written.
        """
        make_folder(inside(folder, self.labels))
        for entry, (labels, outlines) in zip(self.images, annotations, strict=True):
            write_label_file(inside(folder, self.labels, f"{entry.stem}.tif"), labels)
            regions = inside(folder, self.labels, f"{entry.stem}.json")
            regions.unlink(missing_ok=True)  # those of another recipe of this name
            if outlines:
                write_regions(regions, outlines)


def package_versions() -> list[str]:
    """Return the versions of what a round's result depends on."""
    return [f"python {platform.python_version()}"] + [
        f"{name} {metadata.version(name)}" for name in _PACKAGES
    ]
