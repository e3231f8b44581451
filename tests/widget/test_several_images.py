"""What one image says must neither be lost nor be taken for what another says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile
from qtpy.QtWidgets import QMessageBox

from napari_convlora.labels.importing import Meaning
from napari_convlora.project import Project
from napari_convlora.widget import adopt_dialog


@pytest.fixture
def two(make_viewer, make_widget, halves):
    """A viewer with the images a and b, and its widget."""
    viewer = make_viewer()
    images = [viewer.add_image(halves + i, name=name) for i, name in enumerate("ab")]
    return viewer, make_widget(viewer), *images


def choose(combo, text):
    """Choose a row as a user does."""
    native = combo.native
    assert native.findText(text) >= 0
    native.setCurrentIndex(native.findText(text))


def test_a_layer_of_the_users_own_is_saved_without_another_stroke(
    ready, halves, saved, tmp_path, qtbot, monkeypatch
):
    strokes = Meaning({1: "background", 2: "class 2"})
    monkeypatch.setattr(adopt_dialog, "ask", lambda *_: strokes)
    viewer, widget = ready()
    widget.keeper.create(tmp_path / "p")
    saved(widget)
    own = np.zeros(halves.shape, np.int32)
    own[:3], own[-3:] = 1, 2
    viewer.add_labels(own, name="mine")
    choose(widget.source.annotations_combo, "mine")
    saved(widget)
    (entry,) = widget.keeper.entries
    assert entry.counts == {1: 270, 2: 270}


def test_a_renamed_image_keeps_its_strokes_to_itself(ready, halves, qtbot, saved, tmp_path):
    viewer, widget = ready()
    layer, image = widget.images.current.annotations, viewer.layers["halves"]
    image.name = "control"
    viewer.add_image(halves[:, ::-1].copy(), name="halves")
    choose(widget.source.image_combo, "halves")
    assert widget.images.current.annotations is None
    choose(widget.source.image_combo, "control")
    assert widget.images.current.annotations is layer


@pytest.mark.parametrize("merge", [True, False])
def test_merging_and_removing_reach_images_that_are_not_open(
    started, paint, wait, saved, qtbot, merge
):
    _, widget = started()
    widget.table.add("third")
    layer = widget.start_annotating()
    for class_id, column in ((1, 10), (2, 70), (3, 40)):
        paint(layer, class_id, column)
    widget.keeper.step(1)
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    if merge:
        widget.merge_class(3, 2)
    else:
        widget.remove_class(3)
    saved(widget)
    assert widget.keeper.entries[0].counts == ({1: 150, 2: 300} if merge else {1: 150, 2: 150})
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    widget.keeper.step(-1)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    assert [info.id for info in widget.classes] == [1, 2]


@pytest.mark.parametrize("opened", [True, False])
def test_removing_asks_for_what_is_painted_on_other_images(
    started, paint, saved, monkeypatch, opened, halves
):
    viewer, widget = started()
    paint(widget.start_annotating(), 2, 70)
    if opened:
        viewer.add_image(halves, name="another")
        choose(widget.source.image_combo, "another")
    else:
        widget.keeper.step(1)
    asked = []
    monkeypatch.setattr(
        QMessageBox, "question", lambda *a: asked.append(a) or QMessageBox.StandardButton.No
    )
    widget.table.select(2)
    widget.table._remove.click()
    assert "150 painted pixels" in asked[0][2]
    assert [info.id for info in widget.classes] == [1, 2]


def test_merging_asks_where_it_cannot_be_undone(started, paint, saved, monkeypatch):
    _, widget = started()
    widget.table.add("third")
    paint(widget.start_annotating(), 3, 70)
    asked = []
    answers = iter([QMessageBox.StandardButton.No, QMessageBox.StandardButton.Yes])
    monkeypatch.setattr(QMessageBox, "question", lambda *a: asked.append(a[2]) or next(answers))

    def merge(class_id):
        widget.table.select(class_id)
        widget.table._list_targets()
        next(a for a in widget.table._merge.actions() if a.text() == "class 2").trigger()

    widget.keeper.step(1)
    merge(3)
    assert asked[0].startswith("Merge 'third' into 'class 2'? Its 150 painted pixels")
    saved(widget)
    assert widget.keeper.entries[0].counts == {3: 150}
    assert len(widget.classes) == 3
    merge(3)
    saved(widget)
    assert widget.keeper.entries[0].counts == {2: 150}
    fourth = widget.table.add("fourth").id
    paint(widget.start_annotating(), fourth, 30)
    merge(fourth)  # undo reaches all of it
    assert len(asked) == len(widget.classes) == 2


def test_what_to_do_next_considers_every_image_of_the_project(started, paint, saved, qtbot):
    _, widget = started()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    widget.keeper.step(1)
    assert widget.status == "Press Start annotating, then paint a few strokes."
    layer = widget.start_annotating()
    paint(layer, 2, 30)
    learn = "Press Adapt to learn from 450 annotated pixels of 'picture1', 'picture0'"
    qtbot.waitUntil(lambda: widget.status == f"{learn}.")
    widget.table.add("third")
    assert widget.status == f"{learn}; no labels yet for third."


def test_what_was_tried_can_be_taken_back(make_viewer, make_widget, halves):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves, halves + 1, halves + 2]), name="stack")
    widget = make_widget(viewer)
    choose(widget.source.channels_combo, "axis 0 (3 channels)")
    assert widget.images.current.channel_axis == 0
    choose(widget.source.channels_combo, "none, only planes")
    assert widget.images.current.channel_axis is None
    assert widget.start_annotating().data.shape == (3, 80, 90)


def test_a_new_layer_of_annotations_begins_where_it_is_chosen(ready, paint, qtbot):
    viewer, widget = ready()
    before = widget.images.current.annotations
    choose(widget.source.annotations_combo, "new layer")
    layer = widget.images.current.annotations
    assert layer is not before
    assert layer in viewer.layers
    assert widget.source.annotations_combo.value is layer
    paint(layer, 2, 30)
    qtbot.waitUntil(lambda: widget.images.counts.pixels == {2: 150})
    assert (before.data > 0).sum() == 300  # it is the user's now


def test_the_brush_paints_what_the_table_shows_on_every_image(two, drag):
    viewer, widget, *_ = two
    choose(widget.source.image_combo, "a")
    widget.start_annotating()
    widget.table._table.setCurrentCell(1, 2)
    choose(widget.source.image_combo, "b")
    layer = widget.start_annotating()
    choose(widget.source.image_combo, "a")
    widget.table._table.setCurrentCell(0, 2)
    choose(widget.source.image_combo, "b")
    viewer.layers.selection.active = layer
    drag(layer, (20, 20), (40, 20))
    assert set(np.unique(layer.data)) == {0, widget.table.current} == {0, 1}


def test_the_brush_follows_a_table_that_is_loaded_or_merged(ready, tmp_path):
    _, widget = ready()
    layer = widget.images.current.annotations
    widget.save_classes(tmp_path / "two.json")
    for _ in range(2):
        widget.table.add()
    widget.load_classes(tmp_path / "two.json")
    assert layer.selected_label == widget.table.current
    widget.table.add("third")
    widget.merge_class(3, 1)
    assert layer.selected_label == widget.table.current == 1


def test_an_id_that_is_painted_without_a_row_stays_on_the_brush(ready, paint, qtbot):
    _, widget = ready()
    layer = widget.images.current.annotations
    layer.selected_label = 7
    paint(layer, 7, 30)
    qtbot.waitUntil(lambda: 7 in [info.id for info in widget.classes])
    assert layer.selected_label == widget.table.current == 7


def test_a_round_is_of_the_reading_it_learnt_from(
    make_viewer, make_widget, halves, paint, wait, saved, tmp_path, qtbot
):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves, halves + 1, halves + 2]), name="a")
    viewer.add_image(halves, name="b")
    widget = make_widget(viewer)
    choose(widget.source.image_combo, "a")
    choose(widget.source.channels_combo, "axis 0 (3 channels)")
    choose(widget.source.channels_combo, "none, only planes")
    layer = widget.start_annotating()
    paint(layer, 1, 10, plane=(0,))
    paint(layer, 2, 70, plane=(0,))
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.keeper.create(tmp_path / "p")
    widget.adapt()
    wait(widget)
    saved(widget)
    assert [(e.stem, e.shape) for e in widget.keeper.entries] == [("a", (3, 80, 90, 1))]
    assert widget.history.records[-1].images == ("a",)
    assert [labels.shape for _, labels in widget.keeper.project.rounds.labels(1)] == [(3, 80, 90)]


def test_a_layer_that_repeats_a_name_makes_no_project_unreadable(two, halves, tmp_path, saved):
    viewer, widget, *_ = two
    data = np.zeros(halves.shape, int)
    data[5:9], data[20:24], data[40:44] = 1, 2, 3
    names = pd.DataFrame({"index": [1, 2, 3], "name": ["background", "nucleus", "nucleus"]})
    widget.use_annotations(viewer.add_labels(data, name="mine", features=names))
    widget.keeper.create(tmp_path / "p")
    saved(widget)
    widget.keeper.close()
    project = Project.open(tmp_path / "p")
    assert [c.name for c in project.manifest.classes] == ["background", "nucleus", "nucleus (2)"]
    project.close()


def test_an_image_of_many_channels_is_shown(started, halves, tmp_path, saved):
    _, widget = started()
    path = tmp_path / "hyper.tif"
    many = np.stack([halves + i for i in range(70)])
    tifffile.imwrite(path, many, metadata={"axes": "CYX"})
    widget.keeper.add_files([path])
    saved(widget)
    widget.keeper.show_image("hyper")
    assert widget.images.current.n_channels == 70


def visible(viewer):
    return {layer.name for layer in viewer.layers if layer.visible}


def test_choosing_an_image_shows_its_layers_and_hides_those_of_others(two, paint, wait, qtbot):
    viewer, widget, a, _b = two
    for name, column in (("a", 10), ("b", 70)):
        choose(widget.source.image_combo, name)
        layer = widget.start_annotating()
        paint(layer, 1, column)
        paint(layer, 2, 40)
        widget.adapt()
        wait(widget)
    assert visible(viewer) == {"b", "annotations of b", "prediction of b"}
    viewer.layers["prediction of b"].visible = False  # the user's own choice
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "annotations", "prediction"}
    choose(widget.source.image_combo, "b")
    assert visible(viewer) == {"b", "annotations of b"}
    viewer.layers.remove("b")
    qtbot.waitUntil(lambda: widget.images.current.image == a)
    assert {"a", "annotations", "prediction"} <= visible(viewer)


def test_a_round_that_goes_on_behind_another_image_stays_hidden(two, paint, wait, qtbot):
    viewer, widget, _, _ = two
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    choose(widget.source.image_combo, "b")
    wait(widget)
    assert viewer.layers["prediction"].data.any()
    assert visible(viewer) == {"b"}
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "annotations", "prediction"}


def test_images_beside_each_other_and_channels_above_stay_visible(two, halves):
    viewer, widget, _a, b = two
    b.translate = (0, 200)
    viewer.add_image(halves, name="stain", blending="additive")
    choose(widget.source.image_combo, "b")
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "b", "stain"}
    b.translate = (0, 0)
    choose(widget.source.image_combo, "b")
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "stain"}  # b lay over it
    choose(widget.source.image_combo, "b")
    viewer.canvas.grid.enabled = True
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "b", "stain"}


def test_images_that_were_deleted_teach_no_more(two, paint, wait, saved, qtbot):
    viewer, widget, _a, b = two
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 40)
    saved(widget)
    for name in ("annotations", "a"):
        viewer.layers.remove(name)
    assert widget.images.current.image == b
    layer = widget.start_annotating()
    paint(layer, 1, 20)
    qtbot.waitUntil(lambda: widget.images.counts.pixels == {1: 150})
    assert "paint a stroke" in widget.status  # the other class was on the image that is gone
    paint(layer, 2, 70)
    qtbot.waitUntil(lambda: widget.status == "Press Adapt to learn from 300 annotated pixels.")
    said = []
    widget.workflow.said.connect(said.append)
    learnt = []
    widget.workflow.learnt.connect(lambda message, images, recipe: learnt.extend(images))
    widget.adapt()
    wait(widget)
    assert [image.name for image in learnt] == ["b"]
    assert "Training on cpu: 300 painted pixels of background, class 2 in 'b'." in said
    # What was painted on it is kept, shown, and learnt from again once it is back.
    (row,) = [t for t in rows(widget.project.images) if " a " in t]
    assert "150" in row
    assert "not in the viewer" in row
    widget.keeper.show_image(widget.keeper.entries[0].stem)
    assert (widget.images.current.annotations.data > 0).sum() == 300
    widget.adapt()
    wait(widget)
    assert [image.name for image in learnt] == ["b", "a", "b"]


def rows(combo):
    return [combo.item(i).text() for i in range(combo.count())]


def test_a_project_that_is_saved_names_images_that_were_deleted(two, paint, saved, tmp_path):
    viewer, widget, _, _ = two
    paint(widget.start_annotating(), 1, 10)
    saved(widget)
    viewer.layers.remove("annotations")
    viewer.layers.remove("a")
    widget.keeper.create(tmp_path / "p")
    assert widget.status.endswith("Also on its list, but taken out of the viewer: 'a'.")


def test_an_image_whose_annotations_were_removed_is_not_counted(two, paint, saved, qtbot):
    viewer, widget, _, _ = two
    paint(widget.start_annotating(), 1, 10)
    saved(widget)
    choose(widget.source.image_combo, "b")
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 40)
    learn = "Press Adapt to learn from"
    qtbot.waitUntil(lambda: widget.status == f"{learn} 450 annotated pixels of 'b', 'a'.")
    viewer.layers.remove("annotations")
    widget._reactions.suggest()
    assert widget.status == f"{learn} 300 annotated pixels."


def test_the_strokes_of_an_image_that_is_opened_again_are_seen(two, paint, halves):
    viewer, widget, _, _ = two
    paint(widget.start_annotating(), 1, 10)
    choose(widget.source.image_combo, "b")
    widget.start_annotating()
    assert visible(viewer) == {"b", "annotations of b"}
    viewer.layers.remove("a")
    viewer.add_image(halves, name="a")
    choose(widget.source.image_combo, "a")
    assert widget.images.current.annotating
    assert visible(viewer) == {"a", "annotations"}


def test_what_was_shown_again_by_hand_is_hidden_for_the_next_image(two, halves):
    viewer, widget, _, _ = two
    viewer.add_image(halves, name="c")
    for name in "abc":
        choose(widget.source.image_combo, name)
        widget.start_annotating()
    assert visible(viewer) == {"c", "annotations of c"}
    for layer in viewer.layers:
        layer.visible = True
    choose(widget.source.image_combo, "a")
    assert visible(viewer) == {"a", "annotations"}


def test_a_mask_can_be_chosen_when_the_annotations_have_lost_their_size(ready, halves, monkeypatch):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    layer.data = layer.data[:40]
    monkeypatch.setattr(adopt_dialog, "ask", lambda *_: Meaning({1: "dark", 2: "bright"}))
    mask = np.ones(halves.shape, int)
    mask[:, 45:] = 2
    viewer.add_labels(mask, name="mine")
    choose(widget.source.annotations_combo, "mine")
    assert [info.name for info in widget.classes] == ["dark", "bright"]
