"""The real path: the window on one side, the engine in a process of its own on the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
from napari.utils.notifications import notification_manager

from napari_convlora.config import TrainConfig
from napari_convlora.prediction.prompts import Box
from napari_convlora.widget import ConvLoRAWidget

LONG = 100_000
# Read by every Python that starts; the window's own session never loads a backbone.
SITE = """
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.session import session
from napari_convlora.training import detail_fit

backbone = random_backbone()
session.load_backbone = lambda name: backbone
detail_fit._TREES = 8
"""


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Child processes have a tiny backbone of random weights."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def begin(tiny, halves, paint, qtbot):
    """Dock a widget that has no session of its own, with a stroke in each half."""
    widgets = []

    def make(viewer, max_steps=LONG, preview_seconds=0):
        viewer.add_image(halves, name="halves")
        widget = ConvLoRAWidget(viewer)
        widgets.append(widget)
        viewer.window.add_dock_widget(widget, name="Conv-LoRA")
        widget.settings.train = TrainConfig(
            views=2, detail_steps=5, score_every=2, patience=LONG, device="cpu"
        )
        widget.settings.max_steps.value = max_steps
        widget.settings.preview_seconds.value = preview_seconds
        widget.settings.device.value = "cpu"
        layer = widget.start_annotating()
        paint(layer, 1, 10)
        paint(layer, 2, 70)
        qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
        return widget

    yield make
    for widget in widgets:
        assert widget.workflow.runner.close(20)


@pytest.fixture
def training(begin, make_napari_viewer_proxy, qtbot):
    """Viewer and widget in the middle of a round."""

    def make(**settings):
        viewer = make_napari_viewer_proxy()
        widget = begin(viewer, **settings)
        widget.adapt()
        qtbot.waitUntil(lambda: len(widget.plot.losses) > 1, timeout=60_000)
        return viewer, widget

    return make


def processes() -> set[int]:
    """Python processes below this one."""
    children = psutil.Process().children(recursive=True)
    return {p.pid for p in children if "napari_convlora.session.process" in " ".join(p.cmdline())}


def test_a_prompt_is_answered_once(begin, make_napari_viewer_proxy, qtbot):
    widget = begin(make_napari_viewer_proxy())
    tool, annotations = widget.prompts, widget.images.need().annotations
    before, painted = annotations.data.copy(), []
    tool.button.setChecked(True)
    annotations.events.paint.connect(painted.append)
    annotations.events.labels_update.connect(painted.append)
    tool.add_box(0, Box(20, 20, 60, 60))
    qtbot.waitUntil(lambda: bool(painted) and not tool.runner.busy, timeout=60_000)
    changes = len(painted)
    assert (annotations.data != before).any()
    qtbot.wait(500)
    assert not tool.runner.busy
    assert len(painted) == changes
    annotations.undo()
    assert (annotations.data == before).all()


def test_rounds_predictions_and_loading_in_one_process(
    begin, make_napari_viewer_proxy, wait, tmp_path, qtbot
):
    viewer = make_napari_viewer_proxy()
    widget = begin(viewer, max_steps=3)
    widget.adapt()
    wait(widget, 60_000)
    assert widget.status.startswith("Round 1 is done")
    assert [step for step, _ in widget.plot.losses] == [1, 2, 3]
    prediction = viewer.layers["prediction"]
    assert set(np.unique(prediction.data)) <= {1, 2}
    assert prediction.data.all()
    (pid,) = processes()
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 2 is done")
    assert [r.number for r in widget.session.rounds] == [1, 2]
    expected = prediction.data.copy()
    widget.export_adapter(tmp_path / "a.safetensors")
    prediction.data[:] = 0
    widget.predict()
    wait(widget)
    assert (prediction.data == expected).all()

    before = widget.session.installed
    prediction.data[:] = 0
    widget.load_adapter(tmp_path / "a.safetensors")
    wait(widget)
    assert widget.session.installed is not before
    assert (prediction.data == expected).all()
    (tmp_path / "b.safetensors").write_bytes(b"no adapter")
    widget.load_adapter(tmp_path / "b.safetensors")
    wait(widget)
    assert "b.safetensors" in widget.status
    assert processes() == {pid}


def test_stop_pause_and_resume_act_at_once(training, qtbot, wait):
    viewer, widget = training()
    widget.run_bar.pause_button.click()
    qtbot.waitUntil(lambda: widget.status.startswith("Paused after step"), timeout=3000)
    steps = len(widget.plot.losses)
    qtbot.wait(300)
    assert len(widget.plot.losses) == steps
    widget.run_bar.pause_button.click()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > steps, timeout=3000)
    widget.run_bar.main_button.click()
    wait(widget, 5000)
    assert widget.status.startswith("Round 1 was stopped")
    assert viewer.layers["prediction"].data.all()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_killed_trainer_leaves_the_window_the_strokes_and_what_was_learnt(
    training, paint, qtbot, wait
):
    viewer, widget = training()
    painted = viewer.layers["annotations"].data.copy()
    notification_manager.records.clear()
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    wait(widget, 5000)
    assert "was killed" in widget.status
    assert widget.status.endswith("the first preview is kept.")
    assert [str(n.message) for n in notification_manager.records] == [widget.status]
    assert (viewer.layers["annotations"].data == painted).all()
    assert widget.session.installed is not None
    assert widget.run_bar.main_button.text() == "Adapt"
    widget.predict()  # with what was learnt, in a new process
    wait(widget, 60_000)
    assert viewer.layers["prediction"].data.all()
    widget.settings.max_steps.value = 2
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 2 is done")
    (other,) = processes()
    assert other != pid


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_killed_round_does_not_replace_the_one_before(
    begin, make_napari_viewer_proxy, qtbot, wait
):
    widget = begin(make_napari_viewer_proxy(), max_steps=2)
    widget.adapt()
    wait(widget, 60_000)
    first = widget.session.installed
    widget.settings.max_steps.value = LONG
    widget.adapt()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > 0, timeout=60_000)
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    wait(widget, 5000)
    assert "is kept. It is in Rounds, and the round before stays installed." in widget.status
    assert widget.session.installed is first
    qtbot.waitUntil(lambda: len(widget.history.records) == 2)
    assert [record.better for record in widget.history.records] == [True, False]
    assert widget.history.installed == 1


def test_a_process_killed_between_rounds_is_replaced(begin, make_napari_viewer_proxy, wait, qtbot):
    widget = begin(make_napari_viewer_proxy(), max_steps=2)
    qtbot.waitUntil(widget.workflow.runner._idle.is_set, timeout=60_000)
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    qtbot.waitUntil(lambda: not widget.workflow.runner._child.alive)
    widget.adapt()
    wait(widget, 60_000)
    assert widget.status.startswith("Round 1 is done")


def test_a_round_whose_image_was_put_away_ends_without_predicting_it(training, wait):
    _, widget = training()
    (pid,) = processes()
    widget.workflow.release(widget.images.need())
    assert widget.running
    widget.stop()
    wait(widget, 20_000)
    assert widget.status.endswith("Press Predict to see what it makes of this image.")
    assert len(widget.session.rounds) == 1
    assert processes() == {pid}


def test_removing_the_image_stops_the_round_and_keeps_the_process(training, wait):
    viewer, widget = training()
    (pid,) = processes()
    viewer.layers.remove("halves")
    wait(widget, 10_000)
    assert "'halves' was removed" in widget.status
    assert len(widget.session.rounds) == 1
    assert processes() == {pid}


NAPARI = """
    import os
    import sys

    import napari
    import numpy as np
    from qtpy.QtCore import QTimer

    from napari_convlora.config import TrainConfig
    from napari_convlora.widget import ConvLoRAWidget

    print("top", flush=True)
    viewer = napari.Viewer(show=True)
    widget = ConvLoRAWidget(viewer)
    viewer.window.add_dock_widget(widget)
    if {training}:
        viewer.add_image(np.random.default_rng(0).random((80, 90)))
        layer = widget.start_annotating()
        layer.data_setitem((np.arange(9), np.arange(9)), 1)
        layer.data_setitem((np.arange(40, 60), np.arange(40, 60)), 2)
        widget.settings.train = TrainConfig(views=2, detail_steps=5)
        widget.settings.max_steps.value = 100_000
        widget.adapt()

    def look():
        child = widget.workflow.runner._child
        if child is not None and (widget.plot.losses or not {training}):
            print(child.pid, flush=True)
            timer.stop()
            {then}

    timer = QTimer()
    timer.timeout.connect(look)
    timer.start(10)
    napari.run()
