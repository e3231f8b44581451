"""Stopping, pausing, failing, and whatever a user does in the middle of a run."""

from __future__ import annotations

import threading
import time

import napari
import numpy as np
import pytest
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QTimer

from napari_convlora.events import Silent

LONG = 5000


def begin(qtbot, widget):
    widget.adapt()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > 1, timeout=20_000)


def test_stop_keeps_what_was_learnt(ready, qtbot, wait):
    viewer, widget = ready(max_steps=LONG)
    begin(qtbot, widget)
    widget.run_bar.main_button.click()
    wait(widget)
    assert widget.status.startswith("Round 1 was stopped")
    assert widget.session.rounds[0].reason == "stopped"
    assert viewer.layers["prediction"].data.all()


def test_the_time_left_is_shown_and_counts_the_planes_to_predict(
    qtbot, wait, monkeypatch, paint, make_viewer, make_widget, halves
):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves, halves, halves]), name="stack")
    widget = make_widget(viewer, max_steps=LONG)
    layer = widget.start_annotating()
    paint(layer, 1, 10, plane=(0,))
    paint(layer, 2, 70, plane=(0,))
    run_round, planes = type(widget.session).run_round, []

    def watched(session, images, classes, control):
        planes.append(control.planes_after)
        return run_round(session, images, classes, control)

    monkeypatch.setattr(type(widget.session), "run_round", watched)
    widget.adapt()
    assert widget.run_bar.words.text().startswith("preparing · ")
    qtbot.waitUntil(lambda: " · about " in widget.run_bar.words.text(), timeout=20_000)
    assert widget.run_bar.words.text().endswith(" left")
    assert planes == [3]
    widget.stop()
    wait(widget)


def test_stop_before_the_first_step_keeps_the_adapter_of_before(ready, wait):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    first = widget.session.installed
    widget.adapt()
    widget.stop()
    wait(widget)
    assert widget.session.installed is first
    assert widget.status == "Stopped before anything was learnt; nothing has changed."


def test_nothing_can_be_exported_after_a_round_that_said_nothing(ready, wait):
    viewer, widget = ready()
    widget.adapt()
    assert (
        not widget.output.masks.isEnabled()
    )  # there is a layer for the prediction, but it is empty
    widget.stop()
    wait(widget)
    assert not widget.workflow.has_adapter
    assert not widget.output.masks.isEnabled()
    assert "prediction" not in viewer.layers
    widget.adapt()
    wait(widget)
    assert widget.output.masks.isEnabled()


def test_a_round_that_is_refused_leaves_no_prediction(ready, wait, monkeypatch):
    viewer, widget = ready()
    widget.session.backbone_name = "litemedsam"
    widget.source.choose_backbone("/nowhere/sam.pth")
    widget.adapt()
    wait(widget)
    assert widget.run_bar.status.wrong
    assert not widget.output.masks.isEnabled()
    assert "prediction" not in viewer.layers


def test_what_is_painted_on_the_empty_prediction_of_a_stopped_round_is_kept(ready, wait, paint):
    viewer, widget = ready()
    widget.adapt()
    layer = viewer.layers["prediction"]
    layer.paint((30, 40), 2)
    widget.stop()
    wait(widget)
    assert not widget.output.masks.isEnabled()
    assert "prediction" in viewer.layers
    widget.adapt()
    assert viewer.layers["annotations"].data[30, 40] == 2
    wait(widget)


def test_a_stroke_on_the_empty_prediction_outlives_a_round_that_ends_meanwhile(
    ready, wait, drag, qtbot
):
    viewer, widget = ready()
    widget.adapt()
    layer = viewer.layers["prediction"]
    layer.mode, layer.selected_label, layer.brush_size = "paint", 2, 3
    release = drag(layer, (20, 30), (30, 30), hold=True)
    widget.stop()
    wait(widget)
    assert "prediction" in viewer.layers
    release()
    qtbot.wait(50)
    assert "prediction" in viewer.layers
    widget.adapt()
    assert (viewer.layers["annotations"].data[20:30, 30] == 2).all()
    wait(widget)


