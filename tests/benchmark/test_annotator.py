from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from napari_convlora.benchmark.annotator import correct, first_strokes, stroke


@st.composite
def truths(draw: st.DrawFn) -> np.ndarray:
    """Blobs of up to four classes with some void, of any shape from 1 x 1 to 40 x 40."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = gaussian_filter(rng.random((5, *shape)), (0, *[draw(st.floats(0, 4))] * 2))
    return smooth.argmax(0).astype(np.uint8)


seeds = st.integers(0, 1000)


@given(truths(), seeds)
@settings(max_examples=60, deadline=None)
def test_first_strokes_name_every_class_truly_and_never_touch_void(
    truth: np.ndarray, seed: int
) -> None:
    annotations, strokes = first_strokes(truth, seed)
    painted = annotations > 0
    assert (annotations[painted] == truth[painted]).all()
    assert set(np.unique(annotations[painted])) == set(np.unique(truth[truth > 0]))
    assert strokes == len(np.unique(truth[truth > 0]))
    again, _ = first_strokes(truth, seed)
    assert (again == annotations).all()


@given(truths(), seeds, st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_corrections_are_true_keep_to_the_budget_and_leave_earlier_strokes(
    truth: np.ndarray, seed: int, count: int, max_share: float
) -> None:
    before, _ = first_strokes(truth, seed)
    prediction = np.random.default_rng(seed).integers(1, 5, truth.shape).astype(np.uint8)
    after, strokes = correct(truth, prediction, before, count, max_share, seed)
    new = after != before
    assert (before[new] == 0).all()
    assert (after[new] == truth[new]).all()
    assert (prediction[new] != truth[new]).all()
    assert (truth[new] > 0).all()
    assert strokes <= count
    assert (strokes > 0) == new.any()
    if strokes:
        assert (after > 0).mean() <= max_share
    again, _ = correct(truth, prediction, before, count, max_share, seed)
    assert (again == after).all()


def test_the_largest_mistakes_are_corrected_first_with_the_true_class() -> None:
    truth = np.ones((60, 60), np.uint8)
    truth[:, 30:] = 2
    prediction = truth.copy()
    prediction[5:10, 5:10] = 2  # 25 pixels
    prediction[20:50, 40:50] = 1  # 300 pixels
    prediction[50:60, 0:12] = 2  # 120 pixels
    nothing = np.zeros_like(truth)
    one, strokes = correct(truth, prediction, nothing, 1, 1.0, seed=0)
    rows, columns = np.nonzero(one)
    assert strokes == 1
    assert 20 <= rows.min() <= rows.max() < 50
    assert 40 <= columns.min() <= columns.max() < 50
    assert set(one[one > 0]) == {2}
    two, strokes = correct(truth, prediction, nothing, 2, 1.0, seed=0)
    assert strokes == 2
    assert (two[50:60, :12] == 1).any()
    assert not two[5:10, 5:10].any()


def test_one_mistake_of_two_classes_is_two_regions() -> None:
    truth = np.ones((20, 20), np.uint8)
    truth[:, 10:] = 2
    after, strokes = correct(truth, np.full_like(truth, 3), np.zeros_like(truth), 2, 1.0, seed=0)
    assert strokes == 2
    assert set(np.unique(after)) == {0, 1, 2}


def test_a_right_prediction_needs_no_stroke() -> None:
    truth = np.tile([1, 2], (8, 4))
    after, strokes = correct(truth, truth, np.zeros_like(truth), 3, 1.0, seed=0)
    assert strokes == 0
    assert not after.any()


def test_a_stroke_is_one_thin_short_line_along_the_middle() -> None:
    region = np.zeros((256, 256), bool)
    region[100:121, 10:246] = True
    painted = stroke(region, np.random.default_rng(0))
    rows, columns = np.nonzero(painted)
    assert label(painted, connectivity=2).max() == 1
    assert 109 <= rows.min() <= rows.max() <= 111  # three pixels in the middle of the bar
    assert 20 <= np.ptp(columns) <= 256 // 8 + 3


def test_large_images_get_several_strokes_of_every_class_and_seeds_differ() -> None:
    truth = np.ones((600, 700), np.uint8)
    truth[:, 300:] = 2
    annotations, strokes = first_strokes(truth, seed=0)
    assert strokes == 2 * 3
    assert label(annotations == 1, connectivity=2).max() == 3
    rows = np.nonzero(annotations == 1)[0]
    assert np.ptp(rows) > 100  # spread out, not side by side
    assert 0 < (annotations > 0).mean() < 0.02
    assert (annotations != first_strokes(truth, seed=1)[0]).any()
