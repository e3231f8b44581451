from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_convlora.model.detail_branch import DetailBranch, filter_bank
from napari_convlora.training.detail_fit import brightness_spread, fit, forest_opinion, relight

pytestmark = pytest.mark.usefixtures("whole_forests")


def test_fit_depends_on_its_seed_alone() -> None:
    features = torch.randn(200, 24)
    target = (features[:, 0] > 0).long()

    def fitted(seed: int, elsewhere: int) -> torch.Tensor:
        torch.manual_seed(0)
        branch = DetailBranch(1, 0, 2)
        torch.manual_seed(elsewhere)
        for _ in fit(branch, features, target, steps=5, seed=seed):
            torch.rand(1)
        return branch.filters.weight.detach()

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


def test_a_rare_class_takes_no_certainty_from_a_common_one() -> None:
    features = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    target = (torch.arange(1000) >= 999).long()
    features[:, 0] += 8.0 * target
    torch.manual_seed(0)
    branch = DetailBranch(1, 0, 2)
    list(fit(branch, features, target, steps=60))
    assert branch(features).softmax(1)[:999, 0].median() > 0.9


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


def test_what_the_branch_before_said_holds_between_few_labels() -> None:
    """Labels differ in one feature; the branch before went by another, which they do not vary."""
    generator = torch.Generator().manual_seed(0)
    elsewhere = torch.randn(3000, 24 + 4, generator=generator)
    features = 0.1 * torch.randn(60, 24 + 4, generator=generator)
    target = torch.arange(60) % 2
    features[:, 0] += 2.0 * target - 1
    torch.manual_seed(0)
    before = DetailBranch(1, 4, 2)
    list(fit(before, 4 * elsewhere, (elsewhere[:, 1] > 0).long(), steps=150))
    earlier = before(elsewhere).argmax(1)

    def agreement(before: DetailBranch | None, labelled: float) -> float:
        torch.manual_seed(0)
        branch = DetailBranch(1, 4, 2)
        steps = fit(branch, features, target, 150, 0, elsewhere, None, 0.0, labelled, before)
        list(steps)
        assert (branch(features).argmax(1) == target).float().mean() > 0.95  # labels come first
        return float((branch(elsewhere).argmax(1) == earlier).float().mean())

    assert agreement(before, 0.01) > agreement(None, 0.01) + 0.1
    assert agreement(before, 1.0) == agreement(None, 1.0)  # everything is labelled


def test_the_forest_overrules_the_filters_but_not_the_embedding() -> None:
    """Labels by the embedding, which the forest lacks: it says half and half, however sure."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 24 + 4, generator=generator)
    target = torch.arange(400) % 2
    features[:, 24:] = 4.0 * target[:, None] - 2
    elsewhere = torch.randn(3000, 24 + 4, generator=generator)
    elsewhere[:, 24:] = 4.0 * (torch.arange(3000) % 2)[:, None] - 2
    torch.manual_seed(0)
    branch = DetailBranch(1, 4, 2)
    list(fit(branch, features, target, steps=200, surroundings=elsewhere, labelled=0.01))
    alone, with_context = (said.softmax(1).amax(1) for said in branch.readings(elsewhere))
    assert alone.median() < 0.75
    assert with_context.median() > 0.75


def test_the_forest_sees_classes_as_often_as_people_painted_them() -> None:
    features = torch.zeros(2000, 24)  # nothing to tell them by but how often they occur
    target = torch.arange(2000) % 2
    opinion = forest_opinion(features, target, torch.tensor([90_000, 10_000]), features[:5], 0)
    assert opinion[0, 1] < 0.25


@pytest.mark.parametrize("channels", [1, 3])
def test_light_changes_what_filters_say_as_if_the_image_were_filtered_again(channels: int) -> None:
    """A factor for each channel and an offset: solved for on one pixel, then checked on all."""
    image = np.random.default_rng(0).random((40, 40, channels)).astype(np.float32)
    before = torch.from_numpy(filter_bank(image)[20:21, 20])
    torch.manual_seed(0)
    after = before.clone()
    relight(after, channels, 0.1)
    edge = [24 * c + 1 for c in range(channels)]  # gradient magnitude, which no offset changes
    gain = after[0, edge] / before[0, edge]
    offset = after[0, 0] - gain[0] * before[0, 0]
    assert offset.abs() > 1e-3
    assert (gain - 1).abs().max() > 1e-3
    again = filter_bank(image * gain.numpy() + float(offset))[20, 20]
    np.testing.assert_allclose(after[0], again, rtol=1e-3, atol=1e-4)


def test_light_leaves_the_embedding_alone_and_varies_from_pixel_to_pixel() -> None:
    shown = torch.ones(50, 24 + 7)
    relight(shown, 1, 0.0)
    assert torch.equal(shown, torch.ones(50, 24 + 7))
    relight(shown, 1, 0.1)
    assert torch.equal(shown[:, 24:], torch.ones(50, 7))
    assert shown[:, 0].unique().numel() == 50


def test_brightness_spread_tells_calibrated_images_from_others() -> None:
    generator = torch.Generator().manual_seed(0)
    target, fold = torch.arange(3000) % 2, torch.arange(3000) % 3
    features = 0.05 * torch.randn(3000, 24, generator=generator) + target[:, None]
    assert brightness_spread(features, target, fold, 1) < 0.01
    assert brightness_spread(features + 0.1 * fold[:, None], target, fold, 1) == pytest.approx(
        0.1, abs=0.01
    )
    assert brightness_spread(features, target, target, 1) == 0  # no class lies in two folds


def test_a_branch_taught_under_other_light_knows_a_class_in_a_darker_image() -> None:
    """Bright against dark by grey value alone, or by the gradient as well: light decides which."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(2000) % 2
    features = 0.02 * torch.randn(2000, 24, generator=generator)
    features[:, 0::4] += 0.4 + 0.2 * target[:, None]
    features[:, 1::4] += 0.1 + 0.2 * target[:, None]
    darker = features.clone()
    darker[:, 0::4] -= 0.3

    def accuracy(brightness: float) -> float:
        torch.manual_seed(0)
        branch = DetailBranch(1, 0, 2)
        list(fit(branch, features, target, steps=80, brightness=brightness))
        return float((branch(darker).argmax(1) == target).float().mean())

    assert accuracy(0.3) > 0.9 > accuracy(0.0)
