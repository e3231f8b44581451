"""Scores agree with scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
)

from napari_convlora.errors import InputError
from napari_convlora.evaluation import metrics
from napari_convlora.evaluation.metrics import balanced_error, confusion, mean_ious, scores
from napari_convlora.labels.classes import default_classes

few = settings(max_examples=40, deadline=None)
targets = hnp.arrays(st.sampled_from(["uint8", "int32", "uint16"]), 60, elements=st.integers(0, 4))
predictions = hnp.arrays("uint8", 60, elements=st.integers(1, 4))


@few
@given(predictions, targets, st.sampled_from([0, 3, None]))
def test_confusion_and_scores_match_scikit_learn(
    prediction: np.ndarray, target: np.ndarray, ignore: int | None
) -> None:
    ids = [0, 1, 2, 3, 4]
    matrix = confusion(prediction.reshape(5, 12), target.reshape(5, 12), ids, ignore)
    kept = target != ignore if ignore is not None else np.ones(60, bool)
    wanted, given_ = target[kept].astype(int), prediction[kept].astype(int)
    if not kept.any():
        assert not matrix.any()
        return
    np.testing.assert_array_equal(matrix, confusion_matrix(wanted, given_, labels=ids))
    assert matrix.dtype == np.int64
    result = scores(matrix, ids)
    present = np.union1d(wanted, given_)
    options = {"labels": present, "average": None, "zero_division": 0}
    for own, oracle in (
        (result.iou, jaccard_score(wanted, given_, **options)),
        (result.dice, f1_score(wanted, given_, **options)),
    ):
        np.testing.assert_allclose([own[i] for i in present], oracle)
        assert all(math.isnan(own[i]) for i in ids if i not in present)
    assert result.mean_iou == pytest.approx(np.mean([result.iou[i] for i in present]))
    assert result.mean_dice == pytest.approx(np.mean([result.dice[i] for i in present]))
    assert result.pixel_accuracy == pytest.approx((wanted == given_).mean())
    assert result.pixels == kept.sum()


@few
@given(hnp.arrays(bool, 30), hnp.arrays(bool, 30))
@pytest.mark.filterwarnings("ignore:y_pred contains classes", "ignore:A single label was found")
def test_balanced_error_matches_scikit_learn(prediction: np.ndarray, target: np.ndarray) -> None:
    matrix = confusion(prediction, target, (0, 1), ignore=None)
    expected = 1 - balanced_accuracy_score(target, prediction)
    assert balanced_error(matrix) == pytest.approx(expected)


def test_balanced_error_of_nothing_is_nan() -> None:
    assert math.isnan(balanced_error(np.zeros((2, 2), int)))


@few
@given(predictions, targets)
def test_chunks_make_no_difference(prediction: np.ndarray, target: np.ndarray) -> None:
    whole = confusion(prediction, target, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", 7)
        np.testing.assert_array_equal(confusion(prediction, target, 4), whole)


def test_a_perfect_prediction_scores_one_whatever_is_unlabelled() -> None:
    target = np.array([[0, 1], [2, 0]])
    result = scores(confusion(np.array([[2, 1], [2, 1]]), target, 3), default_classes(3))
    assert (result.mean_iou, result.mean_dice, result.pixel_accuracy) == (1, 1, 1)
    assert result.pixels == 2
    assert math.isnan(result.iou[3])


def test_nothing_to_compare_is_nan_and_still_json() -> None:
    result = scores(confusion(np.ones(4, int), np.zeros(4, int), 2), (1, 2))
    assert math.isnan(result.mean_iou)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["mean_iou"] is None


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (np.array([1, 3]), np.array([1, 2]), r"prediction holds the ids \[3\]"),
        (np.array([1, 0]), np.array([1, 2]), r"prediction holds the ids \[0\]"),
        (np.array([1, 1]), np.array([1, -1]), r"target holds the ids \[-1\]"),
        (np.array([1, 1]), np.array([1, 99999]), r"target holds the ids \[99999\]"),
        (np.array([1.0, 1.0]), np.array([1, 1]), "float64"),
        (np.array([1]), np.array([1, 1]), "one size"),
    ],
)
def test_values_outside_the_classes_are_never_dropped_in_silence(
    prediction: np.ndarray, target: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        confusion(prediction, target, 2)


def test_matrix_and_classes_must_fit() -> None:
    with pytest.raises(InputError, match="does not fit 3 classes"):
        scores(np.eye(2, dtype=int), [1, 2, 3])
    with pytest.raises(InputError, match="unique"):
        confusion(np.ones(1, int), np.ones(1, int), [1, 1])


@given(hnp.arrays(np.int64, (4, 3, 3), elements=st.integers(0, 50)))
@settings(max_examples=50, deadline=None)
def test_many_mean_ious_at_once_are_those_of_the_metric(matrices: np.ndarray) -> None:
    expected = [scores(matrix, (1, 2, 3)).mean_iou for matrix in matrices]
    np.testing.assert_allclose(mean_ious(matrices), expected)
