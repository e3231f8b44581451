from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.training.losses import (
    VOID,
    balanced_bce,
    class_weights,
    dense_loss,
    masked_dice,
    structure_loss,
    taught_loss,
    weighted_cross_entropy,
)


def draw(seed: int, n_classes: int, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a target of which about `share` is labelled."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n_classes, size, size, generator=generator)
    target = torch.randint(0, n_classes, (2, size, size), generator=generator)
    target[torch.rand(2, size, size, generator=generator) >= share] = VOID
    return logits, target


def dice_by_numpy(probabilities: np.ndarray, target: np.ndarray) -> float:
    """Mean over the classes present of ``1 - 2 sum(p g) / (sum p^2 + sum g^2)``."""
    losses = []
    for c in range(probabilities.shape[1]):
        p = np.concatenate([q[c][t != VOID] for q, t in zip(probabilities, target, strict=True)])
        g = np.concatenate([t[t != VOID] == c for t in target]).astype(float)
        if g.any():
            losses.append(1 - (2 * (p * g).sum() + 1e-5) / ((p**2).sum() + (g**2).sum() + 1e-5))
    return float(np.mean(losses)) if losses else 0.0


cases = given(
    seed=st.integers(0, 10_000),
    n_classes=st.integers(2, 5),
    size=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)


@settings(deadline=None, max_examples=60)
@cases
def test_unlabelled_pixels_have_no_influence(
    seed: int, n_classes: int, size: int, share: float
) -> None:
    logits, target = draw(seed, n_classes, size, share)
    weights = torch.rand(n_classes) + 0.5
    void = (target == VOID)[:, None].expand_as(logits)
    other = torch.where(void, 30 * torch.randn_like(logits), logits).requires_grad_()
    for smoothing in (0.0, 0.05):
        loss = dense_loss(other, target, weights, smoothing)
        torch.testing.assert_close(loss, dense_loss(logits, target, weights, smoothing))
        (gradient,) = torch.autograd.grad(loss, other)
        assert not gradient[void].any()
        assert gradient.isfinite().all()
        if share == 1:
            assert gradient.any()


@settings(deadline=None, max_examples=60)
@cases
def test_dice_is_the_textbook_one(seed: int, n_classes: int, size: int, share: float) -> None:
    logits, target = draw(seed, n_classes, size, share)
    probabilities = logits.softmax(1)
    expected = dice_by_numpy(probabilities.double().numpy(), target.numpy())
    assert masked_dice(probabilities, target).item() == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=40)
@cases
def test_dense_loss_is_weighted_cross_entropy_plus_dice(
    seed: int, n_classes: int, size: int, share: float
) -> None:
    logits, target = draw(seed, n_classes, size, share)
    weights = torch.rand(n_classes) + 0.1
    logs = logits.log_softmax(1).movedim(1, -1)[target != VOID]
    truth = target[target != VOID]
    expected = dice_by_numpy(logits.softmax(1).numpy(), target.numpy())
    if len(truth):
        expected += float(-(weights[truth] * logs[torch.arange(len(truth)), truth]).mean())
    assert dense_loss(logits, target, weights).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("own", [0, 1, 2])
def test_however_rare_a_class_is_smoothing_takes_the_same_share_of_its_pixels(own: int) -> None:
    """The best answer for a pixel that is known is its class, as sure as without weights."""
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 1000.0, 30.0], dtype=torch.float64)

    def share_of_loss() -> torch.Tensor:
        optimiser.zero_grad()
        loss = weighted_cross_entropy(logits, torch.tensor([own]), weights, 0.1).sum()
        loss = loss / weights[own]
        loss.backward()
        return loss

    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    optimiser.step(share_of_loss)
    best = logits.detach().softmax(1)[0]
    assert best.argmax() == own
    expected = torch.full((3,), 0.1 / 3, dtype=torch.float64)
    expected[own] += 0.9
    torch.testing.assert_close(best, expected, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=40)
@cases
def test_classes_of_equal_weight_are_smoothed_as_torch_does(
    seed: int, n_classes: int, size: int, share: float
) -> None:
    logits, target = draw(seed, n_classes, size, share)
    weights = torch.full((n_classes,), 0.7)
    found = weighted_cross_entropy(logits, target, weights, 0.1)
    expected = F.cross_entropy(logits, target, weights, None, VOID, None, "none", 0.1)
    torch.testing.assert_close(found, expected)


def test_nothing_labelled_costs_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = dense_loss(logits, torch.full((1, 4, 4), VOID), torch.ones(3), 0.05)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_perfect_prediction_costs_nearly_nothing() -> None:
    _, target = draw(1, 3, 8, 0.4)
    logits = 20 * F.one_hot(target.clamp_min(0), 3).movedim(-1, 1).float()
    assert dense_loss(logits, target, torch.ones(3)) < 1e-3
    assert dense_loss(-logits, target, torch.ones(3)) > 1


