"""What a round learns from: targets, held-out blocks and folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.training.losses import VOID

_BLOCK = 32
"""Side in pixels of the blocks that are held out as a whole."""

_FOLD_BLOCK = 128
"""Side of those assigned to a fold as a whole, but at least four to a plane's longer side. In
smaller ones the embedding, which sees far, tells pixels by place and looks better than it is.
"""

_HELD_SHARE = 0.12
_MIN_BLOCKS = 8
_MOST_FOLDS = 4


@dataclass
class TrainingSet:
    """Annotated images as targets of class indices.

    Parameters
    ----------
    images
        With image arrays (P, H, W, C).
    class_ids
        Id of every class index.
    target, held
        Per image (P, H, W) int16: class index of a training or held-out pixel, else -1.
    fold
        Per image (P, H, W) uint8: which of `n_folds` parts a pixel belongs to.
    positions
        Per class, per image: training pixels (N, 3) as plane, row, column.
    """

    images: Sequence[LabelledImage]
    class_ids: tuple[int, ...]
    target: list[np.ndarray]
    held: list[np.ndarray]
    fold: list[np.ndarray]
    positions: list[list[np.ndarray]]

    @property
    def holds_out(self) -> bool:
        """Whether any label is kept out of training."""
        return any((held != VOID).any() for held in self.held)

    @cached_property
    def labelled_share(self) -> float:
        """Labelled part of the planes on which anything is labelled, in (0, 1]."""
        labelled = total = 0
        for target, held in zip(self.target, self.held, strict=True):
            pixels = (np.maximum(target, held) != VOID).sum((1, 2))
            labelled += int(pixels.sum())
            total += int((pixels > 0).sum()) * target[0].size
        return labelled / total

    @property
    def n_folds(self) -> int:
        """Number of folds, 2 to 4."""
        return 1 + max(int(fold.max()) for fold in self.fold)

    def counts(self) -> Tensor:
        """Training pixels per class (K,) int64."""
        return torch.tensor([sum(map(len, arrays)) for arrays in self.positions])


def training_set(
    images: Sequence[LabelledImage], class_ids: Sequence[int], seed: int
) -> TrainingSet:
    """Turn annotations into targets, hold out blocks where labels abound, and make folds.

    About a tenth of the annotated blocks is held out for an honest score, of the classes that cover
    at least eight of them, where there are two such classes; otherwise all labels train.
    """
    rng = np.random.default_rng(seed)
    index = np.full(256, VOID, np.int16)
    index[list(class_ids)] = np.arange(len(class_ids))
    targets = [index[image.effective()] for image in images]
    blocks = [_block_ids(target.shape, i, _BLOCK) for i, target in enumerate(targets)]
    held_blocks = _choose_held(targets, blocks, len(class_ids), rng)
    held, train = [], []
    for target, ids in zip(targets, blocks, strict=True):
        out = np.isin(ids, held_blocks)
        held.append(np.where(out, target, VOID).astype(np.int16))
        train.append(np.where(out, VOID, target).astype(np.int16))
    positions = [[np.argwhere(t == c) for t in train] for c in range(len(class_ids))]
    fold = _folds(train, positions, rng)
    return TrainingSet(images, tuple(class_ids), train, held, fold, positions)


def _block_ids(shape: tuple[int, int, int], image: int, side: int) -> np.ndarray:
    """Distinct number (P, H, W) int64 of every block of every plane of every image."""
    plane, row, column = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return ((image * 2**15 + plane) * 2**12 + row // side) * 2**12 + column // side


def _choose_held(
    targets: Sequence[np.ndarray],
    blocks: Sequence[np.ndarray],
    n_classes: int,
    rng: np.random.Generator,
) -> np.ndarray:
    covered = [
        np.unique(np.concatenate([b[t == c] for t, b in zip(targets, blocks, strict=True)]))
        for c in range(n_classes)
    ]
    common = [c for c in covered if len(c) >= _MIN_BLOCKS]
    rare = [c for c in covered if len(c) < _MIN_BLOCKS]
    held = np.empty(0, np.int64)
    if len(common) < 2:
        return held
    kept = np.concatenate(rare) if rare else held  # too few to spare any
    for c in common:  # one block often serves several classes
        lacking = int(len(c) * _HELD_SHARE) - len(np.intersect1d(c, held))
        free = np.setdiff1d(c, np.append(held, kept))
        if lacking > 0:
            held = np.append(held, rng.choice(free, min(lacking, len(free)), replace=False))
    left = min(len(np.setdiff1d(c, held)) for c in covered)
    return held if left else np.empty(0, np.int64)


def _folds(
    train: Sequence[np.ndarray],
    positions: Sequence[Sequence[np.ndarray]],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Folds by image where each can be spared, else halves by block, each class dealt evenly."""
    dealt = np.arange(len(train)) % _MOST_FOLDS
    n_pixels = np.array([[len(a) for a in arrays] for arrays in positions])
    if all((n_pixels[:, dealt != fold].sum(1) > 0).all() for fold in range(dealt.max() + 1)):
        return [np.full(t.shape, f, np.uint8) for t, f in zip(train, dealt, strict=True)]
    sides = [min(_FOLD_BLOCK, max(_BLOCK, max(t.shape[1:]) // 4)) for t in train]
    blocks = [
        _block_ids(t.shape, i, side) for i, (t, side) in enumerate(zip(train, sides, strict=True))
    ]
    covered = [
        np.unique(np.concatenate([b[t == c] for t, b in zip(train, blocks, strict=True)]))
        for c in range(len(positions))
    ]
    second: dict[int, bool] = {}
    for own in sorted(covered, key=len):  # the rarest class is dealt out first
        balance = sum(2 * second[block] - 1 for block in own if block in second)
        for block in rng.permuted([block for block in own if block not in second]):
            second[block] = balance < 0
            balance += 1 if second[block] else -1
    chosen = [block for block, inside in second.items() if inside]
    fold = [np.isin(b, chosen).astype(np.uint8) for b in blocks]
    for c, arrays in enumerate(positions):
        places = [tuple(pixels.T) for pixels in arrays]
        halves = np.concatenate([f[at] for f, at in zip(fold, places, strict=True)])
        if len(np.unique(halves)) < 2:  # both halves must know the class: every other pixel
            for f, at in zip(fold, places, strict=True):
                f[at] = np.arange(len(at[0])) % 2 == c % 2
    return fold
