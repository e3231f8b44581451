"""Real weights on real images: a round must be worth pressing the button for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import napari_convlora
from napari_convlora import LabelledImage, TrainConfig, adapt, predict
from napari_convlora.backbones import Backbone
from napari_convlora.evaluation.metrics import confusion, scores
from napari_convlora.events import Finished, Preview
from napari_convlora.formats.opening import read_image, read_labels
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.iteration import Returning

SAMPLES = Path(napari_convlora.__file__).parent / "widget" / "samples"
DATA = os.environ.get("NAPARI_CONVLORA_DATA")
pytestmark = pytest.mark.usefixtures("whole_forests")


def mean_iou(labels: np.ndarray, truth: np.ndarray, n_classes: int) -> float:
    return scores(confusion(labels, truth, n_classes), range(1, n_classes + 1)).mean_iou


def sample(name: str) -> tuple[LabelledImage, np.ndarray]:
    image, strokes, truth = (
        np.array(Image.open(SAMPLES / f"{name}{end}.png")) for end in ("", "_strokes", "_truth")
    )
    planes = image.reshape(1, *image.shape[:2], -1)
    return LabelledImage(planes, strokes[None].astype(np.int32)), truth[None].astype(np.int32)


@pytest.mark.timeout(900)
def test_strokes_segment_the_nuclei_sample_and_keep_what_the_first_preview_had(
    litemedsam: Backbone,
) -> None:
    image, truth = sample("nuclei")
    backbone = litemedsam
    # Half of the usual views and detail steps are enough for it.
    config = TrainConfig(max_steps=30, views=12, detail_steps=300)
    events = list(adapt(backbone, [image], default_classes(2), config=config))
    finished = events[-1]
    assert isinstance(finished, Finished)
    preview = next(e for e in events if isinstance(e, Preview))
    steps = Returning(predict(finished.adapter, backbone, image.image))
    for _ in steps:
        pass
    first = mean_iou(preview.labels[None], truth, 2)
    final = mean_iou(steps.value.labels, truth, 2)
    print(f"mean IoU: first preview {first:.3f}, after the round {final:.3f}")
    assert first > 0.7
    assert final > max(0.75, first - 0.02)


@pytest.mark.skipif(DATA is None, reason="set NAPARI_CONVLORA_DATA to the evaluation images")
@pytest.mark.timeout(900)
def test_three_annotated_blood_smears_segment_unseen_ones(litemedsam: Backbone) -> None:
    folder = Path(str(DATA)) / "wbc_blood_smear"
    split = json.loads((folder / "meta.json").read_text())["suggested_split"]

    def load(stem: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            read_image(folder / "images" / f"{stem}.png"),
            read_labels(folder / "masks" / f"{stem}.png") + 1,
        )

    backbone = litemedsam
    known = [LabelledImage(*load(stem)) for stem in split["train"][:3]]
    *_, finished = adapt(backbone, known, default_classes(3), config=TrainConfig(max_minutes=5))
    assert isinstance(finished, Finished)
    total = np.zeros((3, 3), np.int64)
    for stem in split["test"][:8]:
        image, truth = load(stem)
        steps = Returning(predict(finished.adapter, backbone, image))
        for _ in steps:
            pass
        total += confusion(steps.value.labels, truth, 3)
    assert scores(total, (1, 2, 3)).mean_iou >= 0.75
