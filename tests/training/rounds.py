"""What the tests of a round share: quick settings, and how to read events and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from napari_convlora.backbones import Backbone
from napari_convlora.config import TrainConfig
from napari_convlora.evaluation.metrics import confusion, scores
from napari_convlora.events import Event, Failed, Finished
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction.predict import Prediction, predict

QUICK = TrainConfig(max_steps=3, views=3, detail_steps=8, score_every=2, device="cpu")
# Random weights need larger steps than a pretrained backbone.
LEARNING = TrainConfig(views=6, patience=1000, adapter_lr=0.02, decoder_lr=0.01, device="cpu")
CLASSES = default_classes(3)
Scene = Callable[..., tuple[LabelledImage, np.ndarray]]


def predicted(adapter: Adapter, backbone: Backbone, image: np.ndarray) -> Prediction:
    steps = Returning(predict(adapter, backbone, image, device="cpu", probabilities=True))
    for _ in steps:
        pass
    assert steps.value is not None
    return steps.value


def finished(events: Sequence[Event] | Iterator[Event]) -> Finished:
    last = list(events)[-1]
    assert isinstance(last, Finished), last
    return last


def mean_iou(prediction: np.ndarray, truth: np.ndarray, n_classes: int = 3) -> float:
    return scores(confusion(prediction, truth, n_classes), range(1, n_classes + 1)).mean_iou


def the_failure(events: Iterator[Event]) -> str:
    """The message of a round that fails without ado: one event, one sentence."""
    (event,) = events
    assert isinstance(event, Failed)
    message = event.message
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


def with_labels(image: np.ndarray, *labels: tuple[tuple, int]) -> LabelledImage:
    annotations = np.zeros(image.shape[:3], np.int32)
    for where, label in labels:
        annotations[where] = label
    return LabelledImage(image, annotations)


def grey(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


HALVES = ((np.s_[:, :, :3], 1), (np.s_[:, :, -3:], 2))
