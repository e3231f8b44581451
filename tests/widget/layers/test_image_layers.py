"""Layers that belong to an image stay on it when the image is moved, scaled or turned."""

from __future__ import annotations

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Image, Labels

from napari_convlora.labels.classes import default_classes
from napari_convlora.widget.layers import adoption, showing
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.new_layer import shapes_like
from napari_convlora.widget.tools.region_tool import RegionTool

PLACE = ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels")
CHANGES = {
    "flat": {
        "scale": (0.5, 0.25),
        "translate": (100, 20),
        "rotate": 30,
        "shear": [0.2],
        "affine": np.array([[1, 0.1, 5], [0, 1, -3], [0, 0, 1]]),
        "units": ("um", "um"),
        "axis_labels": ("y", "x"),
    },
    "stack": {
        "scale": (2, 0.5, 0.25),
        "translate": (7, 100, 20),
        "rotate": (0, 0, 30),
        "shear": [0, 0, 0.2],
        "affine": np.array([[1, 0, 0, 5], [0, 1, 0.1, -3], [0, 0, 1, 2], [0, 0, 0, 1]]),
        "units": ("um", "um", "um"),
        "axis_labels": ("z", "y", "x"),
    },
}


def place(layer, channel_axis=None, channel=0):
    """Everything that says where a layer lies."""
    corners = np.array([np.zeros(layer.ndim), np.arange(3, 3 + layer.ndim)])
    if channel_axis is not None:
        corners[:, channel_axis] = channel
    world = np.array([layer.data_to_world(corner) for corner in corners])
    return np.round(world, 6).tolist(), [str(u) for u in layer.units], layer.axis_labels


@pytest.fixture(params=["flat", "stack", "channels"])
def worked_on(request):
    """An image with every kind of layer that is ever put on it."""
    shape = (40, 50) if request.param == "flat" else (3, 40, 50)
    viewer = ViewerModel()
    image = viewer.add_image(np.zeros(shape, np.float32), name="image")
    record = ImageLayers(
        viewer, image, default_classes((1, 2)), 0 if request.param == "channels" else None
    )
    record.annotate()
    showing.show(record, np.ones(record.planes_shape, np.uint8))
    record.review()
    showing.keep_previous(record)
    record.extra.show_uncertainty(np.zeros(record.planes_shape, np.uint8))
    table = {"index": np.array([1]), "class_id": np.array([2])}
    record.extra.show_instances(np.ones(record.planes_shape, np.int32), table)
    viewer.layers["instances"].data_setitem((np.array([0]),) * len(shape), 1)  # mended by hand
    record.extra.show_instances(np.ones(record.planes_shape, np.int32), table)
    viewer.add_layer(shapes_like(record, "SAM prompt"))
    changes = CHANGES["flat" if request.param == "flat" else "stack"]
    return viewer, record, changes


