"""Image sets with ground truth on disk: what a benchmark learns from and is scored on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_convlora.config import MAX_CLASSES, MAX_LABEL
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.formats.opening import read_image, read_labels

_VOID_NAMES = {"void", "unlabelled", "unlabeled", "ignore"}


@dataclass(frozen=True)
class ImageSet:
    """A folder with ``images/`` and ``masks/`` of the same stems, and how it is split.

    Parameters
    ----------
    folder
        Its name is the name of the set.
    classes
        Name of every class: class id k is ``classes[k - 1]``.
    mask_ids
        What each class is called in the mask files, in the order of `classes`.
    void_ids
        Mask ids of pixels that are neither learnt nor scored.
    train, test
        Stems.
    """

    folder: Path
    classes: tuple[str, ...]
    mask_ids: tuple[int, ...]
    void_ids: tuple[int, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


@dataclass(frozen=True, eq=False)
class Sample:
    """An image (1, H, W, C) and its truth (1, H, W) uint8: class ids from 1, 0 = void."""

    stem: str
    image: np.ndarray
    truth: np.ndarray


def find_sets(data: Path) -> list[str]:
    """Return the names of the folders of `data` that may be image sets.

    Raises
    ------
    InputError
        `data` is no folder or holds none.
    """
    names = sorted(p.name for p in data.iterdir() if p.is_dir()) if data.is_dir() else []
    if not names:
        raise InputError(f"'{data}' holds no image sets; give a folder with one folder per set.")
    return names


def open_set(folder: Path) -> ImageSet:
    """Read how a set is split and what its classes are.

    ``meta.json`` names the classes by mask id (``classes``) and the stems for training and for
    testing (``suggested_split``). Without that file the first half of the images trains, in the
    order of their names, and every id found in the masks is a class.

    Raises
    ------
    InputError
        There are no images or masks, no usable split, or ``meta.json`` is not understood.
    """
    if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise InputError(f"'{folder}' has no folders images/ and masks/; add them.")
    if not (folder / "meta.json").exists():
        stems = sorted(p.stem for p in (folder / "images").iterdir() if p.name[0] != ".")
        ids = sorted(
            {int(i) for stem in stems for i in np.unique(read_labels(_mask(folder, stem)))}
        )
        half = (len(stems) + 1) // 2
        names = {i: f"class {i}" for i in ids}
        return _checked(folder, names, stems[:half], stems[half:])
    check_no_device(folder / "meta.json")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        names = {int(i): str(name) for i, name in meta.get("classes", {}).items()}
        split = meta.get("suggested_split", {})
        train, test = (list(map(str, split.get(part, []))) for part in ("train", "test"))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"'{folder / 'meta.json'}' is not understood ({error}); give classes by mask id and "
            "suggested_split with train and test."
        ) from error
    return _checked(folder, names, train, test)


def _checked(folder: Path, names: dict[int, str], train: list[str], test: list[str]) -> ImageSet:
    if not train or not test:
        raise InputError(f"'{folder.name}' has no split into training and test images; name one.")
    void = {i for i, name in names.items() if _VOID_NAMES & set(re.split(r"\W+", name.lower()))}
    kept = sorted(set(names) - void)
    if not 2 <= len(kept) <= MAX_CLASSES:
        raise InputError(
            f"'{folder.name}' has {len(kept)} classes; a benchmark needs 2 to {MAX_CLASSES}."
        )
    return ImageSet(
        folder,
        tuple(names[i] for i in kept),
        tuple(kept),
        tuple(sorted(void)),
        tuple(train),
        tuple(test),
    )


def read_sample(source: ImageSet, stem: str, crop: int | None = None) -> Sample:
    """Read one image and its truth.

    Parameters
    ----------
    source
        The set.
    stem
        File name without suffix.
    crop
        Keep the central square of this side in pixels, to save time.

    Raises
    ------
    InputError
        A file is absent or damaged, the image has several planes, or the mask has an id that
        the set's classes lack.
    """
    image = read_image(_one(source.folder / "images", stem))
    if len(image) > 1:
        raise InputError(f"'{stem}' has {len(image)} planes; benchmark sets hold flat images.")
    labels = read_labels(_mask(source.folder, stem), (1, *image.shape[1:3]))
    table = np.full(MAX_LABEL + 1, -1, np.int16)
    table[list(source.void_ids)] = 0
    table[list(source.mask_ids)] = np.arange(1, len(source.mask_ids) + 1)
    truth = table[labels]
    if (truth < 0).any():
        raise InputError(
            f"The mask of '{stem}' in '{source.name}' holds the id {labels[truth < 0][0]}, which "
            "is none of the set's classes; add it to meta.json."
        )
    if crop is not None:
        top, left = (max(0, (extent - crop) // 2) for extent in truth.shape[1:])
        square = np.s_[:, top : top + crop, left : left + crop]
        image, truth = image[square], truth[square]
    return Sample(stem, image, truth.astype(np.uint8))


def _mask(folder: Path, stem: str) -> Path:
    return _one(folder / "masks", stem)


def _one(folder: Path, stem: str) -> Path:
    found = [p for p in folder.iterdir() if p.stem == stem]
    if len(found) != 1:
        raise InputError(f"'{folder}' has {len(found)} files called '{stem}'; it must have one.")
    return found[0]
