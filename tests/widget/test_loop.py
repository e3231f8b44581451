"""The whole loop, through a real viewer."""

from __future__ import annotations

import json

import numpy as np
import tifffile

from napari_convlora.labels.classes import read_classes
from napari_convlora.widget.layers import showing

ROUND = "Round {} is done"


def test_paint_adapt_correct_adapt_export_reload_predict(
    ready, paint, wait, qtbot, tmp_path, make_viewer, make_widget, halves
):
    viewer, widget = ready()
    widget.adapt()
    assert widget.running
    assert widget.run_bar.main_button.text() == "Stop"
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    assert widget.run_bar.main_button.text() == "Adapt"
    assert [step for step, _ in widget.plot.losses] == [1, 2, 3]

    prediction, annotations = viewer.layers["prediction"], viewer.layers["annotations"]
    assert prediction.editable
    assert prediction.data.shape == halves.shape
    assert set(np.unique(prediction.data)) <= {1, 2}
    painted = annotations.data > 0
    assert (prediction.data[painted] == annotations.data[painted]).all()

    # A correction, half of it over an older stroke, is part of the next round and wins.
    wrong = 3 - prediction.data[30, 40]
    paint(prediction, wrong, 40)
    paint(prediction, 2, 10, rows=(10, 12))
    widget.adapt()
    assert (annotations.data[10:60, 40:43] == wrong).all()
    assert (annotations.data[10:12, 10:13] == 2).all()
    assert (annotations.data[12:60, 10:13] == 1).all()
    wait(widget)
    assert widget.status.startswith("Round 2 is done")
    assert widget.session.rounds[1].adapter.summary["labelled_pixels"] == {
        str(i): int((annotations.data == i).sum()) for i in (1, 2)
    }
    assert (prediction.data[10:60, 40:43] == wrong).all()
    qtbot.waitUntil(lambda: widget.images.counts.pixels.get(1) == (annotations.data == 1).sum())

    widget.export_masks(tmp_path / "masks.tif")
    assert (tifffile.imread(tmp_path / "masks.tif") == prediction.data).all()
    table = json.loads((tmp_path / "classes.json").read_text())
    assert [row["name"] for row in table["classes"]] == ["background", "class 2"]
    widget.export_adapter(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size > 1000
    expected = prediction.data.copy()

    # A colleague's viewer: predicts without a label.
    other = make_viewer()
    other.add_image(halves, name="same")
    fresh = make_widget(other)
    fresh.load_adapter(tmp_path / "a.safetensors")
    wait(fresh)
    assert fresh.status.startswith("The prediction is ready")
    found = other.layers["prediction"].data
    free = annotations.data == 0
    assert (found[free] == expected[free]).all()
    assert "annotations" not in other.layers


def test_undo_after_a_round_never_writes_old_pixels(ready, paint, wait):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    prediction = viewer.layers["prediction"]
    prediction.mode = "paint"
    paint(prediction, 1, 40)
    widget.adapt()
    wait(widget)
    after = prediction.data.copy()
    prediction.undo()
    prediction.redo()
    assert (prediction.data == after).all()
    assert prediction.mode == "paint"


def test_corrections_are_one_undoable_item_of_the_annotations(ready, paint, wait):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    before = viewer.layers["annotations"].data.copy()
    prediction = viewer.layers["prediction"]
    predicted = prediction.data.copy()
    for column in (30, 50):  # painting what was predicted anyway is no correction
        paint(prediction, 3 - predicted[10, column], column)
    changed = (prediction.data != predicted).sum()
    assert widget.images.current.collect_corrections() == changed > 50
    assert (viewer.layers["annotations"].data != before).sum() == changed
    viewer.layers["annotations"].undo()
    assert (viewer.layers["annotations"].data == before).all()
    assert widget.images.current.collect_corrections() == 0


def test_previews_refresh_the_prediction_while_training(ready, wait, monkeypatch):
    _, widget = ready(max_steps=30, preview_seconds=0.05)
    written = []
    show, show_parts = showing.show, showing.show_parts
    monkeypatch.setattr(showing, "show", lambda *a: written.append(a[2:]) or show(*a))
    monkeypatch.setattr(showing, "show_parts", lambda *a: written.append("parts") or show_parts(*a))
    widget.adapt()
    wait(widget)
    assert written[0] == (0,)
    assert len(written) > 3
    assert written[-1] == "parts"  # the whole image at last


def test_nothing_is_written_in_the_middle_of_a_stroke(ready, drag, wait, qtbot):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    record, layer = widget.images.current, viewer.layers["prediction"]
    layer.mode = "paint"
    layer.brush_size = 1
    before = layer.data.copy()
    layer.selected_label = int(3 - before[30, 40])
    release = drag(layer, (30, 40), (30, 45), hold=True)
    stroke = layer.data.copy()
    assert (stroke != before).sum() > 1
    flipped = 3 - before
    assert showing.show(record, flipped, plane=0) is False  # a preview is left out
    assert showing.show(record, flipped[None]) is False  # a whole prediction waits
    assert (layer.data == stroke).all()
    release()
    free = record.painted()[0] == 0
    qtbot.waitUntil(lambda: bool((layer.data == flipped)[free & (stroke == before)].all()))
    # The stroke itself has become an annotation, and the whole of it is one undo item.
    painted = viewer.layers["annotations"]
    assert (painted.data[stroke != before] == stroke[stroke != before]).all()
    painted.undo()
    assert (painted.data > 0).sum() == 300


def test_other_annotated_images_are_learnt_from_too(ready, paint, wait, halves):
    viewer, widget = ready()
    viewer.add_image(halves[:, ::-1].copy(), name="mirrored")
    viewer.add_image(np.stack([halves] * 3, -1).clip(0, 255).astype(np.uint8), name="colour")
    for name in ("colour", "mirrored"):
        widget.source.image_combo.value = viewer.layers[name]
        layer = widget.start_annotating()
        paint(layer, 2, 20)
    assert "annotations of mirrored" in viewer.layers
    widget.adapt()
    wait(widget)
    pixels = widget.session.rounds[0].adapter.summary["labelled_pixels"]
    assert pixels == {"1": 150, "2": 300}  # the colour image has other channels
    assert "prediction" in viewer.layers
    # Back on the first image its own annotations are there still.
    widget.source.image_combo.value = viewer.layers["halves"]
    assert widget.source.annotations_combo.value == viewer.layers["annotations"]
    widget.predict()
    wait(widget)
    assert "prediction of halves" in viewer.layers


def test_a_second_export_renames_no_older_masks_and_says_where_its_names_are(ready, wait, tmp_path):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    widget.export_masks(tmp_path / "first.tif")
    assert widget.status.endswith("class names to classes.json beside it.")
    before = (tmp_path / "classes.json").read_bytes()
    widget.table.rename(2, "nucleus")
    widget.export_masks(tmp_path / "second.png")
    assert widget.status == (
        "Masks written to second.png, class names to second.png.classes.json beside it, which "
        "counts before the classes.json of other masks there."
    )
    assert (tmp_path / "classes.json").read_bytes() == before
    names = [c.name for c in read_classes(tmp_path / "second.png.classes.json")]
    assert names == ["background", "nucleus"]


def test_an_adapter_of_an_earlier_version_is_remarked_on_and_a_damaged_one_refused(
    ready, wait, tmp_path, capsys
):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    said = []
    widget.workflow.failed.connect(lambda sentence, ours: said.append(sentence))
    path = tmp_path / "a.safetensors"
    widget.export_adapter(path)
    widget.load_adapter(path)
    wait(widget)
    assert said == []
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    widget.load_adapter(path)
    wait(widget)
    assert "its SHA-256 differs" in said.pop()
    path.write_bytes(content.replace(b"napari_convlora_sha256", b"napari_convlora_sha255"))
    widget.load_adapter(path)
    wait(widget)
    assert said.pop().startswith("a.safetensors holds no SHA-256")
    assert widget.status.startswith("The prediction is ready")
