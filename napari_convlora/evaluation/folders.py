"""Scores of a folder of masks against a folder of labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_convlora.config import UNLABELLED
from napari_convlora.errors import InputError
from napari_convlora.evaluation.metrics import Scores, confusion, scores
from napari_convlora.formats.opening import open_image, read_labels
from napari_convlora.formats.plain import READABLE_SUFFIXES
from napari_convlora.images.planes import size_text


@dataclass(frozen=True)
class Evaluation:
    """A folder of predictions against a folder of labels.

    Parameters
    ----------
    scores
        Of the whole set: one confusion matrix, summed over its images.
    images
        Scores of each image, by stem.
    ignore
        Target id whose pixels were left out.
    unmatched
        Stems of predictions for which there are no labels; they were not scored.
    """

    scores: Scores
    images: Mapping[str, Scores]
    ignore: int | None
    unmatched: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the evaluation for ``json.dumps``."""
        return {
            "ignore": self.ignore,
            "scores": self.scores.as_dict(),
            "images": {stem: scores.as_dict() for stem, scores in self.images.items()},
            "unmatched": list(self.unmatched),
        }


def evaluate_folders(
    predictions: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    ignore: int | None = UNLABELLED,
) -> Evaluation:
    """Return how well the masks in one folder agree with those in another.

    Parameters
    ----------
    predictions, labels
        Folders of label images, matched by name without suffix (``a.ome.tif`` is ``a``).
        Every id found at a compared pixel counts as a class, but the ignored one does not.
    ignore
        As in :func:`confusion`.

    Raises
    ------
    InputError
        A folder is absent, two files share a stem, labels have no prediction, sizes differ, a
        file cannot be read, or nothing is left to compare.
    """
    predicted, wanted = _by_stem(Path(predictions)), _by_stem(Path(labels))
    if not wanted:
        raise InputError(f"'{labels}' holds no label images; choose the folder that does.")
    missing = sorted(set(wanted) - set(predicted))
    if missing:
        raise InputError(
            f"'{predictions}' has no prediction for {len(missing)} of {len(wanted)} label "
            f"images ({', '.join(missing)}); predict them or move their labels away."
        )
    matrices = {stem: _count_pair(predicted[stem], wanted[stem], ignore) for stem in sorted(wanted)}
    ids = sorted({i for own, _ in matrices.values() for i in own})
    if not ids:
        raise InputError(
            f"Every pixel in '{labels}' has the ignored id {ignore}; ignore another id or none."
        )
    total = np.zeros((len(ids), len(ids)), np.int64)
    for own, matrix in matrices.values():
        where = np.searchsorted(ids, own)
        total[np.ix_(where, where)] += matrix
    return Evaluation(
        scores=scores(total, ids, ignore),
        images={stem: scores(matrix, own, ignore) for stem, (own, matrix) in matrices.items()},
        ignore=ignore,
        unmatched=tuple(sorted(set(predicted) - set(wanted))),
    )


def _count_pair(prediction: Path, label: Path, ignore: int | None) -> tuple[list[int], np.ndarray]:
    target = _read(label)
    depth, height, width = target.shape
    guess = _read(prediction, (depth, height, width))
    if ignore is not None:
        kept = target != ignore
        target, guess = target[kept], guess[kept]
    ids = np.union1d(target, guess).tolist()
    return ids, confusion(guess, target, ids, ignore=None)


def _read(path: Path, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Return labels (P, H, W) of a file, or of a zarr as `predict` writes it."""
    if not os.path.isdir(path):  # Path's would raise where it may not look
        return read_labels(path, shape)
    planes = open_image(path)
    labels = np.stack([plane[:, :][..., 0] for plane in planes])
    if shape is not None and labels.shape != shape:
        raise InputError(
            f"'{path.name}' is {size_text(labels.shape)}, but its labels are {size_text(shape)}; "
            "compare masks of one size."
        )
    return labels


def _by_stem(folder: Path) -> dict[str, Path]:
    if not os.path.isdir(folder):
        raise InputError(f"'{folder}' is not a folder; check the path.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Hidden files are other systems' leftovers (._mask.png), not masks.
        if path.name.startswith(".") or path.suffix.lower() not in (*READABLE_SUFFIXES, ".zarr"):
            continue
        stem = path.stem[:-4] if path.stem.lower().endswith(".ome") else path.stem
        if stem in found:
            raise InputError(
                f"'{found[stem].name}' and '{path.name}' in '{folder}' share the name '{stem}'; "
                "move one of them away."
            )
        found[stem] = path
    return found
