"""Rounds that begin by themselves: when, and when not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils.interactions import (
    mouse_double_click_callbacks,
    mouse_press_callbacks,
    mouse_release_callbacks,
)
from qtpy.QtCore import QPoint, Qt

from napari_convlora.project import Project
from napari_convlora.widget.layers import edits
from napari_convlora.widget.sections import auto_adapt


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(auto_adapt, "PAUSE_MS", 200)


@pytest.fixture
def rounds(monkeypatch):
    """Say what comparing each round with the one before is to give: mean IoU before and after."""
    scores = []

    def compare(run, rival):
        if rival is None or not scores:
            return {}
        before, new = scores.pop(0)
        return {"installed": before, "new": new, "pixels": 100}

    monkeypatch.setattr("napari_convlora.training.loop.compare", compare)
    return scores


def test_a_round_begins_after_the_last_stroke_and_another_after_the_next(
    ready, paint, wait, qtbot, rounds
):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    qtbot.wait(500)
    assert not widget.running  # the switch is off
    rounds.append((0.5, 0.8))
    widget.automatic.click()
    qtbot.waitUntil(lambda: widget.running)  # there are strokes that no round has learnt
    paint(layer, 2, 60)
    assert widget.status.endswith("What you paint now is learnt in the round after this one.")
    assert (layer.data[10:60, 60:63] == 2).all()
    qtbot.waitUntil(lambda: len(widget.session.rounds) == 2 and not widget.running, timeout=30_000)
    assert widget.session.installed.summary["labelled_pixels"]["2"] == 300  # 150 at first
    qtbot.wait(500)
    assert not widget.running  # nothing has changed since
    assert widget.automatic.paused == ""
    prediction = viewer.layers["prediction"]
    rounds.append((0.8, 0.9))
    paint(prediction, int(3 - prediction.data[30, 40]), 40, rows=(30, 31), width=1)
    qtbot.waitUntil(lambda: len(widget.session.rounds) == 3 and not widget.running, timeout=30_000)
    assert (layer.data > 0).sum() == 451


def test_undo_and_redo_are_learnt_too(ready, paint, qtbot, halves, rounds):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    paint(layer, 2, 60)
    rounds += [(0.5, 0.6), (0.6, 0.7)]

    def ended(n_rounds):
        return lambda: len(widget.session.rounds) == n_rounds and not widget.running

    acts = (lambda: widget.automatic.setChecked(True)), layer.undo, layer.redo
    for i, (act, pixels) in enumerate(zip(acts, (300, 150, 300), strict=True), 1):
        act()
        qtbot.waitUntil(ended(i), timeout=30_000)
        assert widget.session.rounds[-1].adapter.summary["labelled_pixels"]["2"] == pixels
    assert widget.automatic.paused == ""
    viewer.add_image(halves, name="other")  # looking at another image changes nothing
    widget.source.image_combo.value = viewer.layers["other"]
    qtbot.wait(300)
    widget.source.image_combo.value = viewer.layers["halves"]
    qtbot.wait(600)
    viewer.layers.remove("annotations")
    qtbot.wait(600)
    assert ended(3)()


def test_nothing_begins_while_the_mouse_is_held(window, ready, paint, wait, qtbot):
    viewer, widget = ready()
    canvas = viewer.__wrapped__.window._qt_viewer.canvas.native
    qtbot.mousePress(canvas, Qt.MouseButton.LeftButton, pos=QPoint(5, 5))
    widget.automatic.setChecked(True)
    paint(viewer.layers["annotations"], 2, 60)
    qtbot.wait(700)
    assert not widget.running
    qtbot.mouseRelease(canvas, Qt.MouseButton.LeftButton, pos=QPoint(5, 5))
    qtbot.waitUntil(lambda: widget.running)
    wait(widget)


def test_nothing_begins_while_a_polygon_is_drawn(ready, paint, wait, qtbot):
    viewer, widget = ready()
    widget.reviewed.draw("add_polygon")
    regions = viewer.layers["reviewed"]
    click = {
        "is_dragging": False,
        "dims_displayed": [0, 1],
        "dims_point": [0, 0],
        "view_direction": None,
        "button": 1,
        "buttons": [1],
        "modifiers": [],
        "handled": False,
        "native": None,
    }
    for at in ((5, 5), (5, 30), (30, 30)):
        event = SimpleNamespace(type="mouse_press", pos=np.array(at), position=at, **click)
        mouse_press_callbacks(regions, event)
        event.type = "mouse_release"
        mouse_release_callbacks(regions, event)
    widget.automatic.setChecked(True)
    qtbot.wait(700)
    assert not widget.running
    event.type = "mouse_double_click"
    mouse_double_click_callbacks(regions, event)
    qtbot.waitUntil(lambda: widget.running)
    wait(widget)


def test_rounds_are_paused_when_one_gains_nothing_until_the_next_adapt(
    ready, paint, wait, qtbot, rounds
):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    widget.adapt()
    wait(widget)
    rounds[:] = [(0.8, 0.8), (0.8, 0.7), (0.8, 0.9)]
    widget.automatic.click()
    qtbot.wait(500)
    assert not widget.running  # no stroke since
    paint(layer, 2, 60)
    qtbot.waitUntil(lambda: len(widget.session.rounds) == 2 and not widget.running, timeout=30_000)
    paused = "Automatic rounds are paused: the last round brought no gain; press Adapt to go on."
    assert "Round 2 is done" in widget.status
    assert widget.status.endswith(paused)
    paint(layer, 2, 50)
    widget.run_bar.status.say("something else")
    qtbot.waitUntil(lambda: widget.status == f"something else {paused}")
    widget.run_bar.main_button.click()
    wait(widget)
    assert len(widget.session.rounds) == 3
    assert "Kept but not installed" in widget.status  # by hand, so that it is nobody's business
    paint(layer, 1, 20)
    qtbot.waitUntil(lambda: len(widget.session.rounds) == 4 and not widget.running, timeout=30_000)
    assert widget.automatic.paused == ""


def test_stop_pauses_automatic_rounds(ready, paint, wait, qtbot):
    viewer, widget = ready(max_steps=500)
    widget.automatic.click()
    qtbot.waitUntil(lambda: widget.workflow.phase == "training", timeout=20_000)
    qtbot.waitUntil(lambda: "step" in widget.run_bar.words.text(), timeout=20_000)
    widget.stop()
    wait(widget)
    assert "Automatic rounds are paused: the last round" in widget.status
    paint(viewer.layers["annotations"], 2, 60)
    qtbot.wait(500)
    assert not widget.running


def test_clearing_the_prediction_says_nothing_and_can_be_undone(ready, wait, qtbot):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.automatic.setChecked(True)
    record = widget.images.current
    edits.reject(record, record.predicted_view() == 2)
    qtbot.wait(500)
    assert not widget.running
    viewer.layers["prediction"].undo()
    assert (viewer.layers["prediction"].data > 0).all()


def test_the_switch_belongs_to_the_project(ready, tmp_path, make_widget, qtbot):
    viewer, widget = ready()
    widget.automatic.setChecked(True)
    widget.keeper.create(tmp_path / "p")
    widget.keeper.close()
    widget.automatic.setChecked(False)
    project = Project.open(tmp_path / "p")
    assert project.manifest.automatic
    project.close()
    viewer.layers.clear()
    again = make_widget(viewer)
    again.keeper.open(tmp_path / "p")
    assert again.automatic.isChecked()
    qtbot.wait(500)
    assert not again.running  # opening it is no stroke