def test_pause_holds_the_round_and_resume_goes_on(ready, qtbot, wait):
    _, widget = ready(max_steps=LONG)
    begin(qtbot, widget)
    widget.run_bar.pause_button.click()
    qtbot.waitUntil(lambda: widget.status.startswith("Paused after step"), timeout=10_000)
    assert widget.run_bar.pause_button.text() == "Resume"
    steps = len(widget.plot.losses)
    qtbot.wait(300)
    assert len(widget.plot.losses) == steps
    widget.run_bar.pause_button.click()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > steps, timeout=10_000)
    assert widget.run_bar.pause_button.text() == "Pause"
    widget.pause()
    widget.stop()  # a paused round can be stopped
    wait(widget)


def test_closing_the_viewer_ends_the_thread(make_widget, halves, paint, qtbot):
    viewer = napari.Viewer(show=False)
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer, max_steps=LONG)
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    painted = layer.data.copy()
    begin(qtbot, widget)
    runner = widget.workflow.runner
    viewer.close()
    assert runner.wait(10)
    qtbot.waitUntil(lambda: not runner.busy, timeout=10_000)
    assert (layer.data == painted).all()


def test_removing_the_dock_widget_ends_the_thread_and_keeps_corrections(
    window, ready, paint, qtbot, wait
):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.settings.max_steps.value = LONG
    begin(qtbot, widget)
    paint(viewer.layers["prediction"], 2, 20)
    runner = widget.workflow.runner
    viewer.window.remove_dock_widget(widget)
    widget.deleteLater()
    qtbot.waitUntil(lambda: runner._closed, timeout=10_000)
    assert runner.wait(10)
    assert (viewer.layers["annotations"].data[10:60, 20:23] == 2).all()
    viewer.layers.remove("prediction")  # nobody listens any more


@pytest.mark.parametrize("name", ["halves", "annotations", "prediction"])
def test_removing_a_layer_stops_and_loses_nothing_painted(ready, paint, qtbot, wait, name):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.settings.max_steps.value = LONG
    begin(qtbot, widget)
    annotations = viewer.layers["annotations"]
    paint(viewer.layers["prediction"], 2, 20)
    viewer.layers.remove(name)
    wait(widget)
    assert f"'{name}' was removed" in widget.status
    assert name not in viewer.layers
    assert (annotations.data[10:60, 10:13] == 1).all()
    if name == "prediction":
        assert (annotations.data[10:60, 20:23] == 2).all()
    if name == "annotations":
        assert not widget.run_bar.main_button.isEnabled()
        assert widget.start_annotating() == annotations  # brought back
        assert widget.run_bar.main_button.isEnabled()


def test_a_round_goes_on_while_another_image_is_annotated(ready, paint, qtbot, wait, halves):
    viewer, widget = ready(max_steps=LONG)
    viewer.add_image(halves + 1, name="other")
    begin(qtbot, widget)
    before = viewer.layers["annotations"].data.copy()
    widget.source.image_combo.value = viewer.layers["other"]
    paint(widget.start_annotating(), 2, 30)
    assert widget.running
    assert (viewer.layers["annotations"].data == before).all()
    widget.stop()
    wait(widget)
    assert len(widget.session.rounds) == 1
    assert widget.status.endswith("Press Predict to see what it makes of this image.")
    assert viewer.layers["prediction"].data.all(), "the first image was predicted"
    assert len([layer for layer in viewer.layers if "prediction" in layer.name]) == 1
    assert viewer.layers["annotations of other"].data.sum() == 2 * 150


