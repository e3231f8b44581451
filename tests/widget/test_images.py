"""Images of every kind that napari holds."""

from __future__ import annotations

import numpy as np
import pytest

from napari_convlora.errors import InputError
from napari_convlora.labels.importing import Meaning
from napari_convlora.widget import adopt_dialog, dialogs
from napari_convlora.widget.layers import adoption, showing


@pytest.fixture
def stack(halves) -> np.ndarray:
    """16-bit stack (3, H, W) whose planes differ."""
    return np.stack([halves * 100, halves * 90, halves[:, ::-1] * 100]).astype(np.uint16)


def test_annotations_without_an_axis_of_length_1(make_viewer, make_widget, halves, paint, wait):
    viewer = make_viewer()
    viewer.add_image(halves[None], name="halves")
    widget = make_widget(viewer)
    layer = viewer.add_labels(np.zeros(halves.shape, np.uint8), name="mine")
    adoption.adopt(widget.images.need(), layer)
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")


def test_a_16_bit_stack_with_scale(
    make_viewer, make_widget, stack, paint, wait, qtbot, monkeypatch
):
    viewer = make_viewer()
    image = viewer.add_image(stack, name="stack", scale=(5, 0.5, 0.5), translate=(1, 2, 3))
    widget = make_widget(viewer, max_steps=20, preview_seconds=0.05)
    layer = widget.start_annotating()
    assert layer.data.shape == stack.shape
    assert layer.data.dtype == np.int32
    assert np.array_equal(layer.scale, image.scale)
    assert np.array_equal(layer.translate, image.translate)
    viewer.dims.set_current_step(0, 2)
    assert widget.images.current.plane() == 2
    paint(layer, 1, 70, plane=(2,))
    paint(layer, 2, 10, plane=(2,))
    paint(layer, 1, 10, plane=(0,))
    seen = []
    show = showing.show
    monkeypatch.setattr(showing, "show", lambda *a: seen.append(a[2:]) or show(*a))
    widget.adapt()
    qtbot.waitUntil(lambda: bool(seen), timeout=20_000)
    assert seen[0] == (2,)
    assert viewer.layers["prediction"].data[2].all()
    assert not viewer.layers["prediction"].data[1].any()
    viewer.dims.set_current_step(0, 0)
    qtbot.waitUntil(lambda: (0,) in seen or not widget.running, timeout=20_000)
    wait(widget)
    assert (0,) in seen
    assert viewer.layers["prediction"].data.all()
    assert np.array_equal(viewer.layers["prediction"].scale, image.scale)


@pytest.mark.parametrize("kind", ["rgb", "rgba", "channels", "channels inside", "multiscale"])
def test_channels_and_pyramids(make_viewer, make_widget, halves, paint, wait, kind):
    viewer = make_viewer()
    byte = halves.clip(0, 255).astype(np.uint8)
    data = {
        "rgb": np.stack([byte] * 3, -1),
        "rgba": np.stack([byte] * 3 + [np.full_like(byte, 255)], -1),
        "channels": np.stack([byte] * 5),
        "channels inside": np.stack([np.stack([byte] * 5)] * 2),
        "multiscale": [byte, byte[::2, ::2]],
    }[kind]
    axis = {"channels": 0, "channels inside": 1}.get(kind)
    viewer.add_image(data, name="image", rgb=kind.startswith("rgb"))
    widget = make_widget(viewer)
    if axis is not None:
        widget.source.channels_combo.value = axis
    layer = widget.start_annotating()
    shape = {"channels": (1, 80, 90), "channels inside": (2, 1, 80, 90)}.get(kind, (80, 90))
    assert layer.data.shape == shape
    if axis is not None:  # one label voxel spans all channels
        for channel in (0, 4):
            viewer.dims.set_current_step(axis, channel)
            assert layer.world_to_data(viewer.dims.point)[axis].round() == 0
    paint(layer, 1, 10, plane=(0,) * (len(shape) - 2))
    paint(layer, 2, 70, plane=(0,) * (len(shape) - 2))
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    assert viewer.layers["prediction"].data.shape == shape
    assert viewer.layers["prediction"].data.all()
    channels = {"rgb": 3, "rgba": 3, "multiscale": 1}.get(kind, 5)
    assert len(widget.session.installed.normalizer.low) == channels


