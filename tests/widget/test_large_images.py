"""Layers too large for memory: lazy and multiscale ones are adapted to and predicted in parts."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from napari_convlora import blocks
from napari_convlora.widget import jobs


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(blocks, "LARGE", 1000)
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_PARTS", 0)


@pytest.fixture
def wide():
    """Grey image of 2 x 2 blocks whose left half is dark and right half bright."""
    image = np.random.default_rng(0).normal(50, 5, (560, 640)).astype(np.float32)
    image[:, 320:] += 100
    return image


class Reads:
    """An array that remembers which windows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.largest = 0

    def __getitem__(self, key):
        window = self.array[key]
        self.largest = max(self.largest, window.size)
        return window


@pytest.fixture
def begun(make_napari_viewer_proxy, make_widget, paint, qtbot):
    """Viewer and widget with a stroke in each half of an image."""

    def make(data, **options):
        viewer = make_napari_viewer_proxy()
        viewer.add_image(data, name="wide", contrast_limits=(0, 200), **options)
        widget = make_widget(viewer)
        layer = widget.start_annotating()
        plane = () if layer.ndim == 2 else (0,)
        paint(layer, 1, 200, plane=plane)
        paint(layer, 2, 400, plane=plane)
        qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
        return viewer, widget

    return make


@pytest.mark.parametrize("kind", ["memory", "dask", "multiscale", "stack", "rgb"])
def test_a_large_image_is_adapted_to_and_predicted_whole(begun, wait, wide, kind):
    options = {}
    match kind:
        case "memory":
            data = wide
        case "dask":
            data = da.from_array(wide, chunks=200)
        case "multiscale":
            data = [da.from_array(wide, chunks=200), da.from_array(wide[::2, ::2], chunks=200)]
            options = {"multiscale": True}
        case "stack":
            data = da.from_array(np.stack([wide, wide[:, ::-1]]), chunks=(1, 200, 200))
        case "rgb":
            data = da.from_array(np.repeat(wide[..., None], 4, -1).astype(np.uint8), chunks=200)
            options = {"rgb": True}
    viewer, widget = begun(data, **options)
    widget.adapt()
    wait(widget, 60_000)
    assert widget.status.startswith("Round 1 is done")
    prediction = viewer.layers["prediction"].data
    assert prediction.shape == ((2, 560, 640) if kind == "stack" else (560, 640))
    assert set(np.unique(prediction)) == {1, 2}
    first = prediction.reshape(-1, 560, 640)[0]
    assert (first[10:60, 200:203] == 1).all()  # what was painted stays
    assert (first[10:60, 400:403] == 2).all()
    widget.predict()
    wait(widget, 60_000)
    assert widget.status.startswith("The prediction is ready")


def test_only_windows_of_a_lazy_layer_are_read(begun, wait, wide):
    source = Reads(wide)
    _, widget = begun(da.from_array(source, chunks=64))
    source.largest = 0
    widget.adapt()
    wait(widget, 60_000)
    assert widget.status.startswith("Round 1 is done")
    assert 0 < source.largest <= 64 * 64


@pytest.mark.parametrize("multiscale", [False, True])
def test_what_is_seen_is_predicted_first_and_shown_at_once(
    begun, wait, wide, monkeypatch, multiscale
):
    data = [wide, wide[::2, ::2]] if multiscale else wide
    viewer, widget = begun(data, multiscale=multiscale)
    widget.adapt()
    wait(widget, 60_000)
    record = widget.images.current
    viewer.scene.camera.center = (540, 620)
    viewer.scene.camera.zoom = 30
    viewer.screenshot(flash=False)  # napari finds out what is seen when it draws
    seen = record.seen(record.prediction)
    assert seen.top > 400
    assert seen.left > 500
    shown = []
    show = record.show_parts
    monkeypatch.setattr(
        record, "show_parts", lambda parts: (shown.extend(p for p, _ in parts), show(parts))
    )
    widget.predict()
    wait(widget, 60_000)
    assert [(b.top, b.left) for b in shown[:1]] == [(512, 512)]
    assert len(shown) == 4


