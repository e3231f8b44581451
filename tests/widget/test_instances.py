"""Instances as a layer, their table, and both as files."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import tifffile

from napari_convlora.errors import InputError
from napari_convlora.widget.layers import showing


@pytest.fixture
def make(qtbot):
    """Press Make and wait for the thread."""

    def press(section):
        section.make_button.click()
        assert not section.make_button.isEnabled()
        qtbot.waitUntil(section.make_button.isEnabled)

    return press


def test_instances_are_made_mended_and_exported(make_viewer, make_widget, halves, make, tmp_path):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves", scale=(0.5, 0.5))
    widget = make_widget(viewer)
    section = widget.instances
    assert not section.make_button.isEnabled()
    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 10:20, 10:20] = labels[:, 40:60, 30:50] = 2
    labels[:, 70:72, 70:72] = 2  # too small
    record = widget.images.current
    showing.show(record, labels)
    widget.workflow.changed.emit()
    make(section)
    layer = viewer.layers["instances"]
    assert list(layer.scale) == [0.5, 0.5]
    assert layer.data.max() == 2
    assert layer.features["class"].tolist() == ["class 2", "class 2"]
    assert layer.features["area"].tolist() == [100, 400]
    assert "class: class 2" in layer.get_status((7, 7), world=True)["coordinates"]
    assert layer not in widget.source.annotations_combo.choices

    layer.data_setitem((np.arange(10, 15), np.arange(10, 15)), 0)  # mended by hand
    record.extra.show_uncertainty(np.full((1, 80, 90), 30, np.uint8))
    section.export(tmp_path / "cells.tif")
    assert (tifffile.imread(tmp_path / "cells.tif") == layer.data).all()
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["area"] for row in rows] == ["95", "400"]
    assert [row["class"] for row in rows] == ["class 2", "class 2"]
    assert [row["confidence"] for row in rows] == ["70.0", "70.0"]
    with pytest.raises(InputError, match=r"use \.tif or \.csv"):
        section.export(tmp_path / "cells.png")


def test_the_selected_class_and_no_object(make_viewer, make_widget, halves, make):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 10:20, 10:20] = 2
    showing.show(widget.images.current, labels)
    widget.workflow.changed.emit()
    section = widget.instances
    section.classes.value = "the selected class"
    widget.table.select(1)
    make(section)
    assert viewer.layers["instances"].features["area"].tolist() == [7100]
    section.min_size.value = 10_000
    make(section)
    assert "lower the minimum size" in widget.status
    assert viewer.layers["instances"].data.max() == 1  # as it was


def test_what_was_mended_outlives_another_make(make_viewer, make_widget, halves, make):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 10:20, 10:20] = 2
    showing.show(widget.images.current, labels)
    widget.workflow.changed.emit()
    section = widget.instances
    make(section)
    make(section)
    assert [layer.name for layer in viewer.layers].count("instances") == 1
    mended = viewer.layers["instances"]
    mended.data_setitem((np.arange(10, 15), np.arange(10, 15)), 7)
    before = mended.data.copy()
    make(section)
    assert widget.status.endswith("Those you have mended stay in 'instances'.")
    assert (mended.data == before).all()
    assert not mended.visible
    assert (viewer.layers["instances of halves"].data > 0).sum() == 100
    make(section)  # one that is as it was made is replaced
    assert [layer.name.startswith("instances") for layer in viewer.layers].count(True) == 2


def test_the_mark_says_what_is_background(make_viewer, make_widget, halves, make):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    widget.table.rename(1, "air")
    widget.table.mark_background(1)
    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 10:20, 10:20] = 2
    showing.show(widget.images.current, labels)
    widget.workflow.changed.emit()
    make(widget.instances)
    assert viewer.layers["instances"].features["area"].tolist() == [100]


def test_planes_of_a_stack(make_viewer, make_widget, halves, make):
    viewer = make_viewer()
    viewer.add_image(np.stack([halves] * 3), name="stack")
    widget = make_widget(viewer)
    labels = np.ones((3, 80, 90), np.uint8)
    labels[:, 10:20, 10:20] = 2
    showing.show(widget.images.current, labels)
    widget.workflow.changed.emit()
    section = widget.instances
    make(section)
    assert viewer.layers["instances"].features["area"].tolist() == [100] * 3
    assert viewer.layers["instances"].features["plane"].tolist() == [0, 1, 2]
    section.join_planes.value = True
    make(section)
    assert viewer.layers["instances"].features["area"].tolist() == [300]