def test_the_users_own_labels_layer_serves_as_annotations(
    make_viewer, make_widget, halves, wait, qtbot, monkeypatch
):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    own = np.zeros(halves.shape, np.uint8)
    own[10:60, 10] = 1
    own[10:60, 70] = 4
    layer = viewer.add_labels(own.copy(), name="mine")
    viewer.add_labels(np.zeros((7, 7), int), name="too small")
    widget = make_widget(viewer)
    combo = widget.source.annotations_combo.native
    assert [combo.itemText(i) for i in range(combo.count())] == ["new layer", "mine"]
    # What it holds is asked; tests/widget/test_adopt_dialog.py has the dialog.
    said = Meaning({1: "background", 4: "class 4"})
    monkeypatch.setattr(adopt_dialog, "ask", lambda *_: said)
    widget.source.annotations_combo.value = layer
    assert (layer.data == own).all()
    assert [info.id for info in widget.classes] == [1, 4]
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    assert (layer.data == own).all()
    with pytest.raises(InputError, match="'too small' cannot hold annotations"):
        widget.images.use_annotations(viewer.layers["too small"])


def test_a_new_widget_takes_up_the_layers_of_the_last(window, ready, wait, make_widget, paint):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.table.rename(2, "nucleus")
    paint(viewer.layers["prediction"], 2, 20)
    viewer.window.remove_dock_widget(widget)
    widget.workflow.close()
    again = make_widget(viewer)
    assert again.source.annotations_combo.value == viewer.layers["annotations"]
    assert again.classes[1].name == "nucleus"
    again.adapt()
    wait(again)
    again.adapt()
    wait(again)
    names = [layer.name for layer in viewer.layers]
    assert names == ["halves", "previous prediction", "prediction", "annotations"]
    assert (viewer.layers["annotations"].data[10:60, 20:23] == 2).all()


def test_ids_that_are_no_classes_are_refused(make_viewer, make_widget, halves):
    viewer = make_viewer()
    viewer.add_image(halves, name="halves")
    widget = make_widget(viewer)
    data = np.zeros(halves.shape, np.int64)
    data[3, 4] = 400
    layer = viewer.add_labels(data, name="instances")
    with pytest.raises(InputError, match="holds the id 400, but classes end at 255"):
        widget.images.use_annotations(layer)


@pytest.mark.parametrize(("typed", "written"), [("mine", "mine.tif"), ("mine.png", "mine.png")])
def test_a_file_name_gets_the_ending_of_its_kind(monkeypatch, tmp_path, typed, written):
    answer = str(tmp_path / typed), "TIFF (*.tif *.tiff)"
    monkeypatch.setattr(dialogs.QFileDialog, "getSaveFileName", lambda *_: answer)
    chosen = []
    dialogs.with_masks(None, chosen.append)
    assert chosen == [str(tmp_path / written)]
    asked = []
    no = dialogs.QMessageBox.StandardButton.No
    monkeypatch.setattr(dialogs.QMessageBox, "question", lambda *a: (asked.append(a[2]), no)[1])
    (tmp_path / written).touch()
    dialogs.with_masks(None, chosen.append)
    # Qt has asked about a name with an ending.
    assert asked == (["Replace 'mine.tif'?"] if typed == "mine" else [])
    assert len(chosen) == (1 if typed == "mine" else 2)


def test_a_checkpoint_tuned_from_medsam_is_loaded_as_such(
    make_viewer, make_widget, qtbot, tmp_path, monkeypatch
):
    panel = make_widget(make_viewer())
    file = str(tmp_path / "tuned.pth")
    monkeypatch.setattr(dialogs.QFileDialog, "getOpenFileName", lambda *_: (file, ""))
    combo = panel.source.backbone_combo.native
    for entry, backbone in (
        ("checkpoint file…", file),
        ("checkpoint file tuned from MedSAM…", f"medsam:{file}"),
    ):
        combo.setCurrentText(entry)
        qtbot.waitUntil(lambda wanted=backbone: panel.source.backbone == wanted)
    assert combo.currentText() == "medsam:tuned.pth"
