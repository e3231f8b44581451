from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from napari_convlora.adapter_file import Adapter
from napari_convlora.annotations import LabelledImage, default_classes
from napari_convlora.backbones import Backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.data import FeatureCache
from napari_convlora.events import (
    Event,
    Failed,
    Finished,
    Paused,
    Preview,
    RunControl,
    Scored,
    Started,
    Step,
)
from napari_convlora.metrics import confusion, scores
from napari_convlora.prediction import Prediction, Returning, predict
from napari_convlora.training import adapt

QUICK = TrainConfig(max_steps=3, views=4, detail_steps=15, score_every=2, device="cpu")
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


# ---------------------------------------------------------------------------- what is learnt


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


# ---------------------------------------------------------------------------- kinds of images


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


# ---------------------------------------------------------------------------- events


def test_events_come_in_order(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    config = replace(QUICK, max_steps=5, preview_seconds=1e-9)
    events = list(adapt(backbone, [image], CLASSES, config=config))
    started, last = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(last, Finished)
    assert started.total_steps == 5
    assert started.device == "cpu"
    assert started.pixels == {i: int((image.annotations == i).sum()) for i in (1, 2, 3)}
    steps = [e for e in events if isinstance(e, Step)]
    assert [s.step for s in steps] == [1, 2, 3, 4, 5]
    assert all(s.total_steps == 5 and np.isfinite(s.loss) for s in steps)
    assert [s.seconds for s in steps] == sorted(s.seconds for s in steps)
    scored = [e for e in events if isinstance(e, Scored)]
    assert scored
    assert all(0 <= s.score <= 1 and s.held_out == started.held_out for s in scored)
    previews = [e for e in events if isinstance(e, Preview)]
    assert previews[0].stage == "detail"
    assert events.index(previews[0]) < events.index(steps[0])
    assert {p.stage for p in previews} == {"detail", "adapted"}
    for preview in previews:
        assert preview.labels.shape == (96, 96)
        assert set(np.unique(preview.labels)) <= {1, 2, 3}
    assert sum(isinstance(e, Started | Finished | Failed) for e in events) == 2
    assert last.reason == "steps"
    assert last.adapter.summary["steps"] == 5


def test_the_first_preview_is_already_good(backbone: Backbone, scene: Scene) -> None:
    image, truth = scene()
    config = replace(QUICK, detail_steps=300)
    first = next(
        e for e in adapt(backbone, [image], CLASSES, config=config) if isinstance(e, Preview)
    )
    assert mean_iou(first.labels, truth[0]) > 0.85


def test_previews_show_the_plane_that_is_looked_at(backbone: Backbone, scene: Scene) -> None:
    images = [scene(seed=1)[0], scene(height=60, width=70, planes=2, seed=2)[0]]
    control = RunControl()
    control.visible = (1, 1)
    config = replace(QUICK, preview_seconds=1e-9)
    events = list(adapt(backbone, images, CLASSES, config=config, control=control))
    previews = [e for e in events if isinstance(e, Preview)]
    assert {(p.image, p.plane, p.labels.shape) for p in previews} == {(1, 1, (60, 70))}


def test_dense_labels_are_scored_on_held_out_ones(backbone: Backbone, scene: Scene) -> None:
    image, truth = scene(height=160, width=300)
    events = list(adapt(backbone, [LabelledImage(image.image, truth)], CLASSES, config=QUICK))
    assert events[0].held_out
    assert any(isinstance(e, Scored) and e.held_out for e in events)
    assert finished(events).adapter.summary["held_out"]


def test_the_adapter_tells_how_it_came_about(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    adapter = finished(adapt(backbone, [image], CLASSES, config=replace(QUICK, seed=3))).adapter
    assert adapter.backbone_name == backbone.spec.name
    assert adapter.classes == CLASSES
    assert adapter.version
    assert adapter.pixel_scale > 0
    assert adapter.summary["seed"] == 3
    assert adapter.summary["ended_by"] == "steps"
    assert adapter.summary["labelled_pixels"]["2"] == (image.annotations == 2).sum()


# ---------------------------------------------------------------------------- determinism


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


# ---------------------------------------------------------------------------- cache


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
    assert 0 < len(calls) <= 3


# ---------------------------------------------------------------------------- control


def test_stop_ends_after_the_current_step_with_a_usable_adapter(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    control, events = RunControl(), []
    for event in adapt(
        backbone, [image], CLASSES, config=replace(QUICK, max_steps=50), control=control
    ):
        events.append(event)
        if isinstance(event, Step) and event.step == 2:
            control.stop()
    last = finished(events)
    assert last.reason == "stopped"
    assert last.adapter.summary["steps"] == 2
    predicted(last.adapter, backbone, image.image)


def test_stopping_at_the_first_preview_keeps_what_it_showed(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    control, shown = RunControl(), None
    for event in adapt(
        backbone, [image], CLASSES, config=replace(QUICK, detail_steps=150), control=control
    ):
        if isinstance(event, Preview):
            shown = event.labels
            control.stop()
    assert isinstance(event, Finished)
    result = predicted(event.adapter, backbone, image.image).labels[0]
    assert shown is not None
    assert (result == shown).mean() > 0.9


def test_a_round_stopped_before_its_first_preview_has_nothing_to_install(
    backbone: Backbone, scene: Scene
) -> None:
    control = RunControl()
    control.stop()
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=QUICK, control=control))
    assert isinstance(events[0], Started)
    assert len(events) == 2
    assert isinstance(events[-1], Failed)
    assert "nothing has changed" in events[-1].message


class Runner(threading.Thread):
    """Consumes a round in a thread and records its events."""

    def __init__(self, events: Iterator[Event]) -> None:
        super().__init__(daemon=True)
        self.source, self.events = events, []
        self.start()

    def run(self) -> None:
        for event in self.source:
            self.events.append(event)

    def wait_for(self, kind: type, count: int = 1) -> None:
        deadline = time.monotonic() + 30
        while sum(isinstance(e, kind) for e in list(self.events)) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__}: {self.events[-2:]}"
            time.sleep(0.005)


def test_pause_blocks_until_resume(backbone: Backbone, scene: Scene) -> None:
    control = RunControl()
    config = replace(QUICK, max_steps=40, patience=1000)
    runner = Runner(adapt(backbone, [scene()[0]], CLASSES, config=config, control=control))
    runner.wait_for(Step)
    control.pause()
    runner.wait_for(Paused)
    count = len(runner.events)
    time.sleep(0.3)
    assert len(runner.events) == count, "nothing happens while paused"
    assert runner.is_alive()
    control.resume()
    runner.join(60)
    assert isinstance(runner.events[-1], Finished)
    steps = [e.step for e in runner.events if isinstance(e, Step)]
    assert steps == list(range(1, 41)), "no step is lost or repeated"


def test_stop_ends_a_paused_round(backbone: Backbone, scene: Scene) -> None:
    control = RunControl()
    control.pause()
    runner = Runner(adapt(backbone, [scene()[0]], CLASSES, config=QUICK, control=control))
    runner.wait_for(Paused)
    control.stop()
    runner.join(30)
    assert not runner.is_alive()
    assert runner.events[-1].reason == "stopped"


def test_a_pause_changes_nothing_in_the_result(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    plain = finished(adapt(backbone, [image], CLASSES, config=QUICK)).adapter
    control = RunControl()
    for event in adapt(backbone, [image], CLASSES, config=QUICK, control=control):
        if isinstance(event, Step) and event.step == 1:
            control.pause()
        if isinstance(event, Paused):
            control.resume()
    assert all(torch.equal(plain.state[n], event.adapter.state[n]) for n in plain.state)


def test_new_annotations_take_effect(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    swapped = LabelledImage(image.image, np.array([0, 2, 1, 3])[image.annotations])

    def run(update: LabelledImage | None) -> tuple[dict[str, torch.Tensor], RunControl]:
        control = RunControl()
        for event in adapt(backbone, [image], CLASSES, config=QUICK, control=control):
            if isinstance(event, Step) and event.step == 1 and update is not None:
                control.update_annotations([update])
        assert isinstance(event, Finished)
        return event.adapter.state, control

    plain, _ = run(None)
    same, _ = run(image)
    other, control = run(swapped)
    assert all(torch.equal(plain[n], same[n]) for n in plain), "the same labels change nothing"
    assert any(not torch.equal(plain[n], other[n]) for n in plain)
    assert control.take_annotations() is None, "they were taken once"


def test_erasing_every_label_meanwhile_is_survived(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    control = RunControl()
    for event in adapt(backbone, [image], CLASSES, config=QUICK, control=control):
        if isinstance(event, Step) and event.step == 1:
            empty = LabelledImage(image.image, np.zeros_like(image.annotations))
            control.update_annotations([empty])
    assert isinstance(event, Finished)
    assert all(t.isfinite().all() for t in event.adapter.state.values())


def test_labels_that_cannot_be_trained_on_wait_for_the_next_round(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    fourth = image.annotations.copy()
    fourth[0, 0, 0] = 4  # a class that is not in this round's table
    plain = finished(adapt(backbone, [image], CLASSES, config=QUICK)).adapter.state
    control = RunControl()
    for event in adapt(backbone, [image], CLASSES, config=QUICK, control=control):
        if isinstance(event, Step):
            control.update_annotations([LabelledImage(image.image, fourth)])
    assert isinstance(event, Finished)
    assert all(torch.equal(plain[n], event.adapter.state[n]) for n in plain)


def test_new_annotations_refit_the_detail_branch_and_are_previewed(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    swapped = LabelledImage(image.image, np.array([0, 2, 1, 3])[image.annotations])
    control, previews = RunControl(), []
    config = replace(QUICK, detail_steps=150)
    for event in adapt(backbone, [image], CLASSES, config=config, control=control):
        if isinstance(event, Step) and event.step == 1:
            control.update_annotations([swapped])
        if isinstance(event, Preview):
            previews.append(event.labels)
    assert len(previews) == 2
    where = image.annotations[0] == 1
    assert (previews[1][where] == 2).mean() > 0.9


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_without_finite_gradient_is_left_out_and_several_end_the_round(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    from napari_convlora.training import step

    dense_loss, calls = step.dense_loss, []

    def broken(*arguments: object) -> torch.Tensor:
        calls.append(1)
        loss = dense_loss(*arguments)  # type: ignore[arg-type]
        return loss * float("inf") if len(calls) <= 2 * steps else loss  # two losses a step

    monkeypatch.setattr(step, "dense_loss", broken)
    last = list(adapt(backbone, [scene()[0]], CLASSES, config=replace(QUICK, max_steps=6)))[-1]
    if steps == 1:
        assert isinstance(last, Finished)
        assert all(t.isfinite().all() for t in last.adapter.state.values())
    else:
        assert isinstance(last, Failed)
        assert "unstable" in last.message


def test_looking_at_an_image_that_is_not_there_shows_the_first(
    backbone: Backbone, scene: Scene
) -> None:
    control = RunControl()
    control.visible = (7, 7)
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=QUICK, control=control))
    assert isinstance(events[-1], Finished)
    assert next((e.image, e.plane) for e in events if isinstance(e, Preview)) == (0, 0)


def test_time_is_respected(backbone: Backbone, scene: Scene) -> None:
    config = replace(QUICK, max_steps=100_000, max_minutes=0.02, patience=10**9)
    start = time.monotonic()
    last = finished(adapt(backbone, [scene()[0]], CLASSES, config=config))
    assert last.reason == "time"
    assert 0 < last.adapter.summary["steps"] < 100_000
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("decoder_share", [0, 0.2])
def test_a_plateau_ends_the_round_but_not_before_the_encoder_has_trained(
    backbone: Backbone, scene: Scene, decoder_share: float
) -> None:
    config = replace(
        QUICK,
        max_steps=200,
        patience=6,
        adapter_lr=0,
        decoder_lr=0,
        decoder_share=decoder_share,
    )
    last = finished(adapt(backbone, [scene()[0]], CLASSES, config=config))
    assert last.reason == "plateau"
    assert 200 * decoder_share < last.adapter.summary["steps"] < 100


# ---------------------------------------------------------------------------- bad input


def test_bad_input_fails_with_one_sentence(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    nan = image.image.copy()
    nan[0, 3, 3] = np.nan
    one = np.where(image.annotations == 2, 2, 0)
    cases: dict[str, tuple[list[LabelledImage], str]] = {
        "no image": ([], "annotated"),
        "no labels": ([LabelledImage(image.image, one * 0)], "annotated"),
        "one class": ([LabelledImage(image.image, one)], "Only class 2"),
        "NaN": ([LabelledImage(nan, image.annotations)], "NaN"),
        "infinite": ([LabelledImage(np.nan_to_num(nan, nan=np.inf), image.annotations)], "inf"),
        "constant": ([LabelledImage(image.image * 0, image.annotations)], "every pixel"),
        "one pixel": ([with_labels(grey((1, 1, 1, 1)), (np.s_[0, 0, 0], 1))], "every pixel"),
        "no pixels": ([with_labels(grey((1, 0, 5, 1)))], "no pixels"),
        "unknown class": ([LabelledImage(image.image, image.annotations + 5)], "class table"),
        "instance map": ([LabelledImage(image.image, image.annotations * 999)], "255"),
        "float labels": ([LabelledImage(image.image, image.annotations * 0.5)], "whole numbers"),
        "complex": ([LabelledImage(image.image * 1j, image.annotations)], "complex"),
        "mixed": ([image, scene(channels=3)[0]], "channels"),
    }
    for name, (images, word) in cases.items():
        message = the_failure(adapt(backbone, images, CLASSES, config=QUICK))
        assert word in message, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_fails_with_one_sentence(backbone: Backbone, scene: Scene) -> None:
    config = replace(QUICK, device="cuda")
    assert "cuda" in the_failure(adapt(backbone, [scene()[0]], CLASSES, config=config))


def test_running_out_of_memory_fails_with_one_sentence(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text.")

    monkeypatch.setattr("napari_convlora.model.SemanticSAM.suffix", explode)
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=QUICK))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Failed)
    assert "memory" in events[-1].message
    assert "Tried to allocate" not in events[-1].message


# ---------------------------------------------------------------------------- real weights


def test_a_short_round_on_litemedsam_trains_and_predicts(
    scene: Scene, litemedsam: Backbone
) -> None:
    image, truth = scene(128, 128)
    backbone = litemedsam
    config = TrainConfig(max_steps=6, views=2, batch=1, device="cpu")
    events = list(adapt(backbone, [image], CLASSES, config=config))
    assert sum(isinstance(e, Step) for e in events) == 6
    adapter = finished(events).adapter
    assert adapter.backbone_sha256 == backbone.checkpoint_sha256 != ""
    assert mean_iou(predicted(adapter, backbone, image.image).labels, truth) > 0.8


# ---------------------------------------------------------------------------- real devices


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
