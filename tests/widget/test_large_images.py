"""Layers too large for memory: lazy and multiscale ones are adapted to and predicted in parts."""

from __future__ import annotations

import time
from pathlib import Path

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from qtpy.QtWidgets import QMessageBox, QPushButton

from napari_convlora.formats import label_store
from napari_convlora.images import regions
from napari_convlora.prediction.predict import BlockPrediction
from napari_convlora.session import jobs
from napari_convlora.session.session import Session
from napari_convlora.widget.layers import showing

BLOCK = 128  # of 512 there would be sixteen times as much to compute, and no more to see
HEIGHT, WIDTH = 140, 160
_YES = QMessageBox.StandardButton.Yes


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(regions, "LARGE", 1000)
    monkeypatch.setattr(regions, "BLOCK", BLOCK)
    monkeypatch.setattr(label_store, "BLOCK", BLOCK)
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_PARTS", 0)


@pytest.fixture
def wide():
    """Grey image of 2 x 2 blocks whose left half is dark and right half bright."""
    image = np.random.default_rng(0).normal(50, 5, (HEIGHT, WIDTH)).astype(np.float32)
    image[:, WIDTH // 2 :] += 100
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
def begun(make_viewer, make_widget, paint, qtbot):
    """Viewer and widget with a stroke in each half of an image."""

    def make(data, **options):
        viewer = make_viewer()
        if isinstance(data, Path):
            viewer.open(data, plugin="napari", name="wide")
        else:
            viewer.add_image(data, name="wide", contrast_limits=(0, 200), **options)
        widget = make_widget(viewer)
        layer = widget.start_annotating()
        plane = () if layer.ndim == 2 else (0,)
        paint(layer, 1, 50, plane=plane)
        paint(layer, 2, 100, plane=plane)
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
            data = da.from_array(wide, chunks=50)
        case "multiscale":
            data = [da.from_array(wide, chunks=50), da.from_array(wide[::2, ::2], chunks=50)]
            options = {"multiscale": True}
        case "stack":
            data = da.from_array(np.stack([wide, wide[:, ::-1]]), chunks=(1, 50, 50))
        case "rgb":
            data = da.from_array(np.repeat(wide[..., None], 4, -1).astype(np.uint8), chunks=50)
            options = {"rgb": True}
    viewer, widget = begun(data, **options)
    widget.adapt()
    wait(widget, 60_000)
    assert widget.status.startswith("Round 1 is done")
    prediction = viewer.layers["prediction"].data
    assert prediction.shape == ((2, HEIGHT, WIDTH) if kind == "stack" else (HEIGHT, WIDTH))
    assert set(np.unique(prediction)) == {1, 2}
    first = prediction.reshape(-1, HEIGHT, WIDTH)[0]
    assert (first[10:60, 50:53] == 1).all()  # what was painted stays
    assert (first[10:60, 100:103] == 2).all()
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
    window, begun, wait, wide, monkeypatch, multiscale
):
    data = [wide, wide[::2, ::2]] if multiscale else wide
    viewer, widget = begun(data, multiscale=multiscale)
    widget.adapt()
    wait(widget, 60_000)
    record = widget.images.current
    viewer.scene.camera.center = (135, 155)
    viewer.scene.camera.zoom = 30
    viewer.screenshot(flash=False)  # napari finds out what is seen when it draws
    seen = record.seen(record.prediction)
    assert seen.top > 100
    assert seen.left > 125
    shown = []
    show = showing.show_parts
    monkeypatch.setattr(
        showing,
        "show_parts",
        lambda record, parts: (shown.extend(p for p, _ in parts), show(record, parts)),
    )
    widget.predict()
    wait(widget, 60_000)
    assert [(b.top, b.left) for b in shown[:1]] == [(BLOCK, BLOCK)]
    assert len(shown) == 4


