"""Folders of masks are compared without surprises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from napari_convlora.errors import InputError
from napari_convlora.evaluation.folders import evaluate_folders
from napari_convlora.evaluation.metrics import confusion, scores


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


def test_an_ignored_class_is_none_even_where_it_is_predicted(tmp_path: Path) -> None:
    for name in ("masks", "truth"):
        (tmp_path / name).mkdir()
    truth = np.repeat(np.array([[1, 2, 3]], np.uint8), 4, 0)
    guess = truth.copy()
    guess[0, 1] = 1  # a miss of class 2, but class 1 is not asked for
    Image.fromarray(truth).save(tmp_path / "truth" / "a.png")
    Image.fromarray(guess).save(tmp_path / "masks" / "a.png")
    found = evaluate_folders(tmp_path / "masks", tmp_path / "truth", ignore=1).scores
    assert found.iou == {2: 0.75, 3: 1}
    assert found.mean_iou == 0.875
    assert found.pixels == 8
