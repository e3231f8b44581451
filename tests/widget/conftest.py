from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

# Rounds import these. Napari looks for garbage whenever a layer goes, but not in what was imported
# before the first test.
import sklearn.ensemble  # noqa: F401
import tifffile
import torch._dynamo  # noqa: F401
from napari.components import ViewerModel
from napari.utils._proxies import PublicOnlyProxy
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QTimer
from qtpy.QtWidgets import QApplication

_NO_DISPLAY = sys.platform.startswith("linux") and not (
    os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
)


def pytest_collection_modifyitems(items):
    if _NO_DISPLAY:
        reason = "no display: run under xvfb-run, as `make test` does"
        for item in items:
            if "tests/widget" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def recovery_folder(tmp_path_factory, monkeypatch):
    """Unsaved work of a test goes where no other test, and no user, will find it."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(folder))
    return folder / "recovery"


@pytest.fixture(autouse=True)
def no_dialog_waits_for_ever(qapp):
    """A question that a test does not answer fails it; pytest's own limit is not heard in Qt."""
    asked = []

    def close() -> None:
        dialog = QApplication.activeModalWidget()
        if dialog is not None:
            asked.append(dialog.windowTitle())
            dialog.close()

    timer = QTimer()
    timer.timeout.connect(close)
    timer.start(30_000)
    yield
    timer.stop()
    assert not asked


@pytest.fixture
def halves() -> np.ndarray:
    """Grey image whose left half is dark and right half bright."""
    rng = np.random.default_rng(0)
    image = rng.normal(50, 5, (80, 90))
    image[:, 45:] += 100
    return image.astype(np.float32)


@pytest.fixture
def window(make_napari_viewer_proxy) -> Callable:
    """Make viewers in napari's real window, with Qt's canvas, keys and docks.

    A test that asks for it gets them from `make_viewer`, `ready` and `started` too.
    """
    return make_napari_viewer_proxy


@pytest.fixture
def make_viewer(request, monkeypatch) -> Callable:
    """Make viewers, without a window unless the test asks for `window`, which takes a second."""
    if "window" in request.fixturenames:
        return request.getfixturevalue("window")
    monkeypatch.setenv("NAPARI_ENSURE_PLUGIN_MAIN_THREAD", "True")  # as that one does
    return lambda **kwargs: PublicOnlyProxy(ViewerModel(**kwargs))


def _dock(viewer, widget) -> None:
    """Do to a widget what napari's window does that docks it, if there is one."""
    if hasattr(viewer, "window"):
        viewer.window.add_dock_widget(widget, name="Conv-LoRA")
        return
    events = viewer.layers.events
    for event in (events.inserted, events.removed, events.reordered, events.renamed):
        event.connect(widget.reset_choices)


@pytest.fixture
def make_session():
    """Sessions on a backbone of random weights, all the same."""
    from napari_convlora.backbones.testing import random_backbone
    from napari_convlora.session.session import Session

    return lambda: Session(_backbone=("litemedsam", random_backbone()))


@pytest.fixture
def make_widget(make_session) -> Callable:
    """Dock a widget whose rounds take a second."""
    from napari_convlora.config import TrainConfig
    from napari_convlora.widget import ConvLoRAWidget

    widgets = []

    def make(viewer, **train):
        widget = ConvLoRAWidget(viewer, train.get("session") or make_session())
        _dock(viewer, widget)
        widget.settings.train = TrainConfig(views=2, detail_steps=5, score_every=2)
        widget.settings.max_steps.value = train.get("max_steps", 3)
        widget.settings.preview_seconds.value = train.get("preview_seconds", 0)
        widget.settings.device.value = "cpu"
        widgets.append(widget)
        return widget

    yield make
    for widget in widgets:
        widget.keeper.close()
        assert widget.workflow.runner.close(20)
        if isalive(widget) and widget.parent() is None:  # no window takes it along
            widget.deleteLater()
            QApplication.sendPostedEvents(widget, QEvent.Type.DeferredDelete)


@pytest.fixture
def paint() -> Callable:
    """Paint a vertical stroke of a class, as one item of the undo history."""

    def stroke(layer, class_id, column, rows=(10, 60), width=3, plane=()):
        at = np.mgrid[rows[0] : rows[1], column : column + width].reshape(2, -1)
        planes = [np.full(at.shape[1], p) for p in plane]
        layer.data_setitem((*planes, *at), class_id)

    return stroke


@pytest.fixture
def drag() -> Callable:
    """Press the mouse at the first of some positions, move along, and release it unless held."""
    from napari.utils.interactions import (
        mouse_move_callbacks,
        mouse_press_callbacks,
        mouse_release_callbacks,
    )

    def move(layer, *positions, hold=False, displayed=(0, 1), point=(0, 0)) -> Callable:
        event = SimpleNamespace(
            is_dragging=True,
            view_direction=None,
            dims_displayed=list(displayed),
            dims_point=list(point),
            button=1,
            modifiers=[],
            handled=False,
        )
        callbacks = mouse_press_callbacks
        for event.position in positions:
            event.type = callbacks.__name__.removesuffix("_callbacks")
            on_screen = np.array(event.position, float)[list(displayed)]
            event.pos = on_screen * 20  # far apart on the screen
            callbacks(layer, event)
            callbacks = mouse_move_callbacks

        def release() -> None:
            event.type = "mouse_release"
            mouse_release_callbacks(layer, event)

        if not hold:
            release()
        return release

    return move


@pytest.fixture
def press(window) -> Callable:
    """Press a key on the canvas; keys of the active layer come first, as for a user."""

    def key(viewer, name):
        viewer.__wrapped__.window._qt_viewer._key_map_handler.press_key(name)

    return key


@pytest.fixture
def wait(qtbot) -> Callable:
    """Wait until the widget's thread has nothing to do."""

    def until_idle(widget, timeout=120_000):
        qtbot.waitUntil(lambda: not widget.running, timeout=timeout)

    return until_idle


@pytest.fixture
def ready(make_viewer, make_widget, halves, paint, qtbot):
    """Viewer and widget with an image and a stroke in each of its halves."""

    def make(**train):
        viewer = make_viewer()
        viewer.add_image(halves, name="halves")
        widget = make_widget(viewer, **train)
        layer = widget.start_annotating()
        paint(layer, 1, 10)
        paint(layer, 2, 70)
        qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
        return viewer, widget

    return make


@pytest.fixture
def pictures(tmp_path, halves):
    """Three image files that differ."""
    paths = [tmp_path / f"picture{i}.tif" for i in range(3)]
    for i, path in enumerate(paths):
        tifffile.imwrite(path, np.roll(halves, 10 * i, 0) + i)
    return paths


@pytest.fixture
def saved(qtbot):
    """Wait until everything painted is on disk."""

    def wait(widget):
        widget.keeper.save()
        widget.keeper.writer.flush()
        qtbot.wait(20)

    return wait


@pytest.fixture
def started(make_viewer, make_widget, pictures, saved, tmp_path):
    """A window with a project of three images, the first of them open."""

    def make():
        viewer = make_viewer()
        widget = make_widget(viewer)
        widget.keeper.create(tmp_path / "p")
        widget.keeper.add_files(pictures)
        saved(widget)
        widget.keeper.step(1)
        return viewer, widget

    return make
