"""Closing the panel's dock, opening it again, and a viewer that is closed meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from qtpy.QtWidgets import QApplication

from napari_convlora.widget import ConvLoRAWidget

LONG = 100_000
pytestmark = pytest.mark.usefixtures("window")


def close_dock(viewer, widget, qtbot):
    """Press the X of the dock."""
    dock = widget.parentWidget()
    assert dock.inner_widget() is widget
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: widget.workflow.resting)


def begin(qtbot, widget):
    """Start a long round and wait until it has taken a step."""
    widget.settings.max_steps.value = LONG
    widget.adapt()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > 1, timeout=60_000)


def test_a_panel_that_was_closed_comes_back_with_its_work(
    ready, make_widget, wait, qtbot, paint, saved
):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    qtbot.wait(50)
    close_dock(viewer, widget, qtbot)
    assert widget.isHidden()
    _, again = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    assert again is widget
    qtbot.waitUntil(lambda: not again.workflow.resting)
    assert not again.isHidden()
    saved(again)
    assert again.workflow.has_adapter
    assert [r.number for r in again.history.records] == [1]
    assert again.output.predict.isEnabled()
    before = (viewer.layers["annotations"].data > 0).sum()
    paint(viewer.layers["prediction"], 2, 20, rows=(0, 80), width=1)
    paint(viewer.layers["prediction"], 1, 60, rows=(0, 80), width=1)
    changed = again.images.current.written.corrected().sum()
    assert 0 < changed <= 160
    again.adapt()
    wait(again)
    assert again.status.startswith("Round 2 is done")
    assert (viewer.layers["annotations"].data > 0).sum() == before + changed


def test_two_panels_of_a_viewer_are_one(ready, make_widget, wait, paint):
    viewer, widget = ready()
    other = ConvLoRAWidget(viewer)
    viewer.window.add_dock_widget(other, name="another")
    assert other is widget
    other.adapt()
    wait(other)
    painted = (viewer.layers["annotations"].data > 0).sum()
    paint(viewer.layers["prediction"], 2, 20, rows=(20, 31), width=11)
    changed = int(other.images.current.written.corrected().sum())
    other.adapt()
    wait(other)
    assert (viewer.layers["annotations"].data > 0).sum() == painted + changed
    assert sum(isinstance(w, ConvLoRAWidget) for w in QApplication.allWidgets()) == 1


def test_panels_of_two_viewers_are_two(make_napari_viewer_proxy, make_widget):
    first, second = make_napari_viewer_proxy(), make_napari_viewer_proxy()
    assert make_widget(first) is not make_widget(second)


def test_closing_the_dock_keeps_what_a_round_has_learnt(ready, qtbot, wait, saved):
    viewer, widget = ready()
    begin(qtbot, widget)
    qtbot.wait(50)
    close_dock(viewer, widget, qtbot)
    wait(widget)
    saved(widget)
    assert widget.workflow.has_adapter
    assert [r.number for r in widget.history.records] == [1]


def test_nothing_begins_while_the_panel_is_closed_but_strokes_are_saved(
    ready, qtbot, paint, press, monkeypatch
):
    viewer, widget = ready()
    qtbot.wait(50)
    keys = {str(key) for key in viewer.keymap}
    assert keys >= {"A", "R", "N", "H"}
    close_dock(viewer, widget, qtbot)
    assert not {"A", "R", "N", "H"} & {str(key) for key in viewer.keymap}
    widget.keeper.autosave._soon.setInterval(1)
    widget.automatic._soon.setInterval(1)
    widget.automatic.setChecked(True)
    layer = viewer.layers["annotations"]
    layer.mode = "paint"
    layer.paint((40, 40), 2)
    qtbot.waitUntil(lambda: widget.keeper.entries != ())
    qtbot.wait(100)
    assert not widget.running
    assert not widget.history.records
    viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    qtbot.waitUntil(lambda: widget.running, timeout=10_000)  # the switch is still on
    widget.stop()


def test_a_dock_closed_at_once_leaves_nothing(make_napari_viewer_proxy, qtbot, halves):
    viewer = make_napari_viewer_proxy()
    viewer.add_image(halves)
    widget = ConvLoRAWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Conv-LoRA")
    runner = widget.workflow.runner
    viewer.window.remove_dock_widget(widget)
    qtbot.waitUntil(lambda: runner.closed)
    viewer.add_labels(np.zeros(halves.shape, int))
