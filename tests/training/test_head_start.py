from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.config import ModelConfig, TrainConfig
from napari_convlora.control import RunControl
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.training.head_start import begin_head
from napari_convlora.training.losses import VOID
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.views import view_target
from tests.conftest import CLASSES, make_scene


def new_round(backbone: Backbone, image: LabelledImage, **model) -> RoundState:
    config = TrainConfig(views=4, device="cpu")
    return RoundState(
        backbone, [image], CLASSES, ModelConfig(**model), config, RunControl(), FeatureCache()
    )


@torch.no_grad()
def share_right(run: RoundState) -> float:
    """Share of the labelled pixels that the head alone gets right."""
    run.model.eval()
    right = []
    for view in run.views:
        logits = run.model.decode(run.embedding(view)[None]).logits
        found = torch.nn.functional.interpolate(logits, (run.tile, run.tile)).argmax(1)[0]
        target = view_target(run.data, view, run.tile)
        right.append((found == target)[target != VOID])
    return float(torch.cat(right).float().mean())


def test_the_head_knows_dark_from_bright_before_a_single_step(litemedsam: Backbone) -> None:
    image, truth = make_scene()
    run = new_round(litemedsam, LabelledImage(image.image, np.where(truth < 3, truth, 0)))
    begin_head(run)
    assert share_right(run) > 0.9


def test_a_class_that_the_views_lack_is_no_obstacle(litemedsam: Backbone) -> None:
    image, _ = make_scene()
    run = new_round(litemedsam, image)
    labels = image.annotations.copy()
    labels[labels == 3] = 0
    run.set_annotations([LabelledImage(image.image, labels)])
    begin_head(run)
    assert share_right(run) > 0.9
    run.set_annotations([LabelledImage(image.image, np.minimum(labels, 1))])
    before = {name: tensor.clone() for name, tensor in run.model.head.state_dict().items()}
    begin_head(run)
    after = run.model.head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_backbone_that_overflows_is_no_obstacle(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_round(backbone, make_scene()[0])
    honest = run.model.head.evidence
    monkeypatch.setattr(run.model.head, "evidence", lambda *maps: honest(*maps) / 0)
    begin_head(run)
    assert all(p.isfinite().all() for p in run.model.head.parameters())


@pytest.mark.parametrize(
    "model", [{"head": "classification_branch"}, {"plain_start": True}], ids=str
)
def test_other_starts_stay_as_they_are(backbone: Backbone, model: dict) -> None:
    run = new_round(backbone, make_scene()[0], **model)
    before = {name: tensor.clone() for name, tensor in run.model.head.state_dict().items()}
    begin_head(run)
    after = run.model.head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