def test_previews_are_of_the_part_that_is_looked_at(
    window, make_widget, paint, wait, qtbot, monkeypatch
):
    viewer = window()
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
    shown = []
    monkeypatch.setattr(showing, "show_parts", lambda _, parts: shown.extend(b for b, _ in parts))
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


def test_a_prediction_that_is_stopped_keeps_its_parts(begun, wait, wide, qtbot, monkeypatch):
    viewer, widget = begun(wide)
    widget.adapt()
    wait(widget, 60_000)
    viewer.layers["prediction"].data = np.zeros((HEIGHT, WIDTH), np.uint8)
    predict_blocks = Session.predict_blocks

    def slowly(self, planes, blocks, control, **options):
        for step in predict_blocks(self, planes, blocks, control, **options):
            yield step
            end = time.monotonic() + 20
            while isinstance(step, BlockPrediction) and not control.stopping:
                assert time.monotonic() < end
                time.sleep(0.005)

    monkeypatch.setattr(Session, "predict_blocks", slowly)
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
    # Whatever so short a round has learnt.
    showing.show(record, np.ones(record.planes_shape, np.uint8))
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
    assert uncertainty.shape == (HEIGHT, WIDTH)
    assert all(uncertainty[:BLOCK, :BLOCK].any(axis)[::8].any() for axis in (0, 1))
    assert uncertainty[BLOCK:, BLOCK:].any()
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
    block = regions.Block(0, 0, 0, 2, 3)
    labels = np.array([[merged] * 3, [removed, 1, 2]], np.uint8)
    showing.show_parts(widget.images.current, [(block, labels)])
    shown = viewer.layers["prediction"].data[:2, :3]
    assert shown.tolist() == [[2, 2, 2], [0, 1, 2]]