"""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("then", ["viewer.close()", "sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_no_process_is_left_however_napari_ends(tiny, monkeypatch, tmp_path, then, training):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(NAPARI.format(then=then, training=training)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("top\n"), done.stderr
    (pid,) = done.stdout.split()[1:]  # the script ran once
    try:
        psutil.Process(int(pid)).wait(10)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        assert psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


CLOSED_DOCK = """
import gc
import sys
import time

import napari
import psutil
from qtpy.QtCore import QEvent
from qtpy.QtWidgets import QApplication

from napari_convlora.config import TrainConfig
from napari_convlora.widget import ConvLoRAWidget


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        QApplication.processEvents()
        QApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)  # as the main loop does
        time.sleep(0.01)


viewer = napari.Viewer(show=False)
viewer.open_sample("napari-convlora", "nuclei")
dock, widget = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
until(lambda: widget.workflow.runner._worker is None)
if {training}:
    widget.settings.train = TrainConfig(views=2, detail_steps=5)
    widget.settings.max_steps.value = 100_000
    widget.adapt()
    until(lambda: widget.plot.losses)
child = psutil.Process(widget.workflow.runner._child.pid)
dock.destroyOnClose()
until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
until(lambda: not widget.running)
assert widget.workflow.has_adapter == {training}
dock, again = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
assert again is widget
until(lambda: widget.workflow.runner._child.alive)
until(lambda: not widget.workflow.runner._worker and not widget.running)
dock.destroyOnClose()
until(lambda: widget.workflow.resting)
viewer.close()
del dock, widget, again, viewer
until(lambda: not any(isinstance(w, ConvLoRAWidget) for w in QApplication.allWidgets()))
gc.collect()
left = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
assert not left, left
print("done")
"""


@pytest.mark.parametrize("training", [False, True])
def test_the_process_ends_with_the_dock_and_everything_with_the_viewer(
    tiny, monkeypatch, tmp_path, training
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(CLOSED_DOCK.format(training=training)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.endswith("done\n"), done.stderr
