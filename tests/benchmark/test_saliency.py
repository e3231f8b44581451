"""Saliency scores: by hand, against recorded figures, and against an independent package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.benchmark.saliency import (
    e_measure,
    mean_absolute_error,
    s_measure,
    stretch,
    weighted_f_measure,
)

ALL = (s_measure, e_measure, weighted_f_measure, mean_absolute_error)

# S-measure, mean E-measure, weighted F (beta 1) and MAE of `scene(seed)`, unstretched, as
# pysodmetrics printed them.
RECORDED = {
    0: (0.789188385, 0.699437621, 0.526864787, 0.215880392),
    1: (0.845755843, 0.741226205, 0.601088087, 0.157204397),
    2: (0.897862916, 0.754594082, 0.676581581, 0.118253874),
    3: (0.887232565, 0.723908251, 0.704473507, 0.102603554),
    4: (0.829764181, 0.691342995, 0.729334525, 0.096421569),
    5: (0.740133764, 0.625323934, 0.673164108, 0.107928550),
}


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy map and an ellipse; odd shapes, and the object anywhere but in the middle."""
    rng = np.random.default_rng(seed)
    height, width = [(40, 50), (33, 64), (64, 31), (80, 80)][seed % 4]
    y, x = np.mgrid[:height, :width]
    row, column = rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width
    mask = ((y - row) / (0.25 * height)) ** 2 + ((x - column) / (0.25 * width)) ** 2 < 1
    values = np.clip(0.7 * mask + 0.5 * rng.random(mask.shape) - 0.1 * seed, 0, 1)
    return np.rint(values * 255) / 255, mask


def square(side: int = 20, low: int = 8, high: int = 12) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    return mask


@pytest.mark.parametrize("seed", RECORDED)
def test_scores_are_the_recorded_ones(seed: int) -> None:
    values, mask = scene(seed)
    found = [measure(values, mask) for measure in ALL]
    found[1] *= mask.size / (mask.size - 1)  # that package divides by one pixel less
    assert found == pytest.approx(RECORDED[seed], abs=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_scores_are_those_of_an_independent_package(seed: int) -> None:
    package = pytest.importorskip("py_sod_metrics")
    values, mask = scene(seed % 97)
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:  # ragged masks
        mask = rng.random(mask.shape) < rng.uniform(0.01, 0.99)
    eight_bit, truth = np.rint(255 * values).astype(np.uint8), mask.astype(np.uint8) * 255
    expected = []
    for name, key in (
        ("Smeasure", "sm"),
        ("Emeasure", "em"),
        ("WeightedFmeasure", "wfm"),
        ("MAE", "mae"),
    ):
        judge = getattr(package, name)()
        judge.step(eight_bit, truth)
        result = judge.get_results()[key]
        expected.append(float(result["curve"].mean() if key == "em" else result))
    found = [measure(stretch(values), mask) for measure in ALL]
    found[1] *= mask.size / (mask.size - 1)
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_perfect_map() -> None:
    mask = square()
    assert s_measure(mask.astype(float), mask) == pytest.approx(1)
    assert weighted_f_measure(mask.astype(float), mask) == pytest.approx(1)
    assert mean_absolute_error(mask.astype(float), mask) == 0
    # Threshold 0 calls everything object, which scores a quarter.
    assert e_measure(mask.astype(float), mask) == pytest.approx((255 + 0.25) / 256)


def test_an_inverted_map() -> None:
    mask = square()
    assert s_measure(1.0 - mask, mask) == 0
    assert weighted_f_measure(1.0 - mask, mask) == pytest.approx(0)
    assert mean_absolute_error(1.0 - mask, mask) == 1
    assert e_measure(1.0 - mask, mask) == pytest.approx(0.25 / 256)


def test_a_grey_map_by_hand() -> None:
    mask = square()
    grey = np.full(mask.shape, 0.5)
    # Object and background: 2 * 0.5 / (0.25 + 1 + 0) each; every quadrant holds part of the
    # object, so that none resembles a constant.
    assert s_measure(grey, mask) == pytest.approx(0.5 * 0.8)
    assert e_measure(grey, mask) == pytest.approx(0.25)
    assert mean_absolute_error(grey, mask) == pytest.approx(0.5)
    # Inside: error 0.5 all around, nothing makes up for it. Outside: by distance.
    rows, columns = np.nonzero(mask)
    false_positive = 0.0
    for y, x in zip(*np.nonzero(~mask), strict=True):
        distance = np.hypot(rows - y, columns - x).min()
        false_positive += 0.5 * (2 - np.exp(np.log(0.5) / 5 * distance))
    true_positive = 0.5 * mask.sum()
    recall, precision = 0.5, true_positive / (true_positive + false_positive)
    expected = 2 * recall * precision / (recall + precision)
    assert weighted_f_measure(grey, mask) == pytest.approx(expected)


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("full", [False, True])
def test_masks_of_one_value(level: float, full: bool) -> None:
    mask, values = np.full((9, 7), full), np.full((9, 7), level)
    error = abs(level - full)
    assert mean_absolute_error(values, mask) == error
    assert s_measure(values, mask) == pytest.approx(1 - error)
    # 256 thresholds t / 255, of which floor(255 * level) + 1 are not above the level.
    above = (np.floor(255 * level) + 1) / 256
    assert e_measure(values, mask) == pytest.approx(above if full else 1 - above)
    if not full:
        assert weighted_f_measure(values, mask) == 0
    elif level == 1:
        assert weighted_f_measure(values, mask) == 1


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("place", [(0, 0), (8, 6), (0, 6)])
def test_an_object_of_one_pixel_in_a_corner_is_scored(
    measure: Callable[[np.ndarray, np.ndarray], float], place: tuple[int, int]
) -> None:
    mask = np.zeros((9, 7), bool)
    mask[place] = True
    right, wrong = measure(mask.astype(float), mask), measure(1.0 - mask, mask)
    assert 0 <= min(right, wrong) <= max(right, wrong) <= 1
    assert right < wrong if measure is mean_absolute_error else right > wrong


def test_stretching_uses_the_full_range_and_leaves_constants_alone() -> None:
    values = np.array([[0.2, 0.3], [0.4, 0.6]], np.float32)
    np.testing.assert_allclose(stretch(values), [[0, 0.25], [0.5, 1]], atol=1e-6)
    np.testing.assert_array_equal(stretch(np.full((2, 2), 0.3)), np.full((2, 2), 0.3))