def test_every_layer_follows_its_image_at_once_and_painting_hits_the_pixel(worked_on):
    viewer, record, changes = worked_on
    tool = RegionTool()
    tool.start(record, "click")
    viewer.layers.remove(record.annotations)  # to be brought back later
    others = [layer for layer in viewer.layers if layer is not record.image]
    others.append(record.annotations)
    assert len(others) == 8
    before = [np.copy(layer.data) for layer in others if isinstance(layer, Labels)]
    axis = record.channel_axis
    for name, value in changes.items():
        setattr(record.image, name, value)
        wanted = place(record.image, axis, 1)  # one label voxel spans all three channels
        assert {layer.name: place(layer, axis) for layer in others} == {
            layer.name: wanted for layer in others
        }, name
    after = [layer.data for layer in others if isinstance(layer, Labels)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    tool.leave()
    layer = record.annotate()
    pixel = np.array([0] * (layer.ndim - 2) + [20, 30])
    on_image = pixel.copy()
    if axis is not None:
        on_image[axis] = 1
    layer.paint(layer.world_to_data(record.image.data_to_world(on_image)), 2)
    assert layer.data[tuple(pixel)] == 2


def test_the_layers_of_an_image_that_was_renamed_are_still_its_own(worked_on):
    viewer, record, _ = worked_on
    own = {*record.layers, *record.extra.companions}
    assert len(own) == 6
    record.image.name = "another"
    record.image.translate = [5] * record.image.ndim
    assert all(layer.translate[-1] == 5 for layer in own)
    again = ImageLayers(viewer, record.image, default_classes((1, 2)), record.channel_axis)
    adoption.find_layers(again)
    assert {*again.layers, *again.extra.companions} == own


def test_labels_of_the_users_own_follow_without_the_axes_that_they_lack(make_viewer, make_widget):
    viewer = make_viewer()
    image = viewer.add_image(np.zeros((1, 40, 50), np.float32), name="image")
    own = viewer.add_labels(np.zeros((40, 50), np.uint8), name="mine")
    deep = viewer.add_labels(np.zeros((1, 1, 40, 50), np.uint8), name="deep")
    widget = make_widget(viewer)
    widget.use_annotations(own)
    showing.show(widget.images.current, np.ones((1, 40, 50), np.uint8))
    image.scale, image.translate, image.rotate = (3, 0.5, 0.25), (4, 5, 6), (0, 0, 30)
    image.affine = np.array([[1, 0, 0, 5], [0, 1, 0.1, -3], [0, 0, 1, 2], [0, 0, 0, 1]])
    world = image.data_to_world((0, 20, 30))
    assert np.allclose(own.data_to_world((20, 30)), world[1:])
    assert np.allclose(deep.data_to_world((0, 0, 20, 30)), (0, 0, 20, 30))  # nobody's yet
    widget.use_annotations(deep)
    image.translate = (7, 8, 9)
    assert np.allclose(deep.data_to_world((0, 0, 20, 30))[1:], image.data_to_world((0, 20, 30)))
    assert np.allclose(own.data_to_world((20, 30)), world[1:])  # nobody's any more


def test_the_layers_of_another_image_stay(make_viewer, make_widget, halves):
    viewer = make_viewer()
    one = viewer.add_image(halves, name="one")
    widget = make_widget(viewer)
    first = widget.start_annotating()
    two = viewer.add_image(halves, name="two")
    widget.source.image_combo.value = viewer.layers["two"]
    second = widget.start_annotating()
    one.scale = (2, 2)
    two.translate = (5, 5)
    assert (first.scale == 2).all()
    assert (first.translate == 0).all()
    assert (second.scale == 1).all()
    assert (second.translate == 5).all()


def test_layers_that_an_earlier_panel_left_follow(make_viewer, make_widget, halves):
    viewer = make_viewer()
    image = viewer.add_image(halves, name="halves")
    before = make_widget(viewer)
    before.start_annotating()
    before.images.current.extra.show_uncertainty(np.zeros((1, *halves.shape), np.uint8))
    before.workflow.close()
    widget = make_widget(viewer)
    image.scale = (2, 3)
    assert [tuple(layer.scale) for layer in viewer.layers] == [(2, 3)] * 3
    assert widget.images.current.annotations is not None


def test_nothing_listens_to_an_image_that_was_let_go(make_viewer, make_widget, halves):
    viewer = make_viewer()
    image = Image(halves, name="halves")
    listeners = {name: len(getattr(image.events, name).callbacks) for name in PLACE}
    viewer.add_layer(image)
    widget = make_widget(viewer)
    annotations = widget.start_annotating()
    viewer.layers.remove(image.name)
    image.scale = (2, 2)
    assert (annotations.scale == 1).all()
    assert {name: len(getattr(image.events, name).callbacks) for name in PLACE} == listeners


def test_a_project_takes_the_new_scale_and_place(started, saved):
    _, widget = started()
    image = widget.images.current.image
    image.scale, image.translate = (0.5, 0.25), (3, 4)
    saved(widget)
    entry = widget.keeper.project.entry(widget.keeper.current)
    assert (entry.scale, entry.translate) == ((0.5, 0.25), (3, 4))
    widget.start_annotating()
    widget.keeper.step(1)
    widget.keeper.step(-1)
    again = widget.images.current
    assert again.image is not image
    assert tuple(again.image.scale) == (0.5, 0.25)
    assert tuple(again.annotations.translate) == (3, 4)
