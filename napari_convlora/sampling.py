"""What a round learns from: targets, held-out blocks, folds, and a pool of cached views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from napari_convlora.annotations import LabelledImage
from napari_convlora.data import Normalizer, View, crop, draw_view, resize
from napari_convlora.detail import DetailBranch, region_features
from napari_convlora.losses import VOID
from napari_convlora.tiles import Tile, sample

_BLOCK = 32
"""Side in pixels of the blocks that are held out as a whole."""

_FOLD_BLOCK = 128
"""Side of those assigned to a fold as a whole, but at least four to a plane's longer side. In
smaller ones the embedding, which sees far, tells pixels by place and looks better than it is.
"""

_HELD_SHARE = 0.12
_MIN_BLOCKS = 8
_MOST_FOLDS = 4
_PIXELS_PER_CLASS = 30_000
_REGION = 512
_PIXELS = 120_000
_SURROUNDINGS = 4096

_MOST_SINGLE = 0.2
"""Part of a region up to which its pixels are scored one by one, which costs each of them more."""


Context = Callable[[int, int, slice, slice], Sequence[Tile]]
"""From image, plane, rows and columns to the frozen embeddings of the tiles around that region."""


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


def pixel_samples(
    data: TrainingSet, normalizer: Normalizer, seed: int, context: Context
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Describe labelled pixels and their surroundings to the detail branch, region by region.

    At most 30,000 random pixels per class are used, and of many classes 120,000 altogether.

    Parameters
    ----------
    data, normalizer, seed
        What to draw from, how images are normalised, and the seed of the draw.
    context
        Gives the embeddings around a region.

    Yields
    ------
    features, target, fold, surroundings : ndarray
        (N, F) float32, (N,) int64, (N,) uint8, and (M, F) float32 of random pixels of the region.
    """
    rng = np.random.default_rng(seed)
    most = min(_PIXELS_PER_CLASS, _PIXELS // len(data.positions))
    for i, image in enumerate(data.images):
        rows = []
        for c, arrays in enumerate(data.positions):
            share = min(1.0, most / max(1, sum(map(len, arrays))))
            keep = arrays[i][rng.random(len(arrays[i])) < share] if share < 1 else arrays[i]
            rows.append(np.column_stack([keep, np.full(len(keep), c)]))
        pixels = np.concatenate(rows)
        regions = np.column_stack([pixels[:, 0], pixels[:, 1:3] // _REGION])
        for plane, row, column in np.unique(regions, axis=0):
            inside = pixels[(regions == (plane, row, column)).all(1)]
            block = _block(image.image, row, column)
            features = region_features(image.image[plane], normalizer, *block)
            tiles = context(i, plane, *block)
            corner, extent = (block[0].start, block[1].start), features.shape[:2]
            around = rng.integers(extent, size=(_SURROUNDINGS, 2)) + corner

            yield (
                _seen(features, tiles, block, inside[:, 1:3].T),
                inside[:, 3].astype(np.int64),
                data.fold[i][tuple(inside[:, :3].T)],
                _seen(features, tiles, block, around.T),
            )


def _seen(
    features: np.ndarray, tiles: Sequence[Tile], block: tuple[slice, slice], at: np.ndarray
) -> np.ndarray:
    """Return what the detail branch sees (N, F) of pixels (2, N) that lie in `block`."""
    local = features[at[0] - block[0].start, at[1] - block[1].start]
    return np.concatenate([local, sample(tiles, *at)], axis=1) if tiles else local


def _block(image: np.ndarray, row: int, column: int) -> tuple[slice, slice]:
    """Rows and columns of a block of 512 px of (P, H, W, C), smaller at the image's end."""
    top, left = row * _REGION, column * _REGION
    return (
        slice(top, min(top + _REGION, image.shape[1])),
        slice(left, min(left + _REGION, image.shape[2])),
    )


def view_image(data: TrainingSet, view: View, normalizer: Normalizer, tile: int) -> Tensor:
    """Model input (3, tile, tile) of a view; the square is cut before it is normalised."""
    plane = data.images[view.image].image[view.plane]
    square = normalizer(np.asarray(crop(plane, view.top, view.left, view.size)))
    local = View(0, 0, 0, 0, view.size, view.turns, view.flip, view.gain, view.offset)
    return local.image_tensor(square, tile)


def detail_block(
    data: TrainingSet,
    where: tuple[int, int, int, int],
    normalizer: Normalizer,
    whole: DetailBranch,
    blind: Sequence[DetailBranch],
    context: Context,
) -> np.ndarray:
    """Detail logits of a 512 px block, each pixel scored by a branch that never saw it.

    Where it was fitted, the branch looks better than it is. The one that is blind to a fold is as
    wrong there as the branch will be on new pixels, or on new images where folds are images. So the
    adapted SAM learns to correct what the branch really gets wrong, and both can be compared.

    Parameters
    ----------
    where
        Image, plane, and the block's row and column.
    whole, blind
        The branch, and those that were fitted on all folds but one, in the order of the folds.
    context
        Gives the embeddings around a region.

    Returns
    -------
    ndarray
        (K, h, w) float32, smaller than the block at the image's end.
    """
    image, plane, row, column = where
    block = _block(data.images[image].image, row, column)
    features = region_features(data.images[image].image[plane], normalizer, *block)
    tiles = context(image, plane, *block)
    fold = data.fold[image][plane][block]
    known = np.maximum(data.target[image][plane][block], data.held[image][plane][block]) != VOID
    logits = whole.logits(features, tiles, *block)
    corner = np.array([[block[0].start], [block[1].start]])
    for i, branch in enumerate(blind):
        inside = known & (fold == i)
        if inside.mean() > _MOST_SINGLE:
            logits[:, inside] = branch.logits(features, tiles, *block)[:, inside]
        elif inside.any():  # strokes
            seen = _seen(features, tiles, block, np.stack(inside.nonzero()) + corner)
            logits[:, inside] = branch.at(seen)
    return logits


def view_detail(
    view: View,
    shape: tuple[int, int],
    tile: int,
    block: Callable[[tuple[int, int, int, int]], np.ndarray],
) -> Tensor:
    """Cut the detail logits (K, tile, tile) of a view out of blocks.

    The filters do not know directions, so a turned view has the turned logits.

    Parameters
    ----------
    view
        What to cut.
    shape
        Height and width of its plane.
    tile
        Side of the result.
    block
        Gives `detail_block` of an image, plane, row and column.
    """
    y0, y1 = max(view.top, 0), min(view.top + view.size, shape[0])
    x0, x1 = max(view.left, 0), min(view.left + view.size, shape[1])
    rows, columns = (range(a // _REGION, -(-b // _REGION)) for a, b in ((y0, y1), (x0, x1)))
    logits = np.concatenate(
        [
            np.concatenate([block((view.image, view.plane, r, c)) for c in columns], axis=2)
            for r in rows
        ],
        axis=1,
    )
    top, left = rows.start * _REGION, columns.start * _REGION
    inside = logits[:, y0 - top : y1 - top, x0 - left : x1 - left].transpose(1, 2, 0)
    square = crop(inside, view.top - y0, view.left - x0, view.size).transpose(2, 0, 1)
    return view.orient(resize(torch.from_numpy(square), tile)).contiguous()


def view_target(data: TrainingSet, view: View, tile: int, held: bool = False) -> Tensor:
    """Target (tile, tile) int64 of a view, training or held-out pixels."""
    source = data.held if held else data.target
    return view.label_tensor(source[view.image][view.plane], tile)


def view_pool(data: TrainingSet, side: int, size: int, seed: int) -> list[View]:
    """Draw `size` views around labelled pixels, the classes in turn.

    Every pixel has a fixed random rank, and what its view looks like depends on nothing else: when
    labels are added, most views stay the same, and so do their frozen features.
    """
    ranked = []
    for arrays in data.positions:
        pixels = np.concatenate([np.insert(a, 0, i, axis=1) for i, a in enumerate(arrays)])
        rank = _scramble(pixels, seed)
        first = np.argpartition(rank, size)[:size] if len(rank) > size else np.arange(len(rank))
        if len(first):
            ranked.append(pixels[first[np.argsort(rank[first])]])
    views = []
    for number in range(size):
        turn, c = divmod(number, len(ranked))
        again, place = divmod(turn, len(ranked[c]))
        image, *pixel = map(int, ranked[c][place])
        rng = np.random.default_rng([seed, again, image, *pixel])
        shape = data.target[image].shape[1:]
        views.append(draw_view(image, (pixel[0], pixel[1], pixel[2]), shape, side, rng))
    return views


def _scramble(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random number (N,) uint64 of each row of `pixels` (N, 4), by multiply and shift."""
    found = np.full(len(pixels), seed, np.uint64)
    for column in pixels.T:
        found = (found ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
        found *= np.uint64(0xBF58476D1CE4E5B9)
        found ^= found >> np.uint64(32)
    return found
