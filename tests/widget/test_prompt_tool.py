"""SAM prompts through a real viewer: mouse, keys, undo."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils._proxies import ReadOnlyWrapper
from napari.utils.interactions import (
    mouse_move_callbacks,
    mouse_press_callbacks,
    mouse_release_callbacks,
)
from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QMouseEvent
from qtpy.QtWidgets import QApplication

from napari_convlora.prediction.prompter import Prompter
from napari_convlora.prediction.prompts import Box, Click, Prompt, Window
from napari_convlora.session.prompt_jobs import Question


@pytest.fixture
def tool(ready, qtbot, monkeypatch):
    """A widget with the tool taken up, and ways to click, drag and wait."""
    viewer, widget = ready()
    prompts = widget.prompts
    prompts.button.click()
    layer = viewer.layers["annotations"]
    layer.selected_label = 2

    def event(kind, at, **more):
        return SimpleNamespace(
            type=kind, position=at, pos=np.asarray(at)[::-1] * 10, camera_zoom=10.0,
            **{"button": 1, "modifiers": (), "is_dragging": kind == "mouse_move",
               "view_direction": None, "dims_displayed": [0, 1], "handled": False, **more},
        )  # fmt: skip

    def drag(*points, settle=True, mask=None, **more):
        found = found_by if mask is None else lambda *_: mask
        monkeypatch.setattr(Prompter, "mask", found)
        mouse_press_callbacks(layer, ReadOnlyWrapper(event("mouse_press", points[0], **more)))
        for at in points[1:]:
            mouse_move_callbacks(layer, event("mouse_move", at, **more))
        mouse_release_callbacks(layer, event("mouse_release", points[-1], **more))
        if settle:
            qtbot.waitUntil(lambda: not prompts.runner.busy, timeout=20_000)

    yield SimpleNamespace(viewer=viewer, widget=widget, prompts=prompts, layer=layer, drag=drag)
    assert prompts.runner.close(20)


def found_by(prompter, pixels, window, prompt):
    """Stand in for SAM: the bounds of the prompt, with a hole at every negative click."""
    mask, at = np.zeros(pixels.shape[:2], bool), prompt.bounds
    mask[round(at.top) : round(at.bottom) + 4, round(at.left) : round(at.right) + 4] = True
    for click in prompt.clicks:
        if not click.positive:
            mask[round(click.row), round(click.column)] = False
    return mask


def test_a_box_fills_the_current_class_as_one_undo_step(tool):
    before = tool.layer.data.copy()
    tool.drag((20, 30), (40, 40), (60, 55))
    changed = tool.layer.data != before
    assert changed.any(), tool.prompts.words.text()
    assert (tool.layer.data[changed] == 2).all()
    assert (tool.layer.data == 1).sum() == 150  # what another class had is left alone
    tool.layer.undo()
    assert (tool.layer.data == before).all()


def test_clicks_refine_one_object_and_undo_takes_it_whole(tool):
    before = tool.layer.data.copy()
    tool.drag((30, 40))
    first = tool.layer.data.copy()
    assert (first != before).any(), tool.prompts.words.text()
    tool.drag((60, 50))
    assert (tool.layer.data == 2).sum() > (first == 2).sum()
    assert tool.layer.data[34, 44] == 2
    tool.drag((34, 44), button=2)  # a right click takes away
    assert tool.layer.data[34, 44] == 0
    assert len(tool.prompts._object.prompt.clicks) == 3
    assert not tool.prompts._object.prompt.clicks[2].positive
    tool.layer.undo()
    assert (tool.layer.data == before).all()


def test_esc_restores_what_was_there(tool, press):
    before = tool.layer.data.copy()
    tool.drag((20, 30), (60, 55))
    assert (tool.layer.data != before).any()
    press(tool.viewer, "Escape")
    assert (tool.layer.data == before).all()
    press(tool.viewer, "Escape")  # nothing is left to cancel, and no older stroke is undone
    assert (tool.layer.data == before).all()


def test_enter_keeps_the_object_and_begins_another(tool, press):
    tool.drag((20, 30), (40, 45))
    one = tool.layer.data.copy()
    press(tool.viewer, "Enter")
    tool.drag((50, 30), (78, 60))
    assert (tool.layer.data != one).any()
    press(tool.viewer, "Escape")
    assert (tool.layer.data == one).all()


def test_esc_before_the_answer_keeps_it_from_coming(tool, press, qtbot):
    before = tool.layer.data.copy()
    tool.drag((20, 30), (60, 55), settle=False)
    press(tool.viewer, "Escape")
    qtbot.waitUntil(lambda: not tool.prompts.runner.busy)
    qtbot.wait(50)
    assert (tool.layer.data == before).all()


def test_clicks_that_come_while_sam_looks_are_all_answered(tool, qtbot):
    for at in ((30, 40), (50, 45), (60, 60)):
        tool.drag(at, settle=False)
    qtbot.waitUntil(lambda: not tool.prompts.runner.busy, timeout=20_000)
    _, prompt = tool.prompts.queue.asked
    assert len(prompt.clicks) == 3
    assert not tool.prompts.queue.waiting
    before = tool.layer.data.copy()
    tool.layer.undo()
    assert (tool.layer.data == 2).sum() == 150 < (before == 2).sum()  # one object, one item


def test_objects_that_are_made_while_sam_looks_are_all_painted(tool, qtbot):
    before = tool.layer.data.copy()
    tool.drag((12, 30), (20, 35), settle=False)
    tool.drag((30, 30), (40, 35), settle=False)
    tool.drag((50, 30), (60, 35), settle=False)
    tool.prompts.leave()
    qtbot.waitUntil(lambda: not tool.prompts.queue.waiting, timeout=20_000)
    assert (tool.layer.data[[15, 35, 55], 32] == 2).all(), tool.prompts.words.text()
    for _ in range(3):
        tool.layer.undo()
    assert (tool.layer.data == before).all()


def test_what_waits_is_not_asked_once_the_panel_rests(tool, qtbot):
    for at in ((20, 20), (50, 60)):
        tool.drag(at, settle=False)
    tool.prompts.rest()
    qtbot.waitUntil(lambda: not tool.prompts.runner.busy, timeout=20_000)
    qtbot.wait(50)
    assert not tool.prompts.runner.busy
    assert not tool.prompts.active
    assert (tool.layer.data[45:65, 55:65] == 0).all()


def test_a_stroke_is_not_taken_back_by_a_late_answer(tool, paint, qtbot):
    tool.drag((30, 40))
    tool.drag((50, 45), settle=False)
    paint(tool.layer, 1, 2)
    qtbot.waitUntil(lambda: not tool.prompts.runner.busy, timeout=20_000)
    assert (tool.layer.data[10:60, 2:5] == 1).all()
    assert tool.layer.data[31, 41] == 2


def test_a_widget_that_is_gone_leaves_nothing_on_the_layer(make_viewer, make_widget, halves, qtbot):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    widget.prompts.button.click()
    layer = viewer.layers["annotations"]
    n_callbacks = len(layer.mouse_drag_callbacks)
    widget.deleteLater()
    qtbot.waitUntil(lambda: layer.mouse_pan, timeout=5000)
    assert len(layer.mouse_drag_callbacks) == n_callbacks - 1
    assert "SAM prompt" not in viewer.layers


def test_what_the_user_undid_is_not_undone_again(tool, press):
    before = tool.layer.data.copy()
    tool.drag((20, 30), (60, 55))
    tool.layer.undo()
    press(tool.viewer, "Escape")
    assert (tool.layer.data == before).all()
    tool.drag((30, 40), button=2)
    assert "before what is not" in tool.prompts.words.text()


def test_a_stroke_painted_meanwhile_survives_esc(tool, press, paint):
    tool.drag((20, 30), (60, 55))
    paint(tool.layer, 1, 2)
    press(tool.viewer, "Escape")
    assert (tool.layer.data[10:60, 2:5] == 1).all()


@pytest.mark.parametrize("replace", [False, True])
def test_other_classes_are_painted_over_only_if_wanted(tool, replace):
    tool.layer.selected_label = 1
    tool.prompts.over.setChecked(replace)
    everything = np.ones(tool.layer.data.shape, bool)
    tool.drag((20, 30), (60, 55), mask=everything)
    assert (tool.layer.data == 2).any() != replace
    assert (tool.layer.data == 1).sum() == tool.layer.data.size - (0 if replace else 150)


def test_leaving_gives_the_layer_back_as_it_was(tool):
    layer = tool.layer
    assert not layer.mouse_pan
    layer.mode = "paint"
    assert not tool.prompts.button.isChecked()
    assert "SAM prompt" not in tool.viewer.layers
    before = layer.data.copy()
    layer.mode = "pan_zoom"
    tool.drag((20, 30), (60, 55))
    assert layer.mouse_pan
    assert (layer.data == before).all()


def test_outside_the_image_nothing_is_asked(tool):
    tool.drag((-20, 500))
    assert "outside the image" in tool.prompts.words.text()


def test_prompts_are_answered_while_a_round_runs(tool, wait):
    tool.widget.settings.max_steps.value = 100
    tool.widget.adapt()
    before = tool.layer.data.copy()
    tool.drag((20, 30), (60, 55))
    assert tool.widget.running
    assert (tool.layer.data != before).any()
    tool.widget.stop()
    wait(tool.widget)


def test_sam_itself_answers(ready, qtbot):
    _, widget = ready()
    prompts = widget.prompts
    prompts.button.click()
    for add in (
        lambda: prompts.add_box(0, Box(10, 30, 60, 60)),
        lambda: prompts.add_click(0, Click(30, 40)),
    ):
        add()
        qtbot.waitUntil(lambda: not prompts.runner.busy, timeout=20_000)
        assert prompts._object.window == Window(0, 0, 80, 90)
        assert "SAM looks" not in prompts.words.text()
    assert prompts.runner.session._backbone is widget.session._backbone  # loaded once
    assert prompts.runner.close(20)


def test_real_mouse_and_keys(window, ready, qtbot, monkeypatch):
    viewer, widget = ready()
    monkeypatch.setattr(Prompter, "mask", found_by)
    widget.prompts.button.click()
    layer = viewer.layers["annotations"]
    layer.selected_label = 2
    before, camera = layer.data.copy(), viewer.scene.camera
    canvas = viewer.__wrapped__.window._qt_viewer.canvas.native
    asked = []
    add_box = widget.prompts.add_box
    monkeypatch.setattr(widget.prompts, "add_box", lambda *a: asked.append(a) or add_box(*a))
    middle = canvas.rect().center()

    def drag():
        qtbot.mousePress(canvas, Qt.MouseButton.LeftButton, pos=middle)
        for step in (10, 20, 40):
            at = QPointF(middle + QPoint(step, step))
            move = QMouseEvent(
                QEvent.Type.MouseMove, at, at, Qt.MouseButton.NoButton,
                Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier,
            )  # fmt: skip
            QApplication.sendEvent(canvas, move)
        qtbot.mouseRelease(canvas, Qt.MouseButton.LeftButton, pos=middle + QPoint(40, 40))

    drag()
    qtbot.waitUntil(lambda: not widget.prompts.runner.busy, timeout=20_000)
    ((plane, box),) = asked
    assert plane == 0
    assert box.bottom - box.top == pytest.approx(40 / camera.zoom, rel=0.1)
    assert (layer.data != before).any()
    assert not camera.mouse_pan  # the view stays while a box is drawn
    qtbot.keyClick(canvas, Qt.Key.Key_Escape)
    assert (layer.data == before).all()
    qtbot.keyPress(canvas, Qt.Key.Key_Space)
    assert camera.mouse_pan
    drag()
    qtbot.keyRelease(canvas, Qt.Key.Key_Space)
    assert len(asked) == 1
    assert not camera.mouse_pan
    assert widget.prompts.runner.close(20)


def test_another_image_or_a_removed_layer_puts_the_tool_down(tool, halves, qtbot):
    tool.viewer.add_image(halves[:50], name="other")
    tool.viewer.layers.selection.active = tool.layer
    qtbot.wait(20)
    assert tool.prompts.active  # an image that comes is no reason
    tool.widget.source.image_combo.value = tool.viewer.layers["other"]
    qtbot.waitUntil(lambda: not tool.prompts.active)
    tool.widget.source.image_combo.value = tool.viewer.layers["halves"]
    tool.prompts.button.click()
    tool.drag((20, 30), (60, 55))
    tool.viewer.layers.remove(tool.layer)
    qtbot.waitUntil(lambda: not tool.prompts.active)
    assert "SAM prompt" not in tool.viewer.layers


@pytest.mark.parametrize("channel_axis", [None, 1])
def test_a_stack_is_filled_on_the_plane_that_is_clicked(
    make_viewer, make_widget, halves, qtbot, channel_axis, monkeypatch
):
    viewer = make_viewer()
    stack = np.stack([halves + 9 * i for i in range(6)])
    stack = stack if channel_axis is None else stack.reshape(3, 2, *halves.shape)
    viewer.add_image(stack, name="stack", scale=(3, *[0.5] * (stack.ndim - 1)))
    widget = make_widget(viewer)
    if channel_axis is not None:
        widget.source.channels_combo.value = channel_axis
    seen = []
    monkeypatch.setattr(Prompter, "mask", lambda p, x, *a: seen.append(x) or found_by(p, x, *a))
    widget.prompts.button.click()
    plane = 2 if channel_axis is not None else 4
    widget.prompts.add_box(plane, Box(10, 30, 20, 40))
    qtbot.waitUntil(lambda: not widget.prompts.runner.busy, timeout=20_000)
    painted = widget.images.current.painted()
    assert [p.any() for p in painted] == [p == plane for p in range(len(painted))]
    expected = stack[plane] if channel_axis is not None else stack[plane][None]
    np.testing.assert_array_equal(seen[0], np.moveaxis(expected, 0, -1))
    assert widget.prompts.runner.close(20)


@pytest.mark.parametrize(
    ("shape", "rgb", "channel_axis"),
    [
        ((30, 40), False, None),
        ((5, 30, 40), False, None),
        ((5, 30, 40, 4), True, None),
        ((5, 3, 30, 40), False, 1),
        ((3, 30, 40), False, 0),
    ],
)
def test_a_question_that_travels_takes_only_its_plane_along(shape, rgb, channel_axis):
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    plane = 3 if shape[0] == 5 else 0
    question = Question(pixels, rgb, channel_axis, plane, (30, 40), Prompt(box=Box(2, 3, 9, 9)))
    arrived = pickle.loads(pickle.dumps(question))
    window = Window(4, 5, 20, 30)
    assert (arrived.read(window) == question.read(window)).all()
    assert arrived.pixels.size <= 30 * 40 * 3


def test_a_click_in_a_view_without_the_plane_says_so(tool):
    before = tool.layer.data.copy()
    tool.viewer.dims.ndisplay = 3
    tool.drag((0, 30, 40), dims_displayed=[0, 1, 2])
    assert "Ctrl+Y" in tool.prompts.words.text()
    assert (tool.layer.data == before).all()
