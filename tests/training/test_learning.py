from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.events import Finished, Step
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.training import adapt
from tests.training.rounds import (
    CLASSES,
    HALVES,
    LEARNING,
    QUICK,
    Scene,
    finished,
    grey,
    mean_iou,
    predicted,
    with_labels,
)


@pytest.mark.usefixtures("whole_forests")
def test_three_strokes_teach_brightness_and_texture(backbone: Backbone, scene: Scene) -> None:
    image, truth = scene()
    config = TrainConfig(max_steps=20, views=8, device="cpu")
    adapter = finished(adapt(backbone, [image], CLASSES, config=config)).adapter
    assert mean_iou(predicted(adapter, backbone, image.image).labels, truth) > 0.9
    other, other_truth = scene(height=70, width=140, seed=5)
    assert mean_iou(predicted(adapter, backbone, other.image).labels, other_truth) > 0.8


@pytest.mark.parametrize("method", ["decoder_only", "lora", "conv_lora"])
@pytest.mark.parametrize("head", ["class_tokens", "classification_branch"])
@pytest.mark.parametrize("preset", ["fast", "full"])
def test_every_method_head_and_preset_trains(
    backbone: Backbone, scene: Scene, method: str, head: str, preset: str
) -> None:
    image, _ = scene()
    model = ModelConfig(method=method, head=head, queries=6)  # type: ignore[arg-type]
    config = replace(QUICK, preset=preset)  # type: ignore[arg-type]
    adapter = finished(adapt(backbone, [image], CLASSES, model, config)).adapter
    assert (adapter.model.method, adapter.model.head) == (method, head)
    blocks = {n.split("blocks.")[-1].split(".")[0] for n in adapter.state if "lora_B" in n}
    assert bool(blocks) == (method != "decoder_only")
    for name, tensor in adapter.state.items():
        assert tensor.isfinite().all(), name
        if "lora_B" in name:
            assert tensor.any(), f"{name} was not trained"
    result = predicted(adapter, backbone, image.image)
    assert set(np.unique(result.labels)) <= {1, 2, 3}


def test_between_few_strokes_the_detail_branch_counts_more_than_where_all_is_labelled(
    backbone: Backbone, scene: Scene
) -> None:
    image, truth = scene()
    whole = LabelledImage(image.image, truth)
    strokes, labelled = (
        float(finished(adapt(backbone, [i], CLASSES, config=QUICK)).adapter.state["detail.share"])
        for i in (image, whole)
    )
    assert 0.5 == labelled < strokes <= 0.7


def test_the_full_preset_adapts_more_blocks_than_the_fast_one(
    backbone: Backbone, scene: Scene
) -> None:
    layers = {}
    for preset in ("fast", "full"):
        config = replace(QUICK, preset=preset)  # type: ignore[arg-type]
        adapter = finished(adapt(backbone, [scene()[0]], CLASSES, config=config)).adapter
        layers[preset] = sum("lora_B" in n for n in adapter.state)
    assert 0 < layers["fast"] < layers["full"] == len(backbone.encoder.blocks)


def test_the_encoder_learns_without_the_detail_branch(scene: Scene) -> None:
    image, _ = scene()
    config = replace(LEARNING, max_steps=60, decoder_share=0)
    model = ModelConfig(detail=False, first_block=0)
    events = list(adapt(random_backbone("tiny"), [image], CLASSES, model, config))
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    state = finished(events).adapter.state
    assert all(tensor.any() for name, tensor in state.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
def test_training_leaves_the_backbone_bitwise_unchanged(kind: str, scene: Scene) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    before = copy.deepcopy(backbone.state_dict())
    finished(adapt(backbone, [scene()[0]], CLASSES, config=replace(QUICK, preset="full")))
    assert set(before) == set(backbone.state_dict())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.requires_grad for p in backbone.parameters())


def test_a_class_without_labels_is_left_out(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    table = (*CLASSES, ClassInfo(9, "never painted", "#ffffff"))
    adapter = finished(adapt(backbone, [image], table, config=QUICK)).adapter
    assert [c.id for c in adapter.classes] == [1, 2, 3]


def test_ids_need_not_be_consecutive(backbone: Backbone, scene: Scene) -> None:
    image, truth = scene()
    ids = np.array([0, 40, 7, 255])
    table = tuple(ClassInfo(int(i), f"c{i}", "#101010") for i in ids[1:])
    renamed = LabelledImage(image.image, ids[image.annotations])
    adapter = finished(adapt(backbone, [renamed], table, config=replace(QUICK, detail_steps=150)))
    result = predicted(adapter.adapter, backbone, image.image).labels
    assert set(np.unique(result)) <= {40, 7, 255}
    assert (result == ids[truth]).mean() > 0.5


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint8, 255), (np.uint16, 60_000), (np.int32, 10**6), (np.float64, 1e-3)]
)
def test_integer_and_float_images(
    backbone: Backbone, scene: Scene, dtype: type, top: float
) -> None:
    image, _ = scene()
    changed = LabelledImage((image.image * top).astype(dtype), image.annotations)
    adapter = finished(adapt(backbone, [changed], CLASSES, config=QUICK)).adapter
    assert predicted(adapter, backbone, changed.image).labels.shape == (1, 96, 96)


