from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_convlora.data import Normalizer
from napari_convlora.detail import (
    HALO,
    DetailBranch,
    filter_bank,
    fit,
    forest_opinion,
    mix,
    n_features,
    region_features,
)
from napari_convlora.tiles import Tile, sample


def stripes(height: int = 90, width: int = 110) -> np.ndarray:
    """Flat grey on the left, fine vertical stripes of the same mean on the right."""
    image = np.full((height, width, 1), 0.5, np.float32)
    image[:, width // 2 :: 2] = 0.8
    image[:, width // 2 + 1 :: 2] = 0.2
    return image


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(20, 33), (3, 200)])
def test_bank_describes_every_pixel(channels: int, height: int, width: int) -> None:
    image = np.random.default_rng(0).random((height, width, channels), np.float32)
    features = filter_bank(image)
    assert features.shape == (height, width, n_features(channels))
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 1), (2, 2, 3)])
def test_bank_accepts_the_smallest_images(shape: tuple[int, int, int]) -> None:
    features = filter_bank(np.random.default_rng(0).random(shape, np.float32))
    assert features.shape == (*shape[:2], n_features(shape[2]))
    assert np.isfinite(features).all()


def test_a_region_sees_the_same_as_the_whole_image() -> None:
    plane = np.random.default_rng(0).random((300, 280, 2)).astype(np.float32)
    normalizer = Normalizer((0.0, 0.0), (1.0, 1.0))
    whole = filter_bank(plane)
    region = region_features(plane, normalizer, slice(100, 170), slice(200, 300))
    assert region.shape == (70, 80, n_features(2))
    np.testing.assert_allclose(region, whole[100:170, 200:280], atol=2e-3)
    assert np.abs(whole[100:170, 200:280] - filter_bank(plane[100:170, 200:280])).max() > 2e-2
    assert HALO >= 48


def test_branch_learns_a_texture_and_scores_every_pixel() -> None:
    features = filter_bank(stripes())
    target = torch.zeros(90, 110, dtype=torch.int64)
    target[:, 55:] = 1
    torch.manual_seed(0)
    branch = DetailBranch(1, 0, 2)
    losses = list(fit(branch, torch.from_numpy(features).flatten(0, 1), target.flatten(), steps=60))
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    logits = branch.logits(features, [], slice(0, 90), slice(0, 110))
    assert logits.shape == (2, 90, 110)
    inside = np.abs(np.arange(110) - 55) > 4
    assert (logits.argmax(0) == target.numpy())[:, inside].mean() > 0.98


def test_branch_reads_context_where_filters_see_nothing() -> None:
    """Two halves of the same grey, told apart by an embedding of 8 tokens a side."""
    features = filter_bank(np.full((64, 64, 1), 0.5, np.float32))
    values = torch.zeros(2, 8, 8)
    values[0, :, 4:] = 1
    tiles = [Tile(0, 0, 64, values)]
    rows, columns = (part.ravel() for part in np.mgrid[:64, :64])
    target = torch.from_numpy((columns >= 32).astype(np.int64))

    def accuracy(context: int) -> float:
        torch.manual_seed(0)
        branch = DetailBranch(1, context, 2)
        known = features.reshape(-1, 24)
        if context:
            known = np.concatenate([known, sample(tiles, rows, columns)], axis=1)
        list(fit(branch, torch.from_numpy(known), target, steps=60))
        region = slice(0, 64), slice(0, 64)
        logits = branch.logits(features, tiles if context else [], *region)
        if context:  # scoring a map and scoring its pixels are one thing
            one_by_one = branch(torch.from_numpy(known)).detach().numpy().T
            np.testing.assert_allclose(logits.reshape(2, -1), one_by_one, atol=1e-3)
        return float((logits.argmax(0).ravel() == target.numpy()).mean())

    assert accuracy(2) > 0.97
    assert accuracy(0) < 0.6


