"""Reviewed regions: made, shown, counted, learnt from, undone."""

from __future__ import annotations

import numpy as np
import pytest

from napari_convlora.config import ClassInfo
from napari_convlora.labels.reviewed import inside_outlines
from napari_convlora.widget.layers import copies


@pytest.fixture
def one_class(make_viewer, make_widget, halves, paint, qtbot):
    """A viewer and a widget with strokes of class 2 alone."""
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    paint(widget.start_annotating(), 2, 70)
    qtbot.waitUntil(lambda: widget.images.counts.pixels == {2: 150})
    return viewer, widget


def test_a_complete_plane_makes_the_rest_background(one_class, wait, qtbot):
    viewer, widget = one_class
    widget.reviewed.whole.click()
    assert viewer.layers.selection.active == viewer.layers["annotations"]
    title = widget._parts.reviewed_title.text
    qtbot.waitUntil(lambda: title().startswith("1 reviewed region, 7,050 px as background"))
    assert widget.status == "Press Adapt to learn from 7,200 annotated pixels."
    widget.adapt()
    wait(widget)
    learnt = widget.session.rounds[0].adapter.summary["labelled_pixels"]
    assert learnt == {"1": 7050, "2": 150}
    assert (viewer.layers["annotations"].data == 1).sum() == 0  # what is painted is the user's
    viewer.layers["reviewed"].data = []
    qtbot.waitUntil(lambda: title().startswith("Reviewed regions"))


def test_where_annotation_is_complete_the_prediction_agrees_with_it(ready, wait):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    record = widget.images.current
    assert (record.predicted_labels() == 2).sum() > 150
    widget.reviewed.complete_plane()
    assert (record.predicted_labels() == 2).sum() == 150  # that is what is exported
    widget.predict()
    wait(widget)
    assert (viewer.layers["prediction"].data == 2).sum() == 150
    assert record.collect_corrections() == 0


def test_a_plane_is_completed_once(one_class):
    viewer, widget = one_class
    widget.reviewed.complete_plane()
    widget.reviewed.complete_plane()
    assert len(viewer.layers["reviewed"].data) == 1
    assert "already" in widget.status


def test_without_a_background_class_the_remedy_is_named(one_class, wait, qtbot):
    _, widget = one_class
    widget.table.rename(1, "air")
    widget.reviewed.complete_plane()
    qtbot.waitUntil(lambda: "mark a background class" in widget._parts.reviewed_title.text())
    widget.adapt()
    wait(widget)
    assert "mark one in the class table" in widget.status
    widget.table.mark_background(1)
    qtbot.waitUntil(lambda: "7,050 px" in widget._parts.reviewed_title.text())
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")


def test_regions_of_a_stack_lie_on_their_plane(make_viewer, make_widget, halves, paint):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves] * 3), name="stack", scale=(2, 0.5, 0.5), translate=(5, 0, 9))
    widget = make_widget(viewer)
    paint(widget.start_annotating(), 2, 70, plane=(1,))
    viewer.dims.set_current_step(0, 2)
    widget.reviewed.complete_plane()
    record = widget.images.current
    inside = inside_outlines(record.planes_shape, record.outlines())
    assert inside[2].all()
    assert not inside[:2].any()
    viewer.layers["reviewed"].add_ellipses(
        record.axes.place(0, np.array([[10, 10], [10, 30], [20, 30], [20, 10]]))
    )
    viewer.layers["reviewed"].add_lines(np.array([[0, 1, 1], [0, 50, 50]]))
    inside = inside_outlines(record.planes_shape, record.outlines())
    assert abs(inside[0].sum() - np.pi * 5 * 10) < 15
    snapshot = copies.snapshot(record)
    ((_, labelled),) = snapshot.labelled()
    effective = labelled.effective()
    assert (effective[2] == 1).all()
    assert (effective[1] == 2).sum() == 150
    assert (effective[1] == 1).sum() == 0


def test_drawing_takes_up_the_shapes_tool(one_class):
    viewer, widget = one_class
    widget.reviewed.polygon.click()
    layer = viewer.layers["reviewed"]
    assert viewer.layers.selection.active == layer
    assert layer.mode == "add_polygon"
    layer.add_rectangles([[1, 1], [1, 9], [9, 9], [9, 1]])
    assert (layer.face_color[0] == 0).all()  # outlines hide nothing


def test_regions_of_a_layer_that_was_removed_do_not_come_back(one_class):
    viewer, widget = one_class
    widget.reviewed.complete_plane()
    viewer.layers.remove("reviewed")
    assert widget.images.current.outlines() == ()
    widget.reviewed.draw("add_rectangle")
    assert widget.images.current.outlines() == ()


def test_an_image_that_is_empty_and_complete_is_learnt_from(one_class, halves, wait):
    viewer, widget = one_class
    viewer.add_image(halves[::-1], name="empty")
    widget.source.image_combo.value = viewer.layers["empty"]
    widget.reviewed.complete_plane()
    widget.source.image_combo.value = viewer.layers["halves"]
    widget.adapt()
    wait(widget)
    learnt = widget.session.rounds[0].adapter.summary["labelled_pixels"]
    assert learnt == {"1": halves.size, "2": 150}


def test_the_adapter_remembers_the_background(one_class, wait, tmp_path):
    from napari_convlora.model.adapter import Adapter

    _, widget = one_class
    widget.table.rename(1, "air")
    widget.table.mark_background(1)
    widget.reviewed.complete_plane()
    widget.adapt()
    wait(widget)
    widget.export_adapter(tmp_path / "a.safetensors")
    (background, _) = Adapter.load(tmp_path / "a.safetensors").classes
    assert background == ClassInfo(1, "air", background.colour, background=True)
