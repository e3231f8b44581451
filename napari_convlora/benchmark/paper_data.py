"""Image and label pairs of the Conv-LoRA protocol, as its csv files list them."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from napari_convlora.config import MAX_CLASSES, MAX_LABEL
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.formats.opening import read_image, read_labels
from napari_convlora.images.normalise import to_rgb
from napari_convlora.training.losses import VOID

SPLITS = ("train", "val", "test")
_NOISE = 15


@dataclass(frozen=True)
class Pair:
    """Paths of an image and of its label image."""

    image: Path
    label: Path


@dataclass(frozen=True)
class SegmentationTask:
    """What the labels mean.

    Parameters
    ----------
    n_classes
        K.
    binary
        Labels are masks: bright is the object, class 1.
    ignore
        Id of pixels that neither loss nor metric sees, of labels that are class ids.
    """

    n_classes: int
    binary: bool
    ignore: int | None = None

    def read(self, path: Path) -> np.ndarray:
        """Return the label image in `path` as (H, W) int16: class index, or `VOID`.

        A mask's object is whatever is above half its largest value, so 0/1, 0/255 and JPEG all
        do; a largest value of 2 to 15 is taken for compression noise.

        Raises
        ------
        InputError
            The file cannot be read, or holds an id of no class.
        """
        if self.binary:
            grey = read_image(path)[0].max(axis=-1).astype(np.float32)
            peak = grey.max()
            empty = 1 < peak <= _NOISE
            return np.zeros(grey.shape, np.int16) if empty else (grey > peak / 2).astype(np.int16)
        ids = read_labels(path)[0]
        labels = np.where(ids == self.ignore, VOID, ids).astype(np.int16)
        if labels.max() >= self.n_classes:
            raise InputError(
                f"'{path.name}' holds the class {labels.max()}, which no label in train.csv has; "
                "correct it, or leave it out with --ignore."
            )
        return labels


def read_split(folder: Path, split: str, limit: int | None = None) -> list[Pair]:
    """Return the pairs that ``<split>.csv`` in `folder` lists, at most `limit` of them.

    Raises
    ------
    InputError
        The table is absent, empty, lacks a column, or names a file that does not exist.
    """
    table = folder / f"{split}.csv"
    check_no_device(table)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"'{table}' cannot be read; write a csv file with the columns image,label there."
        ) from error
    if not rows:
        raise InputError(f"'{table}' lists no images; give it one row per image.")
    if not {"image", "label"} <= set(rows[0]):
        raise InputError(f"'{table}' must have the columns image and label; add them.")
    pairs = [Pair(*(_inside(folder, row[c]) for c in ("image", "label"))) for row in rows[:limit]]
    for path in (p for pair in pairs for p in (pair.image, pair.label)):
        if not path.is_file():
            raise InputError(
                f"'{table}' names {path}, which is no file; give paths relative to the table."
            )
    return pairs


def _inside(folder: Path, name: str | None) -> Path:
    return Path(os.path.normpath(folder / (name or "")))


def find_task(
    pairs: list[Pair], binary: bool | None, ignore: int | None
) -> tuple[SegmentationTask, Tensor]:
    """Find out what the labels of `pairs` mean.

    Parameters
    ----------
    pairs
        Those of the training set.
    binary
        None decides from the labels: at most two values make masks, unless one is ignored.
    ignore
        See `Task`.

    Returns
    -------
    task : Task
    counts : Tensor
        Labelled pixels per class (K,), int64; zeros where labels are masks.

    Raises
    ------
    InputError
        A label image cannot be read, holds too high a class, or masks have an ignored id.
    """
    masks = SegmentationTask(2, binary=True), torch.zeros(2, dtype=torch.int64)
    if binary and ignore is not None:
        raise InputError("Masks have no ids to ignore; use --task multiclass, or drop --ignore.")
    if binary is None and ignore is not None:
        binary = False
    jpeg = any(pair.label.suffix.lower() in (".jpg", ".jpeg") for pair in pairs)
    if binary or (binary is None and jpeg):  # a JPEG cannot hold ids
        return masks
    counts = np.zeros(MAX_LABEL + 1, np.int64)
    for pair in pairs:
        ids = read_labels(pair.label)[0]
        ids = ids if ignore is None else ids[ids != ignore]
        counts += np.bincount(ids.ravel(), minlength=len(counts))
    present = np.flatnonzero(counts)
    if binary is None and len(present) <= 2:
        return masks
    highest = int(present.max(initial=1))
    if highest >= MAX_CLASSES:  # in an adapter, where 0 is unlabelled, ids are one higher
        raise InputError(
            f"The labels hold the class {highest}; number classes from 0 to {MAX_CLASSES - 1}, "
            f"leave it out with --ignore {highest}, or say --task binary if they are masks."
        )
    return SegmentationTask(highest + 1, False, ignore), torch.from_numpy(counts[: highest + 1])


class Pairs(Dataset):
    """Pairs as the model sees them: squares, without regard to aspect, as in the paper.

    Parameters
    ----------
    pairs, task
        What to read, and how.
    size
        Side in pixels. Images are resized bicubically, labels by nearest neighbour.
    """

    def __init__(self, pairs: list[Pair], task: SegmentationTask, size: int) -> None:
        self.pairs, self.task, self.size = pairs, task, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image (3, size, size) float32 in [0, 1] and its target (size, size) int64."""
        pair, square = self.pairs[index], (self.size, self.size)
        image = read_image(pair.image)[0]
        if image.dtype != np.uint8:
            raise InputError(f"'{pair.image.name}' is no 8-bit image; convert it to 8 bits.")
        rgb = Image.fromarray(np.ascontiguousarray(to_rgb(image)))
        pixels = np.asarray(rgb.resize(square, Image.Resampling.BICUBIC), np.float32) / 255
        labels = Image.fromarray(self.task.read(pair.label).astype(np.int32))
        target = np.asarray(labels.resize(square, Image.Resampling.NEAREST), np.int64)
        return torch.from_numpy(pixels).movedim(-1, 0).contiguous(), torch.from_numpy(target)