def test_fit_depends_on_its_seed_alone() -> None:
    features = torch.randn(200, 24)
    target = (features[:, 0] > 0).long()

    def fitted(seed: int, elsewhere: int) -> torch.Tensor:
        torch.manual_seed(0)
        branch = DetailBranch(1, 0, 2)
        torch.manual_seed(elsewhere)
        for _ in fit(branch, features, target, steps=5, seed=seed):
            torch.rand(1)
        return branch.first.weight.detach()

    assert torch.equal(fitted(1, elsewhere=1), fitted(1, elsewhere=2))
    assert not torch.equal(fitted(1, elsewhere=1), fitted(2, elsewhere=1))


def test_constant_features_do_no_harm() -> None:
    features = torch.randn(50, 24)
    features[:, 3] = 7
    branch = DetailBranch(1, 0, 2)
    list(fit(branch, features, torch.arange(50) % 2, steps=3))
    assert branch(features).isfinite().all()


def test_one_pixel_per_class_is_enough() -> None:
    branch = DetailBranch(1, 0, 3)
    features = torch.randn(3, 24) * 5
    list(fit(branch, features, torch.arange(3), steps=40))
    assert branch(features).argmax(1).tolist() == [0, 1, 2]


def test_rare_classes_drawn_often_do_not_spread() -> None:
    """Overlapping classes, one in ten pixels rare, drawn in equal numbers."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 24, generator=generator)
    target = torch.arange(4000) % 2
    features[:, 0] += target
    everyday = torch.randn(4000, 24, generator=generator)  # common pixels

    def share_called_rare(counts: torch.Tensor | None) -> float:
        torch.manual_seed(0)
        branch = DetailBranch(1, 0, 2)
        list(fit(branch, features, target, steps=60, counts=counts))
        return float((branch(everyday).argmax(1) == 1).float().mean())

    assert share_called_rare(torch.tensor([90_000, 2_000])) < 0.5 * share_called_rare(None)


def test_a_mixture_lets_the_surer_one_decide() -> None:
    sure, unsure = torch.tensor([4.0, 0.0]), torch.tensor([0.2, 0.0])
    overconfident = torch.tensor([0.0, 50.0])
    pixels = torch.stack([sure, unsure]).T[:, None]  # (K, 1, 2)
    head = overconfident[:, None, None].expand(2, 1, 2)
    assert mix(head, pixels, 2 / 3).argmax(0).tolist() == [[0, 1]]
    assert mix(head, pixels, 1.0).argmax(0).tolist() == [[0, 0]]
    assert mix(head, pixels, 0.0).argmax(0).tolist() == [[1, 1]]
    mixture = mix(head, pixels, 0.3)
    torch.testing.assert_close(
        mixture.softmax(0), 0.3 * pixels.softmax(0) + 0.7 * head.softmax(0), atol=1e-6, rtol=0
    )


def test_a_few_labels_leave_elsewhere_to_what_a_forest_would_say() -> None:
    """Two labelled spots far apart; what lies between is decided by one feature of many."""
    generator = torch.Generator().manual_seed(0)
    elsewhere = 2 * torch.randn(3000, 24, generator=generator)
    features = 0.1 * torch.randn(60, 24, generator=generator)
    target = torch.arange(60) % 2
    features[:, 0] += 2.0 * target - 1
    opinion = forest_opinion(features, target, torch.tensor([30, 30]), elsewhere, seed=0)
    assert opinion.shape == (3000, 2)
    torch.testing.assert_close(opinion.sum(1), torch.ones(3000))

    def agreement(surroundings: torch.Tensor | None) -> float:
        torch.manual_seed(0)
        branch = DetailBranch(1, 0, 2)
        list(fit(branch, features, target, steps=150, surroundings=surroundings))
        return float((branch(elsewhere).argmax(1) == opinion.argmax(1)).float().mean())

    assert agreement(elsewhere) > 0.85
    assert agreement(elsewhere) > agreement(None) + 0.05


def test_the_forest_sees_classes_as_often_as_people_painted_them() -> None:
    features = torch.zeros(2000, 24)  # nothing to tell them by but how often they occur
    target = torch.arange(2000) % 2
    opinion = forest_opinion(features, target, torch.tensor([90_000, 10_000]), features[:5], 0)
    assert opinion[0, 1] < 0.25
