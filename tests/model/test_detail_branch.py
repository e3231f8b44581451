from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.tiles import Tile, sample
from napari_convlora.model.detail_branch import (
    HALO,
    DetailBranch,
    filter_bank,
    mix,
    n_features,
    region_features,
)
from napari_convlora.training.detail_fit import fit


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
            np.testing.assert_allclose(logits.reshape(2, -1), branch.at(known), atol=1e-3)
        return float((logits.argmax(0).ravel() == target.numpy()).mean())

    assert accuracy(2) > 0.97
    assert accuracy(0) < 0.6


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
