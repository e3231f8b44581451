"""A round against the installed adapter, on held-out labels that neither has learnt from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from napari_convlora.config import UNLABELLED
from napari_convlora.evaluation.metrics import confusion, scores
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction.predict import plane_logits
from napari_convlora.training.dataset import training_set
from napari_convlora.training.losses import VOID
from napari_convlora.training.round_state import RoundState

_REGIONS = 4
"""Squares of a tile's size that are predicted twice; more would make a round much longer."""

_PIXELS = 50
"""Fewer than this say nothing."""

_RETOUCHED = 0.01
"""Erasing a greater part of the labels means that some were wrong."""

_WAIT = 10.0
"""Seconds after which no further square is begun if somebody has pressed Stop."""

Learnt = Mapping[str, tuple[tuple[int, ...], np.ndarray]]
"""By image name, shape (P, H, W) and `numpy.packbits` of the pixels that were learnt from."""


@dataclass(frozen=True, eq=False)
class Rival:
    """The installed adapter, and what it learnt from; empty where that is not known."""

    adapter: Adapter
    learnt: Learnt


def learnt_pixels(images: Sequence[LabelledImage], adapter: Adapter) -> Learnt:
    """Return which pixels of `images` a round of these images, which gave `adapter`, learnt from.

    Images that share a name count as one that was learnt from altogether.
    """
    data = training_set(images, [c.id for c in adapter.classes], adapter.summary["seed"])
    names = [image.name for image in images]
    return {
        name: (target.shape, np.packbits((target != VOID) | (names.count(name) > 1)))
        for name, target in zip(names, data.target, strict=True)
    }


def taken_back(images: Sequence[LabelledImage], learnt: Learnt) -> bool:
    """Return whether labels that an adapter learnt from were erased, not only retouched.

    What it says elsewhere may rest on them, so it is no longer what the user left uncorrected.
    Images that share a name are not asked, nor are those of another size than then.
    """
    names = [image.name for image in images]
    known = erased = 0
    for image in images:
        before = _unpacked(learnt, image.name, image.annotations.shape)
        if before is not None and names.count(image.name) == 1:
            blank = np.asarray(image.annotations) == UNLABELLED
            if image.reviewed is not None:
                blank &= ~image.reviewed.astype(bool, copy=False)
            known += int(np.count_nonzero(before))
            erased += int(np.count_nonzero(before & blank))
    return erased > _RETOUCHED * known


def most_tiles(run: RoundState, rival: Rival | None) -> int:
    """Return how many tiles `compare` will predict at most."""
    if rival is None or not rival.learnt:
        return 0
    held = sum(bool((truth != VOID).any()) for truth in run.data.held)
    return 2 * _REGIONS * held


def compare(run: RoundState, rival: Rival | None) -> dict[str, Any]:
    """Return mean IoU of both adapters, or why they cannot be compared; empty without a rival.

    Parameters
    ----------
    run
        At the end of its training.
    rival
        The installed adapter.

    Returns
    -------
    dict
        ``installed``, ``new`` and ``pixels``, or ``why``; see `evaluation.gate.decide`.
    """
    if rival is None:
        return {}
    old = rival.adapter
    if not old.fits(run.backbone):
        return {"why": "the backbone is another one than before"}
    if [c.id for c in old.classes] != run.ids.tolist():
        return {"why": "the classes are others than before"}
    if len(old.normalizer.low) != len(run.normalizer.low):
        return {"why": "the images have other channels than before"}
    if not rival.learnt:
        return {"why": "it is not known what the installed adapter learnt from"}
    fresh = [_unseen(run, i, rival.learnt) for i in range(len(run.data.images))]
    ids = np.array([c.id for c in old.classes])
    matrix = np.zeros((2, len(ids), len(ids)), np.int64)
    before, begun = None, time.monotonic()
    for image, plane, region in _regions(fresh, run.side):
        if run.control.hurry:
            return {"why": "it was broken off"}
        if run.control.stopping and time.monotonic() - begun > _WAIT:
            break  # what is compared until now may do
        before = before or old.build(run.backbone, run.device)
        pixels = run.data.images[image].image[plane][region]
        truth = np.where(fresh[image][plane][region], run.data.held[image][plane][region], VOID)
        fresh[image][plane][region] = False
        for k, (model, normalizer, scale) in enumerate(
            (
                (before, old.normalizer, old.pixel_scale),
                (run.model, run.normalizer, run.pixel_scale),
            )
        ):
            steps = Returning(plane_logits(model, pixels, normalizer, scale, cache=run.cache))
            for _ in steps:
                pass
            inside = truth != VOID
            found = steps.value.argmax(0)[inside]
            matrix[k] += confusion(found, truth[inside], range(len(ids)), ignore=None)
    counts = matrix[0].sum(1)
    if counts.sum() < _PIXELS or (counts > 0).sum() < 2:
        if run.control.stopping and any(image.any() for image in fresh):
            return {"why": "it was stopped, and a comparison would have taken long"}
        return {"why": "too few labels are held out that neither has learnt from"}
    installed, new = (
        float(np.mean([iou for i, iou in scores(m, range(len(ids))).iou.items() if counts[i]]))
        for m in matrix
    )
    return {"installed": installed, "new": new, "pixels": int(counts.sum())}


def _unseen(run: RoundState, index: int, learnt: Learnt) -> np.ndarray:
    """Held-out pixels (P, H, W) bool of an image that the installed adapter did not learn from."""
    held = run.data.held[index] != VOID
    name = run.data.images[index].name
    if name not in learnt:
        return held
    known = _unpacked(learnt, name, held.shape)
    return np.zeros_like(held) if known is None else held & ~known


def _unpacked(learnt: Learnt, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return which pixels (P, H, W) of an image were learnt from; None if it had another size."""
    then, bits = learnt.get(name, ((), None))
    if bits is None or then != shape:
        return None
    return np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape)


def _regions(fresh: list[np.ndarray], side: int) -> Iterator[tuple[int, int, Any]]:
    """Squares around pixels of `fresh` that are still True, image by image in turn."""
    for n in range(_REGIONS):
        for i in np.roll(range(len(fresh)), -n):
            left = np.argwhere(fresh[i])
            if len(left):
                plane, row, column = left[len(left) // 2]
                top, start = max(0, row - side // 2), max(0, column - side // 2)
                yield int(i), int(plane), np.s_[top : top + side, start : start + side]
                break
