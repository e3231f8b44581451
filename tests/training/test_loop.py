from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from napari_convlora.backbones import Backbone
from napari_convlora.control import RunControl
from napari_convlora.events import (
    Event,
    Failed,
    Finished,
    Interim,
    Paused,
    Preview,
    Scored,
    Started,
    Step,
)
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.regions import Block
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.training import adapt
from tests.training.rounds import (
    CLASSES,
    QUICK,
    Scene,
    finished,
    grey,
    mean_iou,
    predicted,
    the_failure,
    with_labels,
)


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


@pytest.mark.usefixtures("whole_forests")
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


def test_previews_go_through_planes_that_are_seen_edge_on(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [scene(height=60, width=70, planes=5, seed=2)[0], scene(seed=1)[0]]
    control = RunControl()
    control.visible = (0, None)
    config = replace(QUICK, max_steps=6, preview_seconds=1e-9)
    events = list(adapt(backbone, images, CLASSES, config=config, control=control))
    first = [e.plane for e in events if isinstance(e, Preview) and e.stage == "detail"]
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert abs(first[0] - first[1]) > 1  # however few there is time for, they are spread
    monkeypatch.setattr("napari_convlora.training.detail_stage._SECONDS_EDGE_ON", 0)
    monkeypatch.setattr("napari_convlora.training.round_state._PREVIEW_REST", 0)
    events = list(adapt(backbone, images, CLASSES, config=config, control=control))
    previews = [e for e in events if isinstance(e, Preview)]
    assert {p.image for p in previews} == {0}
    assert [p.stage for p in previews].count("detail") == 1
    assert {p.plane for p in previews} == {0, 1, 2, 3, 4}  # each goes on where the last one ended


def test_parts_of_a_large_image_that_are_seen_edge_on_come_in_turn(
    backbone: Backbone, scene: Scene
) -> None:
    images = [scene(seed=seed)[0] for seed in range(3)]
    control = RunControl()
    control.places = [Block(plane, 0, 0, 96, 96) for plane in (0, 7)]
    control.seen, control.visible = control.places[0], (0, None)
    events = list(adapt(backbone, images, CLASSES, config=QUICK, control=control))
    assert {(e.image, e.plane) for e in events if isinstance(e, Preview)} == {(0, 0), (1, 0)}


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
    config = replace(QUICK, max_steps=100_000, max_minutes=0.05, patience=10**9)
    finished(adapt(backbone, [scene()[0]], CLASSES, config=QUICK))  # imports take seconds
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


def test_an_adapter_before_teaches_where_it_speaks_of_the_same(
    backbone: Backbone, scene: Scene
) -> None:
    image, _ = scene()
    other = LabelledImage(image.image[:, ::-1].copy(), image.annotations)
    before = finished(adapt(backbone, [other], CLASSES, config=QUICK)).adapter

    def learnt(before: Adapter | None, **options: bool) -> Tensor:
        config = replace(QUICK, **options)
        last = finished(adapt(backbone, [image], CLASSES, config=config, before=before))
        return last.adapter.state["detail.filters.weight"]

    alone = learnt(None)
    assert not torch.equal(learnt(before), alone)
    assert torch.equal(learnt(before), learnt(before.detail_alone()))
    assert torch.equal(learnt(before, keep_uncorrected=False), alone)
    low, high = (np.array(end) for end in (before.normalizer.low, before.normalizer.high))
    brighter = Normalizer(tuple(low + 0.2 * (high - low)), tuple(high + 0.2 * (high - low)))
    assert torch.equal(learnt(replace(before, normalizer=brighter)), alone)
    fewer = replace(before, classes=before.classes[:-1])
    assert torch.equal(learnt(fewer), alone)
    others = tuple(replace(info, name=f"{info.name}, another one") for info in before.classes)
    assert torch.equal(learnt(replace(before, classes=others)), alone)
    assert torch.equal(learnt(replace(before, pixel_scale=before.pixel_scale / 2)), alone)
    assert torch.equal(learnt(replace(before, backbone_sha256="0" * 64)), alone)
    broken = before.state | {"detail.std": torch.zeros_like(before.state["detail.std"])}
    assert torch.equal(learnt(replace(before, state=broken)), alone)
    damaged = replace(before, state={n: t[:1] for n, t in before.state.items() if t.ndim})
    assert torch.equal(learnt(damaged), alone)


def test_an_empty_field_among_others_may_be_background(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    empty = LabelledImage(image.image * 0, np.full_like(image.annotations, 1), name="empty")
    *_, last = adapt(backbone, [image, empty], CLASSES, config=QUICK)
    assert isinstance(last, Finished)


def test_an_image_that_cannot_be_learnt_from_is_named(backbone: Backbone, scene: Scene) -> None:
    image, _ = scene()
    nan = LabelledImage(image.image * np.float32(np.nan), image.annotations, name="second.tif")
    assert "second.tif" in the_failure(adapt(backbone, [image, nan], CLASSES, config=QUICK))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_fails_with_one_sentence(backbone: Backbone, scene: Scene) -> None:
    config = replace(QUICK, device="cuda")
    assert "cuda" in the_failure(adapt(backbone, [scene()[0]], CLASSES, config=config))


def allocate_on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text.")


def allocate_with_numpy() -> None:
    np.ones(2**50)


def allocate_with_torch() -> None:
    torch.empty(2**50)


@pytest.mark.parametrize(
    "allocate", [allocate_on_the_gpu, allocate_with_numpy, allocate_with_torch]
)
def test_running_out_of_memory_fails_with_one_sentence(
    backbone: Backbone,
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    allocate: Callable[[], None],
) -> None:
    def explode(*_: object) -> None:
        allocate()

    monkeypatch.setattr("napari_convlora.model.semantic_sam.SemanticSAM.suffix", explode)
    events = list(adapt(backbone, [scene()[0]], CLASSES, config=QUICK))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Failed)
    assert "memory" in events[-1].message
    assert "allocate" not in events[-1].message


def test_a_second_round_looks_at_views_it_knows(backbone: Backbone, scene: Scene) -> None:
    class Counting(FeatureCache):
        computed = 0

        def put(self, key: Hashable, features: Tensor) -> None:
            self.computed += 1
            super().put(key, features)

    cache, config = Counting(), replace(QUICK, views=12)
    labelled, _ = scene(300, 300)

    def computed() -> int:
        before = cache.computed
        finished(adapt(backbone, [labelled], CLASSES, config=config, cache=cache))
        return cache.computed - before

    first = computed()
    labelled.annotations[0, 3:5, 10:40] = 1
    assert computed() <= first / 2


def test_a_runtime_error_that_is_no_lack_of_memory_is_not_hidden(
    backbone: Backbone, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("napari_convlora.model.semantic_sam.SemanticSAM.suffix", explode)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(adapt(backbone, [scene()[0]], CLASSES, config=QUICK))


def test_what_was_learnt_so_far_comes_where_it_is_asked_for(
    backbone: Backbone, scene: Scene
) -> None:
    control = RunControl()
    control.keep_every = 0
    image, _ = scene()
    events = list(adapt(backbone, [image], CLASSES, config=QUICK, control=control))
    kept = [event for event in events if isinstance(event, Interim)]
    assert [event.step for event in kept] == list(range(QUICK.max_steps))
    assert [event.adapter.summary["steps"] for event in kept] == list(range(QUICK.max_steps))
    for event in kept:
        assert set(np.unique(predicted(event.adapter, backbone, image.image).labels)) <= {1, 2, 3}
    last = finished(events).adapter.state
    early = kept[1].adapter.state
    assert any(not torch.equal(early[name], last[name]) for name in last), "copies, not views"