@pytest.mark.parametrize(
    ("strokes", "sentence"), [((), "Nothing is annotated yet"), ((1,), "Only class 1 (background)")]
)
def test_too_few_labels_give_one_sentence(
    make_viewer, make_widget, halves, paint, wait, qtbot, strokes, sentence
):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    layer = widget.start_annotating()
    for class_id in strokes:
        paint(layer, class_id, 10)
    notification_manager.records.clear()
    widget.adapt()
    wait(widget)
    assert widget.status.startswith(sentence)
    qtbot.wait(400)  # the strokes are counted now at the latest
    assert widget.status.startswith(sentence), "a hint does not hide what went wrong"
    assert widget.status.count("\n") == 0
    assert [str(n.message) for n in notification_manager.records] == [widget.status]
    assert widget.run_bar.main_button.text() == "Adapt"
    assert widget.run_bar.main_button.isEnabled()


@pytest.mark.parametrize("error", [RuntimeError("tensor sizes differ\nat x"), KeyError("k")])
def test_a_broken_engine_is_reported_and_the_button_comes_back(
    ready, wait, error, monkeypatch, caplog
):
    _, widget = ready()

    def broken(*_):
        raise error
        yield

    monkeypatch.setattr(widget.session, "run_round", broken)
    notification_manager.records.clear()
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("It broke off: ")
    assert "\n" not in widget.status
    assert len(notification_manager.records) == 1
    assert widget.run_bar.main_button.isEnabled()
    assert "A job broke" in caplog.text  # the traceback, for a bug report


def test_a_round_that_says_nothing_is_told_of(ready, wait, monkeypatch, qtbot):
    _, widget = ready()
    go_on = threading.Event()

    def silent(*_):
        yield Silent(300.0)
        assert go_on.wait(20)

    monkeypatch.setattr(widget.session, "run_round", silent)
    widget.adapt()
    qtbot.waitUntil(lambda: "said nothing for 5 minutes" in widget.status, timeout=20_000)
    assert widget.run_bar.main_button.text() == "Stop"
    go_on.set()
    wait(widget)


def test_no_image_gives_advice(make_viewer, make_widget):
    widget = make_widget(make_viewer())
    assert widget.status.startswith("Open an image to begin")
    assert not widget.run_bar.main_button.isEnabled()
    widget.adapt()
    widget.predict()
    assert widget.status.startswith("No image is chosen")


def test_training_runs_in_one_other_thread(ready, wait, monkeypatch):
    _, widget = ready()
    seen = []
    run = widget.session.run_round

    def spy(*args):
        seen.append(threading.current_thread())
        yield from run(*args)

    monkeypatch.setattr(widget.session, "run_round", spy)
    widget.adapt()
    wait(widget)
    assert len(seen) == 1
    assert seen[0] is not threading.main_thread()


def test_the_window_answers_while_a_round_trains(ready, qtbot, wait):
    _, widget = ready(preview_seconds=0.3)
    widget.adapt()  # adds the prediction layer, which takes napari a good tenth of a second
    wait(widget)
    widget.settings.max_steps.value = 60
    beats = []
    timer = QTimer()
    timer.timeout.connect(lambda: beats.append(time.perf_counter()))
    timer.start(5)
    widget.adapt()
    wait(widget)
    timer.stop()
    gaps = 1000 * np.diff(beats)
    print(f"longest gap {gaps.max():.0f} ms, 99 % {np.percentile(gaps, 99):.0f} ms")
    assert gaps.max() < 200


@pytest.mark.parametrize("damaged", [False, True])
def test_the_first_backbone_is_loaded_before_anybody_asks(monkeypatch, damaged):
    from napari_convlora import backbones
    from napari_convlora.backbones.testing import random_backbone
    from napari_convlora.errors import WeightsError
    from napari_convlora.session import jobs
    from napari_convlora.session.session import Session

    def load(name):
        if damaged:
            raise WeightsError("The checkpoint is damaged; fetch it again.")
        return random_backbone()

    monkeypatch.setattr("napari_convlora.session.session.load_backbone", load)
    monkeypatch.setattr(backbones, "available_backbones", lambda: {"litemedsam": "x"})
    session = Session()
    *_, ready = jobs.warm_up(lambda: session, None)
    assert list(ready.backbones) == ["litemedsam"]
    assert (session._backbone is None) == damaged