def test_previews_are_of_the_part_that_is_looked_at(
    make_napari_viewer_proxy, make_widget, paint, wait, qtbot, monkeypatch
):
    viewer = make_napari_viewer_proxy()
    viewer.add_image(np.random.default_rng(0).normal(50, 5, (80, 2200)), name="long")
    widget = make_widget(viewer, max_steps=5000, preview_seconds=0.05)
    layer = widget.start_annotating()
    for class_id, column in ((1, 10), (2, 60), (1, 2100), (2, 2150)):
        paint(layer, class_id, column)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)

    def look_at(column):
        viewer.scene.camera.center, viewer.scene.camera.zoom = (40, column), 10
        viewer.screenshot(flash=False)  # napari finds out what is seen when it draws

    look_at(2150)
    record, shown = widget.images.current, []
    monkeypatch.setattr(record, "show_parts", lambda parts: shown.extend(b for b, _ in parts))
    widget.adapt()
    qtbot.waitUntil(lambda: len(shown) > 0, timeout=60_000)
    assert shown[0].left > 1000
    look_at(30)
    qtbot.waitUntil(lambda: shown[-1].left == 0, timeout=60_000)
    look_at(1100)  # where nothing is labelled: the first part, as at the beginning
    qtbot.wait(300)
    assert shown[-1].left == 0
    widget.stop()
    wait(widget, 60_000)


def test_a_prediction_that_is_stopped_keeps_its_parts(begun, wait, wide, qtbot):
    viewer, widget = begun(wide)
    widget.adapt()
    wait(widget, 60_000)
    viewer.layers["prediction"].data = np.zeros((560, 640), np.uint8)
    widget.predict()
    qtbot.waitUntil(lambda: viewer.layers["prediction"].data.any(), timeout=20_000)
    widget.stop()
    wait(widget, 60_000)
    prediction = viewer.layers["prediction"].data
    assert widget.status.startswith("The prediction was stopped: what was done by then is shown")
    assert (prediction[:10, :10] > 0).all()
    assert (prediction[-10:, -10:] == 0).all()


def test_a_correction_made_meanwhile_is_not_overwritten(begun, wait, wide, paint, qtbot):
    viewer, widget = begun(wide)
    widget.adapt()
    wait(widget, 60_000)
    record = widget.images.current
    record.show(np.ones(record.planes_shape, np.uint8))  # whatever so short a round has learnt
    widget.predict()
    paint(viewer.layers["prediction"], 2, 30)
    wait(widget, 60_000)
    assert (viewer.layers["prediction"].data[10:60, 30:33] == 2).all()
    assert (viewer.layers["annotations"].data[10:60, 30:33] == 2).all()


def test_next_finds_the_uncertainty_of_a_large_image_in_parts(begun, wait, wide):
    viewer, widget = begun(wide)
    widget.adapt()
    wait(widget, 60_000)
    assert "uncertainty" not in viewer.layers
    prediction = viewer.layers["prediction"].data.copy()
    widget.review.next_button.click()
    wait(widget, 60_000)
    uncertainty = viewer.layers["uncertainty"].data
    assert uncertainty.shape == (560, 640)
    assert all(uncertainty[:512, :512].any(axis)[::8].any() for axis in (0, 1))
    assert uncertainty[512:, 512:].any()
    assert (viewer.layers["prediction"].data == prediction).all()
    assert widget.status.startswith(("Place 1:", "Nothing else in 'wide' is uncertain."))
    widget.review.keep_uncertainty.setChecked(False)
    widget.predict()
    wait(widget, 60_000)
    assert "uncertainty" not in viewer.layers  # that of another adapter would mislead


def test_a_project_keeps_the_prediction_of_a_large_image(begun, wait, wide, tmp_path):
    viewer, widget = begun(wide)
    widget.keeper.create(tmp_path / "p")
    widget.adapt()
    wait(widget, 60_000)
    widget.keeper.save()
    widget.keeper.writer.flush()
    kept = widget.keeper.project.prediction(widget.keeper.current)
    assert (kept[0] == viewer.layers["prediction"].data).all()


def test_parts_that_name_classes_of_before_show_those_of_today(begun, wide):
    viewer, widget = begun(wide)
    merged, removed = widget.table.add().id, widget.table.add().id
    widget.merge_class(merged, 2)
    widget.remove_class(removed)
    block = blocks.Block(0, 0, 0, 2, 3)
    labels = np.array([[merged] * 3, [removed, 1, 2]], np.uint8)
    widget.images.current.show_parts([(block, labels)])
    shown = viewer.layers["prediction"].data[:2, :3]
    assert shown.tolist() == [[2, 2, 2], [0, 1, 2]]