@pytest.fixture
def ome_zarr(wide, tmp_path):
    """The wide image as an OME-Zarr of two levels, with a channel axis of length 1."""
    path = tmp_path / "wide.zarr"
    axes = [{"name": a, "type": "channel" if a == "c" else "space"} for a in "cyx"]
    levels = [{"path": "0"}, {"path": "1"}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    zarr.create_group(path, attributes={"ome": ome})
    for name, data in (("0", wide), ("1", wide[::2, ::2])):
        made = zarr.create_array(
            path / name, shape=(1, *data.shape), dtype=data.dtype, chunks=(1, 64, 64)
        )
        made[...] = data[None]
    return path


def closed(widget):
    widget.keeper.close()
    return widget.keeper.project.folder


def test_an_ome_zarr_reopens_lazily_with_its_strokes_and_is_learnt_from_while_closed(
    begun, make_viewer, make_widget, ome_zarr, wait, saved, tmp_path, paint, halves
):
    viewer, widget = begun(ome_zarr)
    painted = viewer.layers["annotations"].data.copy()
    widget.keeper.create(tmp_path / "p")
    tifffile.imwrite(tmp_path / "other.tif", halves[:30, 30:60])
    widget.keeper.add_files([tmp_path / "other.tif"])
    closed(widget)

    viewer = make_viewer()
    widget = make_widget(viewer)
    widget.keeper.open(tmp_path / "p")
    layer = viewer.layers["wide"]
    assert layer.multiscale
    assert [(type(d), d.shape) for d in layer.data] == [
        (da.Array, (1, HEIGHT, WIDTH)),
        (da.Array, (1, HEIGHT // 2, WIDTH // 2)),
    ]
    assert (viewer.layers["annotations"].data == painted).all()
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["other"]
    paint(widget.start_annotating(), 1, 3, rows=(3, 20))
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.history.records[-1].images == ("other", "wide")
    assert widget.history.records[-1].pixels == {1: 150 + 51, 2: 150}


def test_locate_takes_a_folder_that_has_moved(
    begun, make_viewer, make_widget, ome_zarr, tmp_path, monkeypatch
):
    _, widget = begun(ome_zarr)
    widget.keeper.create(tmp_path / "p")
    closed(widget)
    (tmp_path / "b").mkdir()
    ome_zarr.rename(tmp_path / "b" / "moved.zarr")
    viewer = make_viewer()
    widget = make_widget(viewer)
    widget.keeper.open(tmp_path / "p")
    assert "is no longer at" in widget.status
    chosen = str(tmp_path / "b" / "moved.zarr")
    monkeypatch.setattr("qtpy.QtWidgets.QMessageBox.question", lambda *_: _YES)
    monkeypatch.setattr("qtpy.QtWidgets.QFileDialog.getExistingDirectory", lambda *_: chosen)
    widget.project.images.setCurrentRow(0)
    button = next(b for b in widget.project.findChildren(QPushButton) if b.text() == "Locate…")
    button.click()
    assert (viewer.layers["annotations"].data > 0).sum() == 300


def test_a_lazy_layer_without_a_file_is_said_and_keeps_its_strokes(
    begun, make_viewer, make_widget, wide, saved, tmp_path, pictures
):
    viewer, widget = begun(da.from_array(wide, chunks=50))
    saved(widget)
    assert "no file holds it" in widget.status
    widget.keeper.create(tmp_path / "p")
    assert widget.status.endswith("press Locate to show where; its strokes are kept.")
    assert (widget.keeper.entries[0].path, widget.keeper.entries[0].absolute) == ("", "")
    widget.keeper.add_files(pictures[:1])
    saved(widget)
    widget.keeper.step(1)
    assert "wide" in viewer.layers  # nothing could bring it back
    widget.keeper.step(-1)
    assert "picture0" not in viewer.layers
    closed(widget)

    viewer = make_viewer()
    widget = make_widget(viewer)
    widget.keeper.open(tmp_path / "p")
    assert "no file holds it" in widget.status
    tifffile.imwrite(tmp_path / "wide.tif", wide, tile=(64, 64))
    widget.keeper.locate("wide", tmp_path / "wide.tif")
    data = viewer.layers["wide"].data
    assert isinstance(data, da.Array)
    sent = cloudpickle.dumps(data)  # to the process that trains
    assert len(sent) < wide.nbytes / 10
    assert (np.asarray(cloudpickle.loads(sent)) == wide).all()
    assert (viewer.layers["annotations"].data > 0).sum() == 300


def test_a_file_that_holds_something_else_than_the_layer_is_no_place_for_it(
    begun, wide, ome_zarr, saved
):
    viewer, widget = begun(ome_zarr)
    assert viewer.layers["wide"].source.path == str(ome_zarr)
    viewer.layers["wide"].data = [data * 2 for data in viewer.layers["wide"].data]
    saved(widget)
    assert "no file holds it" in widget.status


@pytest.mark.parametrize("large", [True, False])
def test_a_damaged_chunk_ends_a_round_or_prediction_with_one_sentence(
    make_viewer, make_widget, paint, wait, qtbot, tmp_path, wide, monkeypatch, large
):
    if not large:
        monkeypatch.setattr(regions, "LARGE", 10**9)
    path = tmp_path / "wide.zarr"
    zarr.create_array(path, data=wide, chunks=(25, 25))
    viewer = make_viewer()
    layer = viewer.add_image(da.from_zarr(path), name="wide", contrast_limits=(0, 200))
    widget = make_widget(viewer)
    annotations = widget.start_annotating()
    paint(annotations, 1, 50)
    paint(annotations, 2, 100)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")

    layer.visible = False  # or napari reads it, too
    chunk = path / "c" / "0" / "2"
    chunk.write_bytes(chunk.read_bytes()[:50])
    failures = []
    widget.workflow.failed.connect(lambda sentence, ours: failures.append((sentence, ours)))
    for act in (widget.predict, widget.adapt):
        act()
        wait(widget)
        sentence, ours = failures.pop()
        assert not failures
        assert sentence.startswith("'wide' is damaged")
        assert ("in plane 0, rows " in sentence) == large
        assert not ours
        assert "\n" not in sentence
        assert widget.status == sentence
