from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.tiles import Tile
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.training.dataset import TrainingSet, training_set
from napari_convlora.training.detail_samples import detail_block, pixel_samples, view_detail
from napari_convlora.training.losses import VOID
from napari_convlora.training.views import View, view_image, view_pool, view_target

UNIT = Normalizer((0.0,), (1.0,))


def nothing(image: int, plane: int, rows: slice, columns: slice) -> list[Tile]:
    """Stand for the context of a branch that reads filters alone."""
    return []


def picture(annotations: np.ndarray, seed: int = 0) -> LabelledImage:
    """Random grey pixels, each of a value of its own, under `annotations` (P, H, W)."""
    values = np.random.default_rng(seed).permutation(annotations.size) / annotations.size
    image = values.reshape(*annotations.shape, 1).astype(np.float32)
    return LabelledImage(image, annotations)


def dense(height: int = 300, width: int = 300, n_classes: int = 2) -> np.ndarray:
    rows = np.arange(height)[:, None] * n_classes // height
    return np.broadcast_to(rows + 1, (1, height, width)).astype(np.int32)


def held_blocks_are_apart(data: TrainingSet) -> bool:
    """Whether few held-out pixels touch a training pixel."""
    touching = held = 0
    for train, out in zip(data.target, data.held, strict=True):
        near = np.zeros(train.shape, bool)
        for axis, shift in ((1, 1), (1, -1), (2, 1), (2, -1)):
            near |= np.roll(train != VOID, shift, axis)
        held += (out != VOID).sum()
        touching += (near & (out != VOID)).sum()
    return held > 0 and touching < 0.25 * held


def test_targets_are_class_indices_and_unlabelled_is_void() -> None:
    annotations = np.zeros((1, 10, 10), np.int32)
    annotations[0, 0, 0], annotations[0, 5, 5] = 7, 3
    data = training_set([picture(annotations)], [3, 7], seed=0)
    assert data.target[0][0, 0, 0] == 1
    assert data.target[0][0, 5, 5] == 0
    assert (data.target[0] != VOID).sum() == 2
    assert data.counts().tolist() == [1, 1]
    assert data.positions[1][0].tolist() == [[0, 0, 0]]


def test_reviewed_region_counts_as_background() -> None:
    annotations = np.zeros((1, 10, 10), np.int32)
    annotations[0, 0, 0] = 2
    reviewed = np.zeros((1, 10, 10), bool)
    reviewed[0, :4, :4] = True
    image = LabelledImage(picture(annotations).image, annotations, reviewed)
    assert training_set([image], [1, 2], 0).counts().tolist() == [15, 1]


@pytest.mark.parametrize("seed", range(5))
def test_held_out_blocks_never_train(seed: int) -> None:
    data = training_set([picture(dense()), picture(dense(200, 400))], [1, 2], seed)
    assert data.holds_out
    for train, held, labels in zip(data.target, data.held, (dense(), dense(200, 400)), strict=True):
        assert not ((train != VOID) & (held != VOID)).any()
        np.testing.assert_array_equal(np.maximum(train, held), labels - 1)
    share = sum((h != VOID).sum() for h in data.held) / (300 * 300 + 200 * 400)
    assert 0.05 < share < 0.25
    assert held_blocks_are_apart(data)
    for arrays in data.positions:
        for i, pixels in enumerate(arrays):
            assert (data.held[i][tuple(pixels.T)] == VOID).all()


def test_every_class_is_scored_on_held_out_pixels() -> None:
    data = training_set([picture(dense(n_classes=3))], [1, 2, 3], 0)
    assert set(np.unique(data.held[0])) == {VOID, 0, 1, 2}


def test_a_rare_class_keeps_its_labels_while_others_are_held_out() -> None:
    annotations = dense(n_classes=3)
    annotations[0, 40:44, 40:44] = 4
    data = training_set([picture(annotations)], [1, 2, 3, 4], 0)
    assert set(np.unique(data.held[0])) == {VOID, 0, 1, 2}
    assert (data.target[0] == 3).sum() == 16


