from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from napari_convlora.benchmark import baselines
from napari_convlora.benchmark.baselines import Predict, forest, unet
from napari_convlora.evaluation.metrics import confusion, scores
from napari_convlora.labels.annotations import LabelledImage

Scene = Callable[..., tuple[LabelledImage, np.ndarray]]


def mean_iou(predict: Predict, image: LabelledImage, truth: np.ndarray) -> float:
    return scores(confusion(predict(image.image), truth, 3), (1, 2, 3)).mean_iou


def test_a_forest_tells_textures_of_an_image_it_never_saw(scene: Scene) -> None:
    known, _ = scene(64, 64, seed=0)
    new, truth = scene(64, 96, seed=1, planes=2)
    assert mean_iou(forest([known], seed=0), new, truth) > 0.9


def test_a_unet_learns_textures_from_partial_labels(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("monai", reason="needs the extra [benchmark]")
    clock = itertools.count()  # one second a step, so that the machine's speed is no matter
    monkeypatch.setattr(baselines, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    known = []
    for seed in range(2):
        image, truth = scene(64, 64, seed=seed)
        truth[:, seed::3] = 0  # unlabelled rows
        known.append(LabelledImage(image.image, truth))
    new, truth = scene(64, 86, seed=2)  # its width is no multiple of the net's stride
    predict = unet(known, seed=0, seconds=60, device="cpu")
    assert mean_iou(predict, new, truth) > 0.8


def test_a_forest_repeats_and_uses_the_ids_of_the_strokes(scene: Scene) -> None:
    known, _ = scene(48, 48, seed=0)
    ids = np.array([0, 7, 200, 255], np.int32)
    renamed = LabelledImage(known.image, ids[known.annotations])
    first, second = (forest([renamed], 3)(known.image) for _ in range(2))
    assert (first == second).all()
    assert first.dtype == np.uint8
    assert set(np.unique(first)) <= {7, 200, 255}


def test_the_forest_takes_a_bounded_number_of_pixels(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, truth = scene(96, 96, seed=0)
    monkeypatch.setattr(baselines, "_FOREST_PIXELS", 500)
    whole = LabelledImage(image.image, truth)
    features, labels = baselines._labelled_pixels([whole, whole], lambda x: x, 0)
    assert 400 < len(labels) < 600
    assert len(features) == len(labels)
    assert mean_iou(forest([whole], seed=0), image, truth) > 0.9
