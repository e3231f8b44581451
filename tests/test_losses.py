from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.losses import VOID, class_weights, dense_loss, masked_dice, taught_loss


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
