"""Choosing a Labels layer that was not made here as annotations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication, QDialogButtonBox

from napari_convlora.labels.classes import find_background
from napari_convlora.labels.importing import Meaning
from napari_convlora.widget.adopt_dialog import AdoptDialog
from napari_convlora.widget.layers import learnable

OK, CANCEL = QDialogButtonBox.StandardButton.Ok, QDialogButtonBox.StandardButton.Cancel


@pytest.fixture
def discs() -> np.ndarray:
    """Eight discs on 80 x 90 pixels, numbered from 1."""
    rows, columns = np.indices((80, 90))
    labels = np.zeros((80, 90), np.int32)
    for i in range(8):
        row, column = 20 + 40 * (i // 4), 12 + 22 * (i % 4)
        labels[(rows - row) ** 2 + (columns - column) ** 2 < 81] = i + 1
    return labels


@pytest.fixture
def chosen(make_viewer, make_widget, halves, answer):
    """Open an image and choose a mask for its annotations, as a user does, and answer."""

    def make(mask, action=lambda dialog: None, button=OK, **attributes):
        viewer = make_viewer()
        viewer.add_image(np.broadcast_to(halves, mask.shape).copy(), name="halves")
        layer = viewer.add_labels(mask.copy(), name="mask", **attributes)
        widget = make_widget(viewer)
        asked = answer(action, button)
        widget.source.annotations_combo.value = layer
        return viewer, widget, layer, asked

    return make


@pytest.fixture
def answer():
    """Answer the dialog that comes next; returns a list of what was asked."""

    def prepare(action=lambda dialog: None, button=OK):
        asked = []

        def now():
            dialog = QApplication.activeModalWidget()
            if not isinstance(dialog, AdoptDialog):
                return
            asked.append(dialog)
            try:
                action(dialog)
                dialog.buttons.button(button).click()
            finally:
                if dialog.isVisible():  # or a test that fails would wait for ever
                    dialog.reject()

        QTimer.singleShot(0, now)
        return asked

    return prepare


def pixels(widget) -> dict[str, int]:
    """Return pixels by class name that a round would learn from."""
    names = {info.id: info.name for info in widget.classes}
    return {names[i]: n for i, n in learnable.learnable_pixels(widget.images).items()}


def test_background_of_a_finished_mask_joins_no_class(chosen, discs, qtbot):
    mask = np.where(discs > 4, 2, np.minimum(discs, 1))

    def name(dialog):
        assert dialog.finished_mask.isChecked()  # proposed, but asked
        dialog.class_box(1).setCurrentText("cytoplasm")
        dialog.class_box(2).setCurrentText("nucleus")

    viewer, widget, layer, asked = chosen(mask, name)
    assert len(asked) == 1
    widget.reviewed.whole.click()
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 3)
    zeros, ones, twos = (int((mask == i).sum()) for i in range(3))
    assert pixels(widget) == {"background": zeros, "cytoplasm": ones, "nucleus": twos}
    (background,) = (info for info in widget.classes if info.background)
    assert background.name == "background"
    assert (layer.data == mask).all()
    assert not layer.visible
    annotations = widget.images.current.annotations
    assert annotations.name == "annotations"
    assert widget.source.annotations_combo.value is annotations
    assert "'mask' stays as it is, hidden" in widget.status
    assert "Press Adapt" in widget.status
    assert [other.name for other in viewer.layers] == ["halves", "mask", "annotations", "reviewed"]


def test_cancel_leaves_everything_as_it_was(chosen, discs):
    viewer, widget, layer, asked = chosen(discs, button=CANCEL)
    assert len(asked) == 1
    assert widget.source.annotations_combo.value == widget.source.annotations_combo.choices[0]
    assert widget.images.current.annotations is None
    assert list(viewer.layers) == [viewer.layers["halves"], layer]
    assert layer.visible
    assert [info.name for info in widget.classes] == ["background", "class 2"]


def test_strokes_whose_classes_are_free_are_used_as_they_are(chosen, discs, answer):
    mask = np.zeros_like(discs)
    mask[10:70, 20:23], mask[10:70, 60:63] = 1, 3

    def name(dialog):
        assert dialog.strokes.isChecked()
        assert not dialog.class_box(0).isEnabled()
        dialog.class_box(1).setCurrentText("soil")

    _, widget, layer, _ = chosen(mask, name)
    assert widget.images.current.annotations == layer
    assert layer.visible
    assert [(info.id, info.name) for info in widget.classes] == [(1, "soil"), (3, "class 3")]
    assert find_background(widget.classes) is None  # so that nothing joins it unasked
    # It is ours from now on: back and forth asks nothing more.
    asked = answer()
    widget.source.annotations_combo.value = widget.source.annotations_combo.choices[0]
    assert widget.images.current.annotations != layer
    widget.source.annotations_combo.value = layer
    assert widget.images.current.annotations == layer
    assert not asked


def test_objects_become_one_class(chosen, discs, qtbot):
    many = np.arange(1, 201).repeat(36).reshape(80, 90).astype(np.int32)
    many[discs > 0] = 0

    def name(dialog):
        assert dialog.objects.isChecked()
        dialog.class_box(None).setCurrentText("cell")

    _, widget, _, _ = chosen(many, name)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    zeros = int((discs > 0).sum())
    assert pixels(widget) == {"background": zeros, "cell": many.size - zeros}


def test_more_objects_than_there_can_be_classes_are_asked_about_too(chosen):
    many = np.arange(80 * 90, dtype=np.int32).reshape(80, 90) // 2
    _, widget, _, _ = chosen(many, lambda dialog: dialog.classes.click())  # it is disabled
    assert [info.name for info in widget.classes] == ["background", "object"]


def test_a_black_and_white_mask_and_a_name_that_cannot_be_used(chosen, discs):
    def name(dialog):
        box, ok = dialog.class_box(255), dialog.buttons.button(OK)
        box.setCurrentText("x" * 300)
        assert not ok.isEnabled()
        assert "200 characters" in dialog.note.text()
        box.setCurrentText("drop")
        dialog.strokes.click()
        dialog.finished_mask.click()
        assert dialog.class_box(255).currentText() == "drop"  # what was typed stays

    _, widget, _, _ = chosen((discs > 0) * np.uint8(255), name)
    assert [(i.id, i.name) for i in widget.classes] == [(1, "background"), (2, "drop")]
    assert set(np.unique(widget.images.current.annotations.data)) == {1, 2}


def test_classes_with_pixels_are_not_joined(ready, discs, answer, qtbot):
    viewer, widget = ready()  # strokes of 'background' and 'class 2', the table of the start
    before = viewer.layers["annotations"].data.copy()
    viewer.add_image(discs.astype(float), name="other")
    widget.source.image_combo.value = viewer.layers["other"]
    layer = viewer.add_labels(np.minimum(discs, 2), name="mask")
    answer()
    widget.source.annotations_combo.value = layer
    assert [info.name for info in widget.classes[:2]] == ["background", "class 2"]
    data = widget.images.current.annotations.data
    assert (data[discs == 0] == 1).all()  # the background that is there, as the dialog said
    assert not np.isin(data[discs > 0], (1, 2)).any()
    assert (viewer.layers["annotations"].data == before).all()


def test_a_mask_without_the_axis_of_length_1(make_viewer, make_widget, halves, discs):
    viewer = make_viewer()
    viewer.add_image(halves[None], name="halves", scale=(2, 0.5, 0.5))
    layer = viewer.add_labels(discs.astype(np.uint8), name="mask", scale=(0.5, 0.5))
    widget = make_widget(viewer)
    widget.use_annotations(layer, Meaning({0: "background"}, "cell"))
    record = widget.images.current
    assert (record.painted()[0] == np.where(discs > 0, 2, 1)).all()
    assert tuple(record.annotations.scale) == (2, 0.5, 0.5)


def test_a_script_passes_the_answer_and_is_not_asked(ready, discs, answer):
    viewer, widget = ready()
    widget.table.rename(1, "matrix")
    asked = answer()
    layer = viewer.add_labels(discs, name="mask")
    widget.use_annotations(layer, Meaning({0: "matrix"}, "cell"))
    assert not asked
    # The class of value 0 is the background, as there was none.
    assert [(i.id, i.name, i.background) for i in widget.classes] == [
        (1, "matrix", True),
        (2, "class 2", False),
        (3, "cell", False),
    ]


def test_the_next_panel_finds_the_annotations_that_were_chosen_last(
    ready, discs, answer, make_widget
):
    viewer, widget = ready()
    layer = viewer.add_labels(discs, name="mask")
    answer(lambda dialog: dialog.objects.click())
    widget.source.annotations_combo.value = layer
    chosen = widget.images.current.annotations
    assert chosen != viewer.layers["annotations"]
    widget.workflow.close()
    assert make_widget(viewer).images.current.annotations == chosen


def test_names_of_a_layer_are_proposed(chosen, discs):
    def look(dialog):
        assert dialog.strokes.isChecked()  # as the background has a value of its own
        assert dialog.class_box(2).currentText() == "nucleus"

    names = pd.DataFrame({"index": [1, 2], "name": ["background", "nucleus"]})
    _, widget, layer, asked = chosen(np.minimum(discs, 2), look, features=names)
    assert asked
    assert widget.images.current.annotations == layer
    assert [info.name for info in widget.classes] == ["background", "nucleus"]


def test_an_adopted_mask_is_kept_in_a_project(started, discs, answer, saved):
    viewer, widget = started()
    name = widget.images.current.image.name
    layer = viewer.add_labels(discs, name="mask")
    answer(lambda dialog: dialog.objects.click())
    widget.source.annotations_combo.value = layer
    saved(widget)
    widget.keeper.step(1)
    asked = answer()
    widget.keeper.step(-1)
    assert widget.images.current.image.name == name
    assert not asked
    assert (widget.images.current.painted()[0] == np.where(discs > 0, 2, 1)).all()


def test_layers_of_ours_with_other_classes_are_not_fused_with_the_table(
    make_viewer, make_widget, qtbot
):
    viewer = make_viewer()
    viewer.open_sample("napari-convlora", "sandstone")
    widget = make_widget(viewer)
    assert widget.images.current.annotating
    stone = [info.name for info in widget.classes]
    viewer.open_sample("napari-convlora", "nuclei")
    widget.source.image_combo.value = viewer.layers["nuclei"]
    assert not widget.images.current.annotating  # its class 1 is no pore
    assert [info.name for info in widget.classes] == stone
    strokes = viewer.layers["annotations [1]"]
    pixels = [int((strokes.data == i).sum()) for i in (1, 2)]
    boxes = []

    def answer():
        dialog = QApplication.activeModalWidget()
        try:
            boxes.extend(dialog.class_box(value).currentText() for value in (1, 2))
        finally:
            dialog.buttons.button(OK).click()

    QTimer.singleShot(100, answer)
    widget.source.annotations_combo.value = strokes
    assert boxes == ["background", "nucleus"]
    assert [info.name for info in widget.classes] == [*stone, "background", "nucleus"]
    qtbot.waitUntil(lambda: widget.images.counts.pixels == dict(zip((5, 6), pixels, strict=True)))
    widget.source.image_combo.value = viewer.layers["sandstone"]
    assert widget.images.current.annotating