def test_the_labelled_share_is_that_of_planes_with_labels() -> None:
    whole = training_set([picture(dense())], [1, 2], 0)
    assert whole.holds_out
    assert whole.labelled_share == 1
    strokes = np.zeros((3, 100, 100), np.int32)
    strokes[1, 10, :50], strokes[1, 20, :50] = 1, 2
    assert training_set([picture(strokes)], [1, 2], 0).labelled_share == 0.01
    both = training_set([picture(strokes), picture(dense(100, 100))], [1, 2], 0)
    assert both.labelled_share == 0.505


def test_few_labels_all_train() -> None:
    annotations = np.zeros((1, 200, 200), np.int32)
    annotations[0, 10:60, 10], annotations[0, 100, 50:150] = 1, 2
    data = training_set([picture(annotations)], [1, 2], 0)
    assert not data.holds_out
    assert data.counts().tolist() == [50, 100]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 9999),
    n_classes=st.integers(2, 25),
    side=st.sampled_from([20, 90, 130]),
    density=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_every_class_keeps_training_pixels(
    seed: int, n_classes: int, side: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    annotations = rng.integers(1, n_classes + 1, (1, side, side))
    annotations[rng.random(annotations.shape) > density] = 0
    ids = [int(i) for i in np.unique(annotations) if i]
    assume(len(ids) > 1)
    data = training_set([picture(annotations.astype(np.int32))], ids, seed)
    assert (data.counts() > 0).all()
    assert 0 < data.fold[0][data.target[0] != VOID].mean() < 1, "both halves hold labels"
    assert (data.held[0] != VOID).sum() < 0.5 * (annotations != 0).sum()


def test_one_stroke_per_class_is_enough_for_both_halves() -> None:
    annotations = np.zeros((1, 96, 96), np.int32)
    annotations[0, 5:90, 10], annotations[0, 5:90, 80] = 1, 2
    data = training_set([picture(annotations)], [1, 2], 0)
    fold = data.fold[0][data.target[0] != VOID]
    assert fold.any()
    assert not fold.all()


def test_a_class_of_two_blocks_is_in_both_halves() -> None:
    annotations = dense()
    annotations[0, 5, 5], annotations[0, 250, 250] = 3, 3
    for seed in range(10):
        data = training_set([picture(annotations)], [1, 2, 3], seed)
        fold = data.fold[0][data.target[0] == 2]
        assert sorted(fold) == [0, 1]


def test_a_class_of_one_spot_is_in_both_halves() -> None:
    annotations = dense()
    annotations[0, 40:44, 40:44] = 3
    data = training_set([picture(annotations)], [1, 2, 3], 0)
    assert data.fold[0][data.target[0] == 2].mean() == 0.5


def test_folds_are_large_pieces_of_a_plane() -> None:
    """Near a pixel of its own fold alone, the embedding cannot tell a pixel by its place."""
    data = training_set([picture(dense(500, 512))], [1, 2], 0)
    trained = data.target[0][0] != VOID
    for top in range(0, 500, 128):
        for left in range(0, 512, 128):
            block = np.s_[top : top + 128, left : left + 128]
            assert len(np.unique(data.fold[0][0][block][trained[block]])) == 1


def test_a_class_whose_blocks_others_dealt_is_in_both_halves() -> None:
    annotations = np.zeros((1, 512, 512), np.int32)
    for c, blocks in ((1, (0, 1)), (2, (1, 2)), (3, (0, 2))):  # two of three are in one half
        for block in blocks:
            annotations[0, 30 * c : 30 * c + 9, 128 * block + 10 : 128 * block + 20] = c
    for seed in range(10):
        data = training_set([picture(annotations)], [1, 2, 3], seed)
        for c in range(3):
            assert set(data.fold[0][data.target[0] == c]) == {0, 1}


def test_images_are_the_folds_where_each_can_be_spared() -> None:
    data = training_set([picture(dense(40, 40)) for _ in range(5)], [1, 2], 0)
    assert [fold.mean() for fold in data.fold] == [0, 1, 2, 3, 0]
    assert data.n_folds == 4


def test_blocks_are_dealt_where_one_image_alone_shows_a_class() -> None:
    other = dense(40, 40).copy()
    other[other == 2] = 1
    data = training_set([picture(dense(100, 100)), picture(other)], [1, 2], 0)
    assert data.n_folds == 2
    second = data.fold[0][data.target[0] == 1]
    assert 0 < second.mean() < 1


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (training_set([picture(dense())], [1, 2], seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.held[0], again.held[0])
    np.testing.assert_array_equal(first.fold[0], again.fold[0])
    assert (first.held[0] != other.held[0]).any()


def test_pixel_samples_are_the_training_pixels_with_their_fold() -> None:
    annotations = np.zeros((2, 40, 700), np.int32)
    annotations[0, 10, :600], annotations[1, 20, 300:650] = 1, 2
    image = picture(annotations)
    data = training_set([image], [1, 2], 0)
    features, target, fold, surroundings = (
        np.concatenate(part) for part in zip(*pixel_samples(data, UNIT, 0, nothing), strict=True)
    )
    assert features.shape == (data.counts().sum(), 24)
    assert surroundings.shape[1] == 24
    assert np.bincount(target).tolist() == data.counts().tolist()
    assert fold.sum() == data.fold[0][data.target[0] != VOID].sum()


def test_pixel_samples_bound_a_dense_image() -> None:
    data = training_set([picture(dense(400, 400))], [1, 2], 0)
    target = np.concatenate([t for _, t, *_ in pixel_samples(data, UNIT, 0, nothing)])
    assert len(target) < data.counts().sum() / 2
    assert (np.bincount(target) > 20_000).all()


def test_pixel_samples_leave_held_out_pixels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(dense())
    data = training_set([image], [1, 2], 0)
    monkeypatch.setattr("napari_convlora.model.detail_branch.filter_bank", lambda array: array)
    seen = np.concatenate([f for f, *_ in pixel_samples(data, UNIT, 0, nothing)])
    held = image.image[0][data.held[0][0] != VOID]
    assert not np.isin(seen, held).any()
    assert np.isin(seen, image.image).all()


def test_pixel_samples_see_the_context_of_their_very_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napari_convlora.model.detail_branch.filter_bank", lambda array: array)
    annotations = dense(40, 700)
    image = picture(annotations)
    data = training_set([image], [1, 2], 0)
    pixels = torch.from_numpy(np.ascontiguousarray(image.image[0, :, :, 0]))
    square = torch.nn.functional.pad(pixels, (0, 0, 0, 660))[
        None
    ]  # a tile at the image's own scale

    def echo(_image: int, _plane: int, rows: slice, columns: slice) -> list[Tile]:
        return [Tile(0, 0, 700, square)]

    for features, _, _, surroundings in pixel_samples(data, UNIT, 0, echo):
        np.testing.assert_allclose(features[:, 0], features[:, 1], atol=1e-4)
        np.testing.assert_allclose(surroundings[:, 0], surroundings[:, 1], atol=1e-4)


class Memory:
    """Stands for a detail branch: scores 1 for a pixel it was fitted on, 0 for others."""

    def __init__(self, seen: np.ndarray) -> None:
        self.seen = seen

    def logits(self, features: np.ndarray, *_: Any) -> np.ndarray:
        return np.isin(features[..., 0], self.seen)[None].astype(np.float32)

    at = logits


def cut_detail(data: TrainingSet, view: View, whole: Any, blind: list[Any]) -> torch.Tensor:
    def block(where: tuple[int, int, int, int]) -> np.ndarray:
        return detail_block(data, where, UNIT, whole, blind, nothing)

    return view_detail(view, data.target[view.image].shape[1:], 64, block)


@pytest.mark.parametrize("most_single", [0, 1])
@pytest.mark.parametrize("turns", [0, 1])
def test_detail_logits_come_from_the_branch_that_did_not_see_the_pixel(
    monkeypatch: pytest.MonkeyPatch, turns: int, most_single: int
) -> None:
    monkeypatch.setattr("napari_convlora.training.detail_samples._MOST_SINGLE", most_single)
    monkeypatch.setattr("napari_convlora.model.detail_branch.filter_bank", lambda array: array)
    annotations = dense(100, 100).copy()
    annotations[0, 40:50] = 0
    image = picture(annotations)
    data = training_set([image], [1, 2], 0)
    features, _, fold, _ = (
        np.concatenate(part) for part in zip(*pixel_samples(data, UNIT, 0, nothing), strict=True)
    )
    blind = [Memory(features[fold != i, 0]) for i in range(2)]
    view = View(0, 0, 10, 20, 64, turns=turns, flip=True)
    whole = Memory(image.image)  # knows every pixel, labelled or not
    scores = cut_detail(data, view, whole, blind)
    labelled = view_target(data, view, 64) != VOID
    assert labelled.any()
    assert not scores[0][labelled].any()
    assert scores[0][~labelled].all(), "where nobody labelled, the whole branch answers"
    swapped = cut_detail(data, view, whole, blind[::-1])
    assert swapped[0][labelled].all()


@pytest.mark.parametrize("most_single", [0, 1])
@pytest.mark.parametrize(("top", "left", "size"), [(0, 0, 64), (-10, 30, 64), (5, 7, 32)])
def test_all_that_a_view_shows_is_in_register(
    monkeypatch: pytest.MonkeyPatch, top: int, left: int, size: int, most_single: int
) -> None:
    monkeypatch.setattr("napari_convlora.training.detail_samples._MOST_SINGLE", most_single)
    monkeypatch.setattr("napari_convlora.model.detail_branch.filter_bank", lambda array: array)
    monkeypatch.setattr(
        "napari_convlora.training.detail_samples._REGION", 24
    )  # the view spans several blocks
    annotations = np.kron(np.random.default_rng(1).integers(1, 3, (1, 12, 12)), np.ones((1, 8, 8)))
    annotations = annotations.astype(np.int32)
    image = LabelledImage((annotations[..., None] - 1).astype(np.float32), annotations)
    data = training_set([image], [1, 2], 0)

    class Echo:
        def logits(self, features: np.ndarray, *_: Any) -> np.ndarray:
            return features.transpose(2, 0, 1)

        def at(self, features: np.ndarray) -> np.ndarray:
            return features.T

    view = View(0, 0, top, left, size, turns=3, flip=True)
    target = view_target(data, view, 64)
    pixels = view_image(data, view, UNIT, 64)[0]
    detail = cut_detail(data, view, Echo(), [Echo(), Echo()])[0]
    inside = target != VOID
    torch.testing.assert_close(pixels, detail)
    assert ((pixels > 0.5).long() == target)[inside].float().mean() > 0.93


def test_view_target_separates_training_from_held_out_pixels() -> None:
    data = training_set([picture(dense(128, 600))], [1, 2], 0)
    view = View(0, 0, 0, 0, 128)
    train, held = (view_target(data, view, 128, held=held) for held in (False, True))
    assert not ((train != VOID) & (held != VOID)).any()
    assert (torch.maximum(train, held) != VOID).all()


def test_pool_covers_every_class_and_image(scene: Callable) -> None:
    images = [scene(seed=i)[0] for i in range(3)]
    data = training_set(images, [1, 2, 3], 0)
    pool = view_pool(data, 32, 40, seed=0)
    assert len(pool) == 40
    assert {view.image for view in pool} == {0, 1, 2}
    seen = set()
    for view in pool:
        seen |= set(view_target(data, view, 32).unique().tolist())
    assert seen >= {0, 1, 2}
    assert pool == view_pool(data, 32, 40, seed=0)
    assert pool != view_pool(data, 32, 40, seed=1)


def test_views_are_balanced_by_class_not_by_pixel() -> None:
    annotations = np.ones((1, 40, 80), np.int32)
    annotations[0, 0, 0] = 2
    data = training_set([picture(annotations)], [1, 2], 0)
    pool = view_pool(data, 5, 40, 0)
    assert sum((view_target(data, view, 5) == 1).any() for view in pool) >= 20
    assert len(set(pool)) > 30, "a single pixel is shown in many ways"


def test_most_views_stay_when_a_stroke_is_added() -> None:
    annotations = np.zeros((1, 2000, 2000), np.int32)
    annotations[0, 100:110, 100:600] = 1
    annotations[0, 900:910, 900:1400] = 2
    before = view_pool(training_set([picture(annotations)], [1, 2], 0), 256, 24, 0)
    annotations[0, 1500:1510, 100:200] = 1
    after = view_pool(training_set([picture(annotations)], [1, 2], 0), 256, 24, 0)
    assert after != before
    assert len(set(before) & set(after)) >= 15