def test_absent_classes_weigh_nothing_and_the_mean_pixel_weighs_one() -> None:
    counts = torch.tensor([100, 0, 4, 25])
    weights = class_weights(counts)
    assert weights[1] == 0
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    assert weights[2] / weights[0] == pytest.approx(5), "inverse square root"
    assert class_weights(torch.zeros(3, dtype=torch.int64)).isfinite().all()


def test_classes_drawn_alike_count_by_the_root_of_their_number() -> None:
    counts, drawn = torch.tensor([10_000, 100, 0]), torch.tensor([50, 50, 0])
    weights = class_weights(counts, drawn)
    assert weights[0] / weights[1] == pytest.approx(10)
    assert (weights * drawn).sum() / drawn.sum() == pytest.approx(1)
    assert weights[2] == 0


def test_a_teacher_is_heard_where_nobody_labelled_and_only_there() -> None:
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    teacher = torch.randn(1, 3, 8, 8, requires_grad=True)
    target = torch.full((1, 8, 8), VOID)
    target[0, :4] = 1
    loss = taught_loss(logits, teacher, target)
    loss.backward()
    assert not logits.grad[:, :, :4].any()
    assert logits.grad[:, :, 4:].all()
    assert teacher.grad is None
    assert loss > taught_loss(teacher, teacher, target), "least where both agree"
    assert taught_loss(logits, teacher, torch.zeros_like(target)) == 0


def structure_by_numpy(logits: np.ndarray, target: np.ndarray, edge_bce: bool) -> float:
    """F3Net's loss pixel by pixel, of one image whose pixels are all labelled."""
    height, width = target.shape
    padded = np.pad(target.astype(float), 15)
    weight = np.empty(target.shape)
    for y in range(height):
        for x in range(width):
            weight[y, x] = 1 + 5 * abs(padded[y : y + 31, x : x + 31].mean() - target[y, x])
    p = 1 / (1 + np.exp(-logits))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    overlap = (weight * p * target).sum()
    union = (weight * (p + target)).sum() - overlap
    first = (weight * bce).sum() / weight.sum() if edge_bce else bce.mean()
    return float(first + 1 - (overlap + 1) / (union + 1))


@pytest.mark.parametrize("edge_bce", [False, True])
def test_structure_loss_is_the_published_one(edge_bce: bool) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 20, 37)), np.zeros((2, 20, 37), np.int64)
    target[0, 4:15, 9:30] = 1
    target[1, :7] = 1
    expected = [structure_by_numpy(*pair, edge_bce) for pair in zip(logits, target, strict=True)]
    loss = structure_loss(torch.tensor(logits), torch.tensor(target), edge_bce)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_switch_of_the_structure_loss_moves_weight_to_edges() -> None:
    target = torch.zeros(1, 64, 64, dtype=torch.int64)
    target[:, :, 32:] = 1
    shares = []
    for edge_bce in (False, True):
        logits = torch.zeros(1, 64, 64, requires_grad=True)
        structure_loss(logits, target, edge_bce).backward()
        gradient = logits.grad[0].abs().mean(0)
        shares.append((gradient[28:36].sum() / gradient.sum()).item())
    assert shares[1] > 1.3 * shares[0]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@pytest.mark.parametrize(
    "loss", [structure_loss, lambda x, y: structure_loss(x, y, True), balanced_bce]
)
def test_mask_losses_do_not_see_unlabelled_pixels(loss, seed: int, share: float) -> None:
    logits, target = draw(seed, 2, 9, share)
    mask, void = logits[:, 1], target == VOID
    other = torch.where(void, 30 * torch.randn_like(mask), mask).requires_grad_()
    found = loss(other, target)
    torch.testing.assert_close(found, loss(mask, target))
    (gradient,) = torch.autograd.grad(found, other)
    assert gradient.isfinite().all()
    assert not gradient[void].any()
    if share == 1:
        assert gradient.any()
    if share == 0:
        assert found == 0


def test_balanced_cross_entropy_weighs_by_the_other_class() -> None:
    logits, target = torch.randn(2, 6, 6), torch.randint(0, 2, (2, 6, 6))
    share = target.float().mean()
    background = 1 - share
    # As published: the share of objects times a cross-entropy whose objects weigh n_neg / n_pos.
    expected = share * F.binary_cross_entropy_with_logits(
        logits, target.float(), pos_weight=background / share
    )
    torch.testing.assert_close(balanced_bce(logits, target), expected)
    assert balanced_bce(logits, torch.zeros_like(target)) == 0
