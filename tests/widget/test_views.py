"""Rolled, transposed and 3-D views: what works there does so, what does not says so."""

from __future__ import annotations

import numpy as np
import pytest

from napari_convlora.labels.reviewed import inside_outlines
from napari_convlora.widget.layers import showing


@pytest.fixture
def stack(make_viewer, make_widget, halves, paint):
    """A stack of five planes, strokes on the first, and a prediction of two halves."""

    def make(**train):
        viewer = make_viewer()
        image = np.stack([halves] * 5)
        viewer.add_image(image, name="stack", scale=(2, 0.5, 0.5), translate=(1, 2, 3))
        widget = make_widget(viewer, **train)
        layer = widget.start_annotating()
        paint(layer, 1, 10, plane=(0,))
        paint(layer, 2, 70, plane=(0,))
        labels = np.ones(image.shape, np.uint8)
        labels[..., 45:] = 2
        showing.show(widget.images.current, labels)
        viewer.dims.set_point(0, 5)  # plane 2
        widget.review.refresh()
        return viewer, widget

    return make


@pytest.fixture
def turn():
    """Show something else than planes."""

    def to(viewer, view):
        if view == "3-D":
            viewer.dims.ndisplay = 3
        else:
            viewer.dims.roll()
            viewer.dims.set_point(2, 3 + 0.5 * 30)

    return to


def marked(record):
    return inside_outlines(record.planes_shape, record.outlines())


def everything(record):
    return record.painted().copy(), record.predicted_view().copy(), marked(record)


@pytest.mark.parametrize(("view", "key"), [("3-D", "Ctrl+Y"), ("rolled", "Ctrl+E")])
def test_what_marks_planes_refuses_where_none_is_shown(stack, turn, press, view, key):
    viewer, widget = stack()
    record, review = widget.images.current, widget.review
    record.extra.show_uncertainty(np.full(record.planes_shape, 90, np.uint8))
    before = everything(record)
    turn(viewer, view)
    viewer.cursor.position = record.image.data_to_world((2, 30, 60))
    widget.table.select(2)
    actions = {
        "plane": widget.reviewed.whole.click,
        "draw": widget.reviewed.rectangle.click,
        "polygon": widget.reviewed.polygon.click,
        "A": lambda: press(viewer, "A"),
        "R": lambda: press(viewer, "R"),
        "class": review.by_class[True].click,
        "confidence": review.by_confidence[False].click,
    } | {tool: button.click for tool, button in review.tools.items()}
    for name, act in actions.items():
        widget.workflow.said.emit("Go on.")
        act()
        assert key in widget.status, name
        assert "one plane of 'stack'" in widget.status, name
    assert not any(button.isChecked() for button in review.tools.values())
    assert [layer.name for layer in viewer.layers if "re" in layer.name] == ["prediction"]
    widget.prompts.button.click()
    assert key in widget.prompts.words.text()
    assert not widget.prompts.active
    after = everything(record)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_remedies_lead_back(stack, turn):
    viewer, widget = stack()
    turn(viewer, "rolled")
    turn(viewer, "3-D")
    presses = 0
    while presses < 9:
        widget.workflow.said.emit("Go on.")
        widget.reviewed.whole.click()
        if "Ctrl+Y" in widget.status:
            viewer.dims.ndisplay = 2
        elif "Ctrl+E" in widget.status:
            viewer.dims.roll()
        else:
            break
        presses += 1
    assert presses == 3
    assert marked(widget.images.current).sum(axis=(1, 2)).tolist() == [0, 0, 80 * 90, 0, 0]


def test_classes_of_all_planes_are_accepted_in_any_view(stack, turn):
    viewer, widget = stack()
    turn(viewer, "rolled")
    widget.table.select(2)
    widget.review.all_planes.setChecked(True)
    widget.review.by_class[True].click()
    assert (widget.images.current.painted()[1:, :, 45:] == 2).all()


@pytest.mark.parametrize("view", ["3-D", "rolled"])
def test_a_tool_in_use_ends_with_the_view(stack, turn, view):
    viewer, widget = stack()
    button = widget.review.tools["rectangle", False]
    button.click()
    assert button.isChecked()
    turn(viewer, view)
    assert not button.isChecked()
    assert "one plane of 'stack'" in widget.status
    assert "review region" not in viewer.layers


def test_a_region_that_is_drawn_in_a_rolled_view_is_taken_away(stack, turn, drag, qtbot):
    viewer, widget = stack()
    record = widget.images.current
    widget.reviewed.draw("add_rectangle")
    area = np.array([[10, 10], [10, 30], [20, 30], [20, 10]])
    record.reviewed.add_rectangles(record.axes.place(2, area))
    kept = marked(record)
    assert kept.any()
    turn(viewer, "rolled")
    corners = [record.image.data_to_world(at) for at in ((0, 5, 30), (2, 30, 30), (4, 50, 30))]
    drag(record.reviewed, *corners, displayed=[0, 1], point=viewer.dims.point)
    qtbot.waitUntil(lambda: "Ctrl+E" in widget.status)
    assert len(record.reviewed.data) == 1
    assert np.array_equal(marked(record), kept)
    record.reviewed.add_polygons(np.array([[0, 3, 5], [4, 3, 5], [4, 3, 50]]))
    assert np.array_equal(marked(record), kept)  # also before it is gone
    qtbot.waitUntil(lambda: len(record.reviewed.data) == 1)


def test_tools_mark_what_they_surround_in_a_transposed_view(stack, drag, qtbot):
    viewer, widget = stack()
    record = widget.images.current
    viewer.dims.transpose()
    corners = [record.image.data_to_world(at) for at in ((2, 10, 50), (2, 20, 70), (2, 29, 80))]
    wanted = np.zeros(record.planes_shape, bool)
    wanted[2, 10:30, 50:81] = True
    widget.reviewed.draw("add_rectangle")
    drag(record.reviewed, *corners, displayed=[2, 1], point=viewer.dims.point)
    assert np.array_equal(marked(record), wanted)
    record.reviewed.data = []
    widget.review.tools["rectangle", False].click()
    layer = viewer.layers.selection.active
    assert layer.name == "review region"
    drag(layer, *corners, displayed=[2, 1], point=viewer.dims.point)
    qtbot.waitUntil(lambda: "cleared" in widget.status)
    assert np.array_equal(record.predicted_view() == 0, wanted)


@pytest.mark.parametrize("view", ["3-D", "rolled"])
def test_next_shows_its_place_in_any_view(stack, turn, view):
    viewer, widget = stack()
    record = widget.images.current
    uncertainty = np.zeros(record.planes_shape, np.uint8)
    uncertainty[3, 50:60, 20:30] = 90
    record.extra.show_uncertainty(uncertainty)
    turn(viewer, view)
    widget.review.next_place()
    assert widget.status.startswith("Place 1: plane 4 of 5")
    at = np.array(viewer.dims.point)
    at[list(viewer.dims.displayed)] = viewer.scene.camera.center[-viewer.dims.ndisplay :]
    pixel = np.round(record.image.world_to_data(at)).astype(int)
    assert uncertainty[tuple(pixel)] == 90


def test_previews_in_a_rolled_view_reach_more_than_one_plane(stack, turn, wait, monkeypatch):
    viewer, widget = stack(preview_seconds=0.01, max_steps=12)
    turn(viewer, "rolled")
    shown = []
    show = showing.show

    def watched(record, labels, plane=None):
        shown.append(plane)
        return show(record, labels, plane)

    monkeypatch.setattr(showing, "show", watched)
    widget.adapt()
    wait(widget)
    assert set(shown) - {None} == {0, 1, 2, 3, 4}
