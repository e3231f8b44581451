from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.control import RunControl
from napari_convlora.errors import InputError
from napari_convlora.events import Progress
from napari_convlora.images.tiles import tile_starts
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction.predict import Prediction, plane_logits, predict
from tests.conftest import make_scene


def run(adapter: Adapter, backbone: Backbone, image: np.ndarray, **options) -> Prediction:
    steps = Returning(predict(adapter, backbone, image, device="cpu", **options))
    assert all(isinstance(step, Progress) for step in steps)
    return steps.value


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 64, 64), (1, 200, 90), (3, 40, 70), (1, 9, 400)])
def test_masks_have_the_images_size_and_the_tables_ids(
    adapter: Adapter, backbone: Backbone, shape: tuple[int, ...]
) -> None:
    image = np.random.default_rng(0).random((*shape, 1)).astype(np.float32)
    result = run(adapter, backbone, image, probabilities=True)
    assert result.labels.shape == shape
    assert set(np.unique(result.labels)) <= {c.id for c in adapter.classes}
    assert result.probabilities.shape == (shape[0], 3, *shape[1:])
    np.testing.assert_allclose(result.probabilities.sum(1), 1, atol=1e-5)
    ids = np.array([c.id for c in adapter.classes])
    np.testing.assert_array_equal(ids[result.probabilities.argmax(1)], result.labels)


def test_uncertainty_is_what_the_best_class_does_not_lead_by(
    adapter: Adapter, backbone: Backbone
) -> None:
    image = make_scene(70, 60, planes=2)[0].image
    assert run(adapter, backbone, image).uncertainty is None
    result = run(adapter, backbone, image, probabilities=True, uncertainty=True)
    assert result.uncertainty.dtype == np.uint8
    shares = np.sort(result.probabilities, axis=1)
    lead = shares[:, -1] - shares[:, -2]
    np.testing.assert_allclose(result.uncertainty, 100 * (1 - lead), atol=0.51)
    assert np.ptp(result.uncertainty) > 0


def test_a_stack_is_predicted_plane_by_plane(adapter: Adapter, backbone: Backbone) -> None:
    image = np.random.default_rng(0).random((2, 80, 80, 1)).astype(np.float32)
    both = run(adapter, backbone, image).labels
    for plane, labels in zip(image, both, strict=True):
        np.testing.assert_array_equal(run(adapter, backbone, plane[None]).labels[0], labels)


def test_the_cache_changes_nothing_but_the_time(adapter: Adapter, backbone: Backbone) -> None:
    image = make_scene(150, 150)[0].image
    cache = FeatureCache()
    plain = run(adapter, backbone, image, probabilities=True)
    for _ in range(2):
        cached = run(adapter, backbone, image, probabilities=True, cache=cache)
        np.testing.assert_array_equal(plain.probabilities, cached.probabilities)
    assert len(cache) > 0


def test_stop_cancels(adapter: Adapter, backbone: Backbone) -> None:
    control = RunControl()
    steps = Returning(
        predict(adapter, backbone, make_scene(300, 300)[0].image, device="cpu", control=control)
    )
    seen = []
    for step in steps:
        seen.append(step)
        control.stop()
    assert steps.value is None
    assert len(seen) == 1 < seen[0].total


def test_bad_pixels_and_other_channel_counts_are_named(
    adapter: Adapter, backbone: Backbone
) -> None:
    with pytest.raises(InputError, match="NaN"):
        run(adapter, backbone, np.full((1, 20, 20, 1), np.nan))
    with pytest.raises(InputError, match="channels"):
        run(adapter, backbone, np.random.default_rng(0).random((1, 20, 20, 3)))


def test_a_blank_image_is_predicted_like_any_other_of_its_series(
    adapter: Adapter, backbone: Backbone
) -> None:
    labels = run(adapter, backbone, np.full((1, 40, 50, 1), 0.5, np.float32)).labels
    assert labels.shape == (1, 40, 50)
    assert labels.min() > 0


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["head", "detail branch"])
def test_tiles_meet_without_a_seam(adapter: Adapter, backbone: Backbone, share: float) -> None:
    """Steps of the logits at tile borders are those inside tiles, on a uniform texture."""
    model = adapter.build(backbone)
    if share:
        torch.manual_seed(0)
        model.detail.first.reset_parameters()
        model.detail.first.weight.data[:, :24] = 0  # what filters see has no tiles
    model.detail.share.fill_(share)
    side = backbone.spec.image_size  # at a pixel scale of 1
    starts = tile_starts(192, side, 0.25)
    borders = [b - 1 for s in starts for b in (s, s + side) if 0 < b < 192]
    # Where tiles overlap their mean is smoother than either, so "inside" is where one tile counts.
    cover = np.array([sum(s <= x < s + side for s in starts) for x in range(192)])
    inside = (cover[1:] == 1) & (cover[:-1] == 1)
    jumps = np.zeros(191)
    for seed in range(8):
        plane = np.random.default_rng(seed).random((192, 192, 1)).astype(np.float32)
        steps = Returning(plane_logits(model, plane, adapter.normalizer, 1.0, cache=FeatureCache()))
        assert max(step.total for step in steps) >= 9
        jumps += np.abs(np.diff(steps.value, axis=2)).mean((0, 1))
    ratio = jumps[borders].mean() / jumps[inside].mean()
    print(f"logit steps at tile borders against inside tiles: {ratio:.3f}")
    assert ratio <= 1.1
