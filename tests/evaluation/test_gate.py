from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from napari_convlora.evaluation.gate import TOLERANCE, correction, decide, gained

score = st.floats(0, 1)


def test_a_first_round_is_installed() -> None:
    assert decide({}).better
    assert decide({"compared": {}}).reason == "Installed, as there was no adapter before."


def test_a_round_that_cannot_be_compared_is_installed_and_says_why() -> None:
    verdict = decide({"compared": {"why": "the classes are others than before"}})
    assert verdict.better
    assert verdict.reason == (
        "Installed without a comparison, as the classes are others than before."
    )


@given(new=score, before=score, pixels=st.integers(50, 10**6))
def test_only_a_clearly_worse_round_is_not_installed(
    new: float, before: float, pixels: int
) -> None:
    verdict = decide({"compared": {"new": new, "installed": before, "pixels": pixels}})
    assert verdict.better == (new >= before - TOLERANCE)
    assert verdict.reason.count(".") == 3  # two scores, one sentence
    assert f"{new:.2f}" in verdict.reason
    assert f"{before:.2f}" in verdict.reason
    assert ("not installed" in verdict.reason) != verdict.better


@pytest.mark.parametrize(
    ("summary", "before", "expected"),
    [
        ({"compared": {"new": 0.8, "installed": 0.7}, "score": 0.1}, {"score": 0.9}, True),
        ({"compared": {"new": 0.7, "installed": 0.7}, "score": 0.9}, {"score": 0.1}, False),
        ({"compared": {"why": "too few"}, "score": 0.8}, {"score": 0.7}, True),
        ({"compared": {"why": "too few"}, "score": 0.702}, {"score": 0.7}, False),
        ({"compared": {"why": "too few"}, "score": 1.0}, {"score": 1.0}, True),
        ({"score": 0.5, "held_out": True}, {"score": 0.9, "held_out": False}, True),
        ({"score": 0.5}, None, True),
        ({"score": None}, {"score": 0.9}, True),
    ],
)
def test_a_round_has_gained_if_it_is_better_than_noise(
    summary: dict, before: dict | None, expected: bool
) -> None:
    assert gained(summary, before) is expected


labels = arrays.arrays(np.uint8, (1, 6, 7), elements=st.integers(0, 3))


@given(labels, labels, labels)
def test_correction_scores_count_only_what_was_painted_later(
    prediction: np.ndarray, before: np.ndarray, now: np.ndarray
) -> None:
    found = correction(prediction, before, now)
    later = (before != now) & (now > 0)
    assert found.pixels == later.sum()
    if found.pixels:
        assert found.accuracy == pytest.approx((prediction == now)[later].mean())
        assert 0 <= found.mean_iou <= 1
        assert correction(np.where(later, now, prediction), before, now).mean_iou == 1
    else:
        assert np.isnan(found.accuracy)
        assert np.isnan(found.mean_iou)


def test_correction_scores_by_hand() -> None:
    prediction = np.array([[[1, 1, 2, 2, 0]]])
    before = np.array([[[0, 0, 0, 1, 0]]])
    now = np.array([[[1, 2, 2, 2, 1]]])
    found = correction(prediction, before, now)
    assert found.pixels == 5
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.mean_iou == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_a_round_that_was_broken_off_does_not_replace_another() -> None:
    assert decide({"ended_by": "failure", "compared": {}}).better
    verdict = decide({"ended_by": "failure", "compared": {"why": "it was broken off"}})
    assert not verdict.better
    assert verdict.reason == "Kept but not installed, as the round was broken off."
