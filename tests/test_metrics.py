"""Scores agree with scikit-learn, and folders are compared without surprises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
)

from napari_convlora import metrics
from napari_convlora.annotations import default_classes
from napari_convlora.config import InputError
from napari_convlora.metrics import balanced_error, confusion, evaluate_folders, scores

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


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predicted, wanted = tmp_path / "predicted", tmp_path / "wanted"
    predicted.mkdir()
    wanted.mkdir()
    rng = np.random.default_rng(0)
    for stem in ("a", "b"):
        target = rng.integers(0, 3, (20, 30), np.uint8)
        guess = np.where(rng.random((20, 30)) < 0.7, target, 1).astype(np.uint8)
        Image.fromarray(target).save(wanted / f"{stem}.PNG")
        tifffile.imwrite(predicted / f"{stem}.ome.tif", guess + (guess == 0))
    (wanted / "classes.json").write_text("{}")
    (wanted / "._a.png").write_bytes(b"leftover")
    return predicted, wanted


def test_set_scores_come_from_one_summed_matrix(folders: tuple[Path, Path]) -> None:
    predicted, wanted = folders
    tifffile.imwrite(predicted / "extra.tif", np.ones((4, 4), np.uint8))
    result = evaluate_folders(*folders)
    assert set(result.images) == {"a", "b"}
    assert result.unmatched == ("extra",)
    pairs = [
        (tifffile.imread(predicted / f"{s}.ome.tif"), np.asarray(Image.open(wanted / f"{s}.PNG")))
        for s in "ab"
    ]
    total = confusion(*pairs[0], 2) + confusion(*pairs[1], 2)
    assert result.scores == scores(total, (1, 2))
    assert result.images["b"] == scores(confusion(*pairs[1], 2), (1, 2))
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert data["scores"]["iou"]["2"] == result.scores.iou[2]


def test_ignore_chooses_what_is_left_out(folders: tuple[Path, Path]) -> None:
    assert set(evaluate_folders(*folders).scores.iou) == {1, 2}
    everything = evaluate_folders(*folders, ignore=None)
    assert set(everything.scores.iou) == {0, 1, 2}
    assert everything.scores.pixels == 2 * 20 * 30
    assert everything.scores.iou[0] == 0


def test_missing_predictions_are_listed(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b.ome.tif").unlink()
    with pytest.raises(InputError, match=r"no prediction for 1 of 2 label images \(b\)"):
        evaluate_folders(*folders)


def test_folders_that_cannot_be_compared_are_explained(folders: tuple[Path, Path]) -> None:
    predicted, wanted = folders
    with pytest.raises(InputError, match="is not a folder"):
        evaluate_folders(predicted, wanted / "absent")
    tifffile.imwrite(predicted / "a.tif", np.ones((20, 30), np.uint8))
    with pytest.raises(InputError, match="share the name 'a'"):
        evaluate_folders(predicted, wanted)
    (predicted / "a.tif").unlink()
    tifffile.imwrite(predicted / "a.ome.tif", np.ones((20, 31), np.uint8))
    with pytest.raises(InputError, match="20 x 31, but its image is 20 x 30"):
        evaluate_folders(predicted, wanted)
    for path in wanted.iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no label images"):
        evaluate_folders(predicted, wanted)


def test_labels_that_are_all_ignored_are_an_error(folders: tuple[Path, Path]) -> None:
    for stem in "ab":
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(folders[1] / f"{stem}.PNG")
    with pytest.raises(InputError, match="ignored id 0"):
        evaluate_folders(*folders)