def test_bool_images(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    changed = LabelledImage(image.image > 0.5, image.annotations)
    finished(adapt(backbone, [changed], CLASSES, config=QUICK))


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_images_of_many_channels(backbone: Backbone, scene: Scene, channels: int) -> None:
    image, _ = scene(channels=channels)
    adapter = finished(adapt(backbone, [image], CLASSES, config=QUICK)).adapter
    assert len(adapter.normalizer.low) == channels


def test_a_fifth_channel_can_decide(backbone: Backbone) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((1, 64, 64, 5)).astype(np.float32) * 0.1
    image[:, :, 32:, 4] += 0.9
    config = replace(QUICK, detail_steps=100)
    labelled = with_labels(image, *HALVES)
    adapter = finished(adapt(backbone, [labelled], CLASSES, config=config)).adapter
    result = predicted(adapter, backbone, image).labels
    assert (result[..., :28] == 1).mean() > 0.9
    assert (result[..., 36:] == 2).mean() > 0.9


def test_a_stack_learns_from_every_plane(backbone: Backbone, scene: Scene) -> None:
    image, truth = scene(planes=3)
    annotations = image.annotations.copy()
    annotations[0][annotations[0] > 1] = 0  # plane 0 shows class 1 only, plane 1 nothing
    annotations[1] = 0
    annotations[2][annotations[2] == 1] = 0
    config = replace(QUICK, max_steps=10, detail_steps=200)
    labelled = LabelledImage(image.image, annotations)
    adapter = finished(adapt(backbone, [labelled], CLASSES, config=config)).adapter
    result = predicted(adapter, backbone, image.image).labels
    assert result.shape == (3, 96, 96)
    assert mean_iou(result[1], truth[1]) > 0.8


def test_several_images_of_different_sizes(backbone: Backbone, scene: Scene) -> None:
    images = [scene(seed=1)[0], scene(height=60, width=130, seed=2)[0]]
    finished(adapt(backbone, images, CLASSES, config=QUICK))


@pytest.mark.parametrize(
    "shape", [(10, 4000), (4000, 10), (20, 20), (35, 50), (1, 7), (9, 1), (1, 2), (2, 2)]
)
def test_odd_sizes_work(backbone: Backbone, shape: tuple[int, int]) -> None:
    image = grey((1, *shape, 1))
    labels = ((np.s_[:, 0, 0], 1), (np.s_[:, -1, -1], 2))
    adapter = finished(adapt(backbone, [with_labels(image, *labels)], CLASSES, config=QUICK))
    assert predicted(adapter.adapter, backbone, image).labels.shape == (1, *shape)


def test_a_dense_image_of_many_classes(backbone: Backbone) -> None:
    table = default_classes(20)
    labels = np.random.default_rng(0).integers(1, 21, (1, 96, 96))
    image = LabelledImage(labels[..., None].astype(np.uint8), labels)
    finished(adapt(backbone, [image], table, config=QUICK))


def test_a_seed_decides_everything(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()

    def run(seed: int, disturb: bool = False) -> dict[str, torch.Tensor]:
        events = []
        for event in adapt(backbone, [image], CLASSES, config=replace(QUICK, seed=seed)):
            events.append(event)
            if disturb:
                torch.rand(7)
                np.random.random(3)
        last = events[-1]
        assert isinstance(last, Finished)
        return last.adapter.state

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    again, other = run(0, disturb=True), run(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_callers_random_numbers_are_left_alone(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    torch.manual_seed(11)
    np.random.seed(11)
    expected = torch.rand(3), np.random.random(3)
    torch.manual_seed(11)
    np.random.seed(11)
    finished(adapt(backbone, [image], CLASSES, config=QUICK))
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.random(3), expected[1])


def test_the_callers_cache_is_used_and_changes_nothing(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = scene()
    cache = FeatureCache()
    first = finished(adapt(backbone, [image], CLASSES, config=QUICK, cache=cache)).adapter
    assert len(cache) > 0
    encoder = type(backbone.encoder)
    calls, prefix = [], encoder.prefix
    monkeypatch.setattr(encoder, "prefix", lambda *a: calls.append(1) or prefix(*a))
    again = finished(adapt(backbone, [image], CLASSES, config=QUICK, cache=cache)).adapter
    assert not calls, "the second round computes no frozen feature again"
    assert all(torch.equal(first.state[n], again.state[n]) for n in first.state)


def test_features_are_computed_once_per_view(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = type(backbone.encoder)
    calls, prefix = [], encoder.prefix
    monkeypatch.setattr(encoder, "prefix", lambda *a: calls.append(1) or prefix(*a))
    config = replace(QUICK, views=3, max_steps=12)
    finished(adapt(backbone, [scene()[0]], CLASSES, config=config))
    assert 0 < len(calls) <= 3 + 1  # and the tile that the detail branch reads


@pytest.mark.usefixtures("whole_forests")
def test_a_short_round_on_litemedsam_trains_and_predicts(
    scene: Scene, litemedsam: Backbone
) -> None:
    image, truth = scene(128, 128)
    backbone = litemedsam
    config = TrainConfig(max_steps=6, views=2, detail_steps=200, device="cpu")
    events = list(adapt(backbone, [image], CLASSES, config=config))
    assert sum(isinstance(e, Step) for e in events) == 6
    adapter = finished(events).adapter
    assert adapter.backbone_sha256 == backbone.checkpoint_sha256 != ""
    assert mean_iou(predicted(adapter, backbone, image.image).labels, truth) > 0.8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_round_is_repeatable_and_leaves_the_backbone_on_the_cpu(scene: Scene) -> None:
    backbone, (image, _) = random_backbone("tiny"), scene()
    config = replace(QUICK, device="cuda")
    first, again = (
        finished(adapt(backbone, [image], CLASSES, config=config)).adapter for _ in range(2)
    )
    assert {p.device.type for p in backbone.parameters()} == {"cpu"}
    for name, tensor in first.state.items():
        torch.testing.assert_close(again.state[name], tensor, atol=1e-3, rtol=1e-3)
    predicted(first, backbone, image.image)
