"""Accepting, rejecting, where to look next, and before against after."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from napari.components import ViewerModel
from napari.layers import Image, Labels
from qtpy.QtCore import QPoint, Qt
from qtpy.QtWidgets import QApplication

from napari_convlora.images.regions import Block
from napari_convlora.labels.classes import default_classes
from napari_convlora.session import jobs
from napari_convlora.widget.layers import adoption, edits, showing
from napari_convlora.widget.layers.image_layers import ImageLayers


@pytest.fixture
def predicted(ready, wait):
    """Viewer and widget after a round, with a prediction of known classes.

    The left half is class 1 and the right half class 2, with an island of 1 in it.
    """

    def make(**train):
        viewer, widget = ready(**train)
        widget.adapt()
        wait(widget)
        labels = np.ones((1, 80, 90), np.uint8)
        labels[:, :, 45:] = 2
        labels[:, 30:40, 75:85] = 1
        showing.show(widget.images.current, labels)
        return viewer, widget

    return make


@pytest.fixture
def mouse(drag):
    """Press, drag along positions and release on the active layer of a viewer."""
    return lambda viewer, *positions: drag(viewer.layers.selection.active, *positions)


@pytest.fixture
def canvas(window):
    """Find the Qt widget on which napari draws."""
    name = "CanvasBackendDesktop"
    return lambda: next(w for w in QApplication.allWidgets() if type(w).__name__ == name)


@pytest.fixture
def keys(qtbot, canvas):
    """Press and release keys on the canvas."""
    return SimpleNamespace(
        press=lambda *key: qtbot.keyPress(canvas(), *key),
        release=lambda *key: qtbot.keyRelease(canvas(), *key),
        click=lambda *key: qtbot.keyClick(canvas(), *key),
    )


def state(viewer):
    return [viewer.layers[name].data.copy() for name in ("annotations", "prediction")]


@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("how", ["click", "rectangle", "lasso", "class", "confidence"])
def test_one_undo_takes_an_action_back_and_painted_pixels_stay(
    predicted, mouse, paint, qtbot, wait, how, accept
):
    viewer, widget = predicted()
    review = widget.review
    annotations, prediction = (viewer.layers[n] for n in ("annotations", "prediction"))
    paint(annotations, 2, 80, rows=(32, 35))  # on the island
    paint(prediction, 2, 76, rows=(32, 35))  # a correction
    if accept or how == "confidence":
        widget.images.current.collect_corrections()  # as accepting does, in an item of its own
    before = state(viewer)
    painted = (before[0] > 0) | np.isin(np.arange(90), [76, 77, 78]) & (
        (np.arange(80) >= 32) & (np.arange(80) < 35)
    ).reshape(-1, 1)
    if how == "class":
        widget.table.select(1)
        review.by_class[accept].click()
        expected = before[1] == 1
    elif how == "confidence":
        uncertainty = np.full((1, 80, 90), 90, np.uint8)
        uncertainty[:, :20] = 10
        widget.images.current.extra.show_uncertainty(uncertainty)
        review.confidence.setValue(60)
        review.by_confidence[accept].click()
        expected = (uncertainty[0] == 10) == accept
    else:
        button = review.tools[how, accept]
        button.click()
        assert button.isChecked()
        island = np.zeros((80, 90), bool)
        island[30:40, 75:85] = True
        expected = island & (before[1] == 1) if how == "click" else island
        if how == "click":
            mouse(viewer, (31, 84))
        elif how == "rectangle":
            mouse(viewer, (29.5, 74.5), (35, 80), (39.5, 84.5))
        else:
            corners = (29.5, 74.5), (29.5, 84.5), (39.5, 84.5), (39.5, 74.5), (30, 74.5)
            mouse(viewer, *corners)
        qtbot.waitUntil(lambda: "are " in widget.status)
        button.click()
        assert "review region" not in viewer.layers
        viewer.layers.selection.active = annotations if accept else prediction
    after = state(viewer)
    if accept:
        assert (after[1] == before[1]).all()
        changed = after[0] != before[0]
        assert (changed == expected & (before[0] == 0)).all()
        assert (after[0][changed] == before[1][changed]).all()
    else:
        assert (after[0] == before[0]).all()
        assert ((after[1] == 0) == expected & ~painted).all()
    layer = viewer.layers.selection.active
    layer.undo()
    for old, new in zip(before, state(viewer), strict=True):
        assert (old == new).all()
    layer.redo()
    for old, new in zip(after, state(viewer), strict=True):
        assert (old == new).all()
    # A cleared pixel is no correction, and Adapt keeps those that are.
    waiting = 0 if accept or how == "confidence" else 9
    assert widget.images.current.collect_corrections() == waiting


# Without shrinking, as an example is small and takes a third of a second.
@settings(deadline=None, max_examples=40, phases=[Phase.reuse, Phase.generate])
@given(
    data=st.data(),
    shape=st.sampled_from([(7, 9), (3, 5, 6), (2, 2, 4, 5), (1, 6, 4)]),
    dtype=st.sampled_from([np.uint8, np.int32, np.int64]),
)
def test_accept_and_reject_on_layers_of_any_content(data, shape, dtype):
    viewer = ViewerModel()
    image = viewer.add_layer(Image(np.zeros(shape), rgb=False))
    record = ImageLayers(viewer, image, default_classes(3))
    ids = st.integers(0, 3)
    own = data.draw(hnp.arrays(dtype, shape, elements=ids))
    annotations = viewer.add_layer(Labels(own, name="mine"))
    adoption.adopt(record, annotations)
    planes = record.planes_shape
    showing.show(record, data.draw(hnp.arrays(np.uint8, planes, elements=ids)))
    corrections = data.draw(hnp.arrays(bool, shape))
    value = data.draw(st.integers(1, 3))
    record.prediction.data_setitem(np.nonzero(corrections), value)
    before = own.copy(), record.prediction.data.copy()
    painted = edits.labelled(record).reshape(shape)
    first = data.draw(st.integers(0, planes[0] - 1))
    mask = data.draw(hnp.arrays(bool, (planes[0] - first, *planes[1:])))
    asked = np.zeros(planes, bool)
    asked[first:] = mask
    asked = asked.reshape(shape)
    accept = data.draw(st.booleans())
    count = (edits.accept if accept else edits.reject)(record, mask, first)
    layer = annotations if accept else record.prediction
    old, now = before[0 if accept else 1], layer.data
    assert count == (now != old).sum()
    if accept:
        assert (now == np.where(asked & (old == 0), before[1], old)).all()
    else:
        assert (now == np.where(asked & ~painted, 0, old)).all()
    if count:
        layer.undo()
    assert (annotations.data == before[0]).all()
    assert (record.prediction.data == before[1]).all()
    assert annotations.data.dtype == dtype


def test_a_drag_in_click_mode_accepts_nothing_and_escape_leaves(predicted, mouse, keys):
    viewer, widget = predicted()
    button = widget.review.tools["click", True]
    before = state(viewer)
    button.click()
    mouse(viewer, (31, 80), (40, 80), (50, 60))
    for old, new in zip(before, state(viewer), strict=True):
        assert (old == new).all()
    tool = viewer.layers.selection.active
    keys.click(Qt.Key.Key_Escape)
    assert tool not in viewer.layers
    assert not button.isChecked()


def test_clicking_goes_on_until_another_layer_is_chosen(predicted, mouse, keys, qtbot):
    viewer, widget = predicted()
    widget.review.tools["click", False].click()
    mouse(viewer, (31, 80))
    mouse(viewer, (5, 60))
    assert (viewer.layers["prediction"].data == 0).sum() > 2000
    keys.click(Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier)  # the second click alone
    assert (viewer.layers["prediction"].data == 0).sum() == 100
    viewer.layers.selection.active = viewer.layers["annotations"]
    qtbot.waitUntil(lambda: "review region" not in viewer.layers)
    assert viewer.layers.selection.active == viewer.layers["annotations"]
    assert not any(button.isChecked() for button in widget.review.tools.values())


@pytest.mark.xdist_group("shown")
def test_a_click_of_the_real_mouse(make_viewer, make_widget, halves, canvas, qtbot):
    viewer = make_viewer(show=True)
    viewer.add_image(halves, name="halves", scale=(2, 2))
    widget = make_widget(viewer)
    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 20:30, 60:80] = 2
    showing.show(widget.images.current, labels)
    widget.review.refresh()
    qtbot.wait(200)
    widget.review.tools["click", True].click()
    surface, camera = canvas(), viewer.scene.camera
    size = np.array([surface.height(), surface.width()])
    y, x = size / 2 + (np.multiply((25, 70), 2) - camera.center[-2:]) * camera.zoom
    at = QPoint(round(x), round(y))
    qtbot.mouseMove(surface, at)
    qtbot.mouseClick(surface, Qt.MouseButton.LeftButton, pos=at)
    qtbot.waitUntil(lambda: "annotations" in viewer.layers)
    assert (viewer.layers["annotations"].data == np.where(labels[0] == 2, 2, 0)).all()


def test_planes_are_reviewed_one_by_one_or_all_at_once(window, make_widget, halves, mouse, qtbot):
    viewer = window()
    viewer.add_image(np.stack([halves] * 3), name="stack", scale=(4, 0.5, 0.5))
    widget = make_widget(viewer)
    widget.table.select(2)
    labels = np.ones((3, 80, 90), np.uint8)
    labels[:2, 10:30, 10:30] = 2
    showing.show(widget.images.current, labels)
    widget.review.refresh()
    viewer.dims.set_current_step(0, 1)
    review = widget.review
    review.by_class[True].click()
    painted = viewer.layers["annotations"].data
    assert [(plane == 2).sum() for plane in painted] == [0, 400, 0]
    qtbot.waitUntil(lambda: widget.images.counts.pixels == {2: 400})  # they count as painted
    review.tools["click", True].click()
    review.all_planes.setChecked(True)
    mouse(viewer, (4, 20 * 0.5, 20 * 0.5))
    assert [(plane > 0).sum() for plane in painted] == [400, 400, 0]
    review.tools["rectangle", False].click()
    mouse(viewer, (4, 40 * 0.5, 40 * 0.5), (4, 22, 22), (4, 49 * 0.5, 49 * 0.5))
    prediction = viewer.layers["prediction"].data
    qtbot.waitUntil(lambda: not prediction.all())
    assert [(plane == 0).sum() for plane in prediction] == [100, 100, 100]


@pytest.mark.parametrize("kind", ["channels", "rgb", "pyramid", "time"])
def test_other_kinds_of_images(make_viewer, make_widget, halves, mouse, qtbot, kind):
    viewer = make_viewer()
    if kind == "time":
        viewer.add_image(np.zeros((2, 3, 4, 5)), name="four axes", scale=(1, 1, 20, 20))
    data = {
        "channels": np.stack([np.stack([halves] * 5)] * 2),
        "rgb": np.stack([halves.clip(0, 255).astype(np.uint8)] * 3, -1),
        "pyramid": [halves, halves[::2, ::2]],
        "time": np.stack([halves] * 2),
    }[kind]
    image = viewer.add_image(data, name="image", rgb=kind == "rgb", multiscale=kind == "pyramid")
    widget = make_widget(viewer)
    widget.source.image_combo.value = image
    planes = 2 if kind in ("channels", "time") else 1
    if kind == "channels":
        widget.source.channels_combo.value = 1
    record = widget.images.current
    labels = np.ones((planes, 80, 90), np.uint8)
    labels[-1, 10:30, 60:80] = 2
    showing.show(record, labels)
    uncertainty = np.zeros(labels.shape, np.uint8)
    uncertainty[-1, 50:60, 20:30] = 90
    record.extra.show_uncertainty(uncertainty)
    widget.review.refresh()
    widget.review.next_place()
    assert widget.status.startswith("Place 1:")
    assert record.plane() == planes - 1
    row, column = viewer.scene.camera.center[-2:]
    assert 50 <= row < 60
    assert 20 <= column < 30
    shown = viewer.layers["uncertainty"]
    shown.visible = True
    assert shown.get_value((*viewer.dims.point[:-2], row, column), world=True) == 90
    widget.review.tools["click", True].click()
    mouse(viewer, (*viewer.dims.point[:-2], 20, 70))
    painted = record.painted()
    assert (painted == np.where(labels == 2, 2, 0)).all()


def test_a_key_in_the_3d_view_takes_nothing(predicted, press):
    viewer, widget = predicted()
    painted = widget.images.current.painted().copy()
    viewer.dims.ndisplay = 3
    viewer.cursor.position = (0, 20, 20)
    press(viewer, "A")
    assert "3-D" in widget.status
    np.testing.assert_array_equal(widget.images.current.painted(), painted)


def test_next_finds_the_uncertainty_and_tours_the_planes(
    make_viewer, make_widget, halves, paint, wait, keys, qtbot
):
    viewer = make_viewer()
    stack = np.stack([halves, halves[:, ::-1], halves])
    viewer.add_image(stack, name="stack", scale=(5, 0.5, 0.5), translate=(1, 2, 3))
    viewer.add_image(halves, name="other")
    widget = make_widget(viewer)
    widget.source.image_combo.value = viewer.layers["stack"]
    layer = widget.start_annotating()
    paint(layer, 1, 10, plane=(0,))
    paint(layer, 2, 70, plane=(0,))
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    assert "uncertainty" not in viewer.layers  # nobody has asked for it
    viewer.layers["prediction"].data[1, :5] = 0
    viewer.layers.selection.active = layer
    before = viewer.layers["prediction"].data.copy()
    keys.click(Qt.Key.Key_N)
    qtbot.waitUntil(lambda: widget.status.startswith("Place 1:"), timeout=20_000)
    shown = viewer.layers["uncertainty"]
    assert not shown.visible
    assert shown.data.shape == stack.shape
    assert shown.data.max() <= 100
    assert (viewer.layers["prediction"].data == before).all()  # what was rejected stays so
    assert viewer.layers.selection.active == layer
    assert widget.source.image == viewer.layers["stack"]
    assert shown not in widget.source.image_combo.choices
    seen, painted = [], layer.data
    while widget.status.startswith("Place"):
        place = widget.images.current.extra.guide.visited[-1]
        assert widget.images.current.plane() == place.plane
        assert f"plane {place.plane + 1} of 3, row {place.row}" in widget.status
        assert painted[place.plane, place.row, place.column] == 0
        centre = viewer.scene.camera.center[-2:]
        assert centre == pytest.approx((2 + place.row / 2, 3 + place.column / 2))
        seen.append(place)
        keys.click(Qt.Key.Key_N)
    assert len(set(seen)) == len(seen) > 5
    assert {place.plane for place in seen[:4]} == {0, 1, 2}
    assert "'other'" in widget.status
    keys.click(Qt.Key.Key_N)
    assert widget.status.startswith("Place 1:")  # once more from the start
    widget.adapt()  # and now with every round
    wait(widget)
    assert widget.images.current.extra.uncertainty is not None


def test_what_a_stopped_job_has_not_scored_is_not_accepted(predicted, wait, monkeypatch, qtbot):
    viewer, widget = predicted()
    record, predict_blocks = widget.images.current, widget.session.predict_blocks

    def first_until_stopped(image, blocks, control, **more):
        yield from predict_blocks(image, blocks[:1], control, **more)
        while not control.stopping:
            time.sleep(0.01)

    quarters = [Block(0, top, left, 40, 45) for top in (0, 40) for left in (0, 45)]
    monkeypatch.setattr(jobs, "plan_blocks", lambda *_: quarters)
    before = state(viewer)[0]
    with monkeypatch.context() as slow:
        slow.setattr(widget.session, "predict_blocks", first_until_stopped)
        widget.review.by_confidence[True].click()
        qtbot.waitUntil(lambda: record.extra.uncertainty is not None, timeout=20_000)
        widget.stop()
        wait(widget)
    assert (state(viewer)[0] == before).all()
    widget.review.by_confidence[True].click()  # scores all of it first
    assert widget.running
    wait(widget)
    assert record.extra.scored


def test_what_is_reviewed_is_neither_visited_nor_rejected(make_viewer, make_widget, halves):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves] * 2), name="stack")
    widget = make_widget(viewer)
    record, review = widget.images.current, widget.review
    showing.show(record, np.ones((2, 80, 90), np.uint8))
    record.extra.show_uncertainty(np.full((2, 80, 90), 50, np.uint8))
    review.refresh()
    viewer.dims.set_current_step(0, 1)
    widget.reviewed.complete_plane()
    review.next_place()
    while widget.status.startswith("Place"):
        assert "plane 1 of 2" in widget.status
        review.next_place()
    assert widget.status.startswith("Nothing else in 'stack' is uncertain.")
    viewer.dims.set_current_step(0, 1)
    widget.table.select(1)
    review.by_class[False].click()
    assert (viewer.layers["prediction"].data == 1).all()  # as it is exported
    assert "reviewed already" in widget.status
    viewer.dims.set_current_step(0, 0)
    widget.reviewed.complete_plane()
    review.next_place()
    assert widget.status.startswith("All of 'stack' is painted or reviewed.")
    assert "again" not in widget.status


def test_next_goes_on_through_the_images_of_the_project(started, paint, wait, saved, keys, qtbot):
    viewer, widget = started()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    widget.keeper.step(1)
    widget.predict()
    wait(widget)
    widget.keeper.step(-1)
    layer = widget.start_annotating()

    def skip_places():
        widget.images.current.extra.show_uncertainty(np.zeros((1, 80, 90), np.uint8))
        keys.click(Qt.Key.Key_N)

    skip_places()
    assert widget.status.endswith(
        "Press N again to open 'picture1', the next image of the project."
    )
    paint(layer, 2, 30)
    keys.click(Qt.Key.Key_N)
    assert "picture1" in viewer.layers
    qtbot.waitUntil(lambda: widget.status.startswith("Place 1:"), timeout=20_000)
    skip_places()
    keys.click(Qt.Key.Key_N)
    assert widget.status.startswith("'picture2' is open. Press N to predict it")
    keys.click(Qt.Key.Key_N)
    qtbot.waitUntil(lambda: widget.status.startswith("Place 1:"), timeout=20_000)
    assert viewer.layers["prediction"].data.any()
    skip_places()  # it is the last one
    assert "open" not in widget.status
    keys.click(Qt.Key.Key_N)
    assert "picture2" in viewer.layers
    saved(widget)
    assert widget.keeper.entries[0].counts == {1: 150, 2: 300}


def test_the_previous_round_is_shown_while_its_key_is_held(predicted, wait, keys):
    viewer, widget = predicted()
    prediction = viewer.layers["prediction"]
    before = prediction.data.copy()
    button = widget.review.compare_button
    assert not button.isEnabled()  # the first round has nothing before it
    widget.adapt()
    wait(widget)
    assert button.isEnabled()
    after = prediction.data.copy()
    previous = viewer.layers["previous prediction"]
    assert (previous.data == before).all()
    assert not previous.visible
    keys.press(Qt.Key.Key_H)
    assert (previous.visible, prediction.visible) == (True, False)
    assert not previous.editable
    keys.release(Qt.Key.Key_H)
    assert (previous.visible, prediction.visible) == (False, True)
    button.click()
    assert previous.visible
    button.click()
    assert prediction.visible
    assert (prediction.data == after).all()
    assert widget.images.current.collect_corrections() == 0
    widget.adapt()
    wait(widget)
    assert (previous.data == after).all()
    button.click()
    viewer.layers.remove(previous)  # while it is shown in place of the prediction
    assert not button.isEnabled()
    assert prediction.visible
    keys.press(Qt.Key.Key_H)
    assert prediction.visible
    keys.release(Qt.Key.Key_H)


def test_keys_are_free_again_when_the_widget_closes(window, predicted, qtbot):
    viewer, widget = predicted()
    assert {"N", "H"} <= {str(key) for key in viewer.keymap}
    widget.review.tools["lasso", True].click()
    assert "review region" in viewer.layers
    viewer.window.remove_dock_widget(widget)
    widget.deleteLater()
    qtbot.waitUntil(lambda: not {"N", "H"} & {str(key) for key in viewer.keymap})
    assert "review region" not in viewer.layers
