"""Going on from an adapter, and comparing a round with the installed one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.config import ModelConfig
from napari_convlora.control import RunControl
from napari_convlora.evaluation.gate import decide
from napari_convlora.events import Step
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.adapter import Adapter
from napari_convlora.training import adapt
from napari_convlora.training.versus_installed import Rival, learnt_pixels
from tests.conftest import make_scene
from tests.training.rounds import CLASSES, QUICK, Scene, finished, the_failure


@pytest.fixture(scope="module")
def painted() -> LabelledImage:
    """An image with so many labels that some are held out; not to be changed."""
    image, truth = make_scene(160, 192)
    return LabelledImage(image.image, truth, name="painted")


@pytest.fixture(scope="module")
def before(backbone: Backbone, painted: LabelledImage) -> Adapter:
    """What a round learnt from `painted`."""
    return first_round(backbone, painted)


def first_round(backbone: Backbone, image: LabelledImage) -> Adapter:
    return finished(adapt(backbone, [image], CLASSES, config=QUICK)).adapter


def compared(backbone: Backbone, image: LabelledImage, rival: Rival) -> dict:
    events = adapt(backbone, [image], CLASSES, config=QUICK, rival=rival)
    return finished(events).adapter.summary["compared"]


def test_two_rounds_are_compared_on_what_neither_has_learnt_from(backbone: Backbone) -> None:
    image, truth = make_scene(256, 288)  # with enough labels in half of it
    painted = LabelledImage(image.image, truth, name="painted")
    half = painted.annotations.copy()
    half[:, 128:] = 0
    first = replace(painted, annotations=half)
    before = first_round(backbone, first)
    learnt = learnt_pixels([first], before)
    assert 0 < np.unpackbits(learnt["painted"][1]).sum() < (half > 0).sum()
    result = compared(backbone, painted, Rival(before, learnt))
    assert result["pixels"] >= 50
    assert 0 <= result["installed"] <= 1
    assert 0 <= result["new"] <= 1


def test_an_adapter_that_knows_nothing_scores_worse_than_it_did(
    backbone: Backbone, painted: LabelledImage, before: Adapter
) -> None:
    nothing = replace(before, state={k: torch.zeros_like(v) for k, v in before.state.items()})
    good = compared(backbone, painted, Rival(before, learnt_pixels([painted], before)))
    bad = compared(backbone, painted, Rival(nothing, learnt_pixels([painted], before)))
    assert bad["new"] == good["new"]
    assert bad["pixels"] == good["pixels"]
    assert bad["installed"] < good["installed"]


def test_what_cannot_be_compared_says_why(
    backbone: Backbone, painted: LabelledImage, before: Adapter, scene: Scene
) -> None:
    learnt = learnt_pixels([painted], before)
    everything = {"painted": (painted.annotations.shape, np.packbits(painted.annotations > 0))}
    fewer = replace(before, classes=before.classes[:2])
    for rival, why in (
        (Rival(replace(before, backbone_name="vit_b"), learnt), "backbone"),
        (Rival(fewer, learnt), "classes"),
        (Rival(before, {}), "not known"),
        (Rival(before, everything), "too few labels"),
    ):
        assert why in compared(backbone, painted, rival)["why"]
    strokes, _ = scene()
    few = replace(strokes, name="painted")
    assert "too few labels" in compared(backbone, few, Rival(before, learnt))["why"]


def stopped(backbone: Backbone, image: LabelledImage, rival: Rival, *, hurry: bool = False) -> dict:
    control, events = RunControl(), []
    control.hurry = hurry
    short = replace(QUICK, detail_steps=1)
    for event in adapt(backbone, [image], CLASSES, config=short, rival=rival, control=control):
        events.append(event)
        if isinstance(event, Step):
            control.stop()
    last = finished(iter(events))
    assert last.reason == "stopped"
    return last.adapter.summary


def test_a_round_that_was_stopped_is_compared_as_well(
    backbone: Backbone, painted: LabelledImage
) -> None:
    longer = replace(QUICK, detail_steps=300)
    good = finished(adapt(backbone, [painted], CLASSES, config=longer)).adapter
    rival = Rival(good, learnt_pixels([painted], good))
    summary = stopped(backbone, painted, rival)
    assert summary["compared"]["new"] < summary["compared"]["installed"] - 0.01
    assert not decide(summary).better


def test_who_is_in_a_hurry_gets_no_comparison(
    backbone: Backbone, painted: LabelledImage, before: Adapter
) -> None:
    rival = Rival(before, learnt_pixels([painted], before))
    assert stopped(backbone, painted, rival, hurry=True)["compared"] == {"why": "it was broken off"}


def test_a_long_comparison_is_left_out_after_stop(
    backbone: Backbone, painted: LabelledImage, before: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("napari_convlora.training.versus_installed._WAIT", -1)
    rival = Rival(before, learnt_pixels([painted], before))
    assert "pixels" in compared(backbone, painted, rival)  # nobody has pressed Stop
    verdict = decide(stopped(backbone, painted, rival))
    assert verdict.better
    assert "as it was stopped, and a comparison" in verdict.reason


def test_a_comparison_changes_nothing_that_is_learnt(
    backbone: Backbone, painted: LabelledImage, before: Adapter
) -> None:
    rival = Rival(before, learnt_pixels([painted], before))
    alone, beside = (
        finished(adapt(backbone, [painted], CLASSES, config=QUICK, rival=r)).adapter.state
        for r in (None, rival)
    )
    assert all(torch.equal(tensor, beside[name]) for name, tensor in alone.items())


def test_a_round_that_goes_on_starts_where_the_other_ended(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    before = first_round(backbone, image)
    config = replace(QUICK, max_steps=1, adapter_lr=0.0, decoder_lr=0.0)
    after = finished(adapt(backbone, [image], CLASSES, config=config, start=before)).adapter
    assert after.summary["start"] == "installed"
    assert before.summary["start"] == "base"
    same = [k for k in before.state if not k.startswith("detail.")]
    assert all(torch.equal(before.state[k], after.state[k]) for k in same)
    assert after.normalizer == before.normalizer


def test_a_round_that_cannot_go_on_says_so(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    before = first_round(backbone, image)
    other = ModelConfig(method="lora")
    sentence = the_failure(adapt(backbone, [image], CLASSES, other, QUICK, start=before))
    assert "method or head settings" in sentence
    two = replace(image, annotations=np.where(image.annotations == 3, 0, image.annotations))
    sentence = the_failure(adapt(backbone, [two], CLASSES, config=QUICK, start=before))
    assert "annotated classes" in sentence
    assert "fit from the base instead" in sentence
