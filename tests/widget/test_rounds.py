"""The history of rounds: which adapter predicts, and what a round began from."""

from __future__ import annotations

import numpy as np
import tifffile

from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import Manifest, Project


def two_rounds(widget, viewer, paint, wait, saved, folder):
    """Make a project with two rounds that predict different things."""
    widget.keeper.create(folder)
    widget.adapt()
    wait(widget)
    paint(viewer.layers["annotations"], 2, 10, rows=(60, 79), width=20)
    widget.adapt()
    wait(widget)
    saved(widget)


def prediction(folder, number):
    return tifffile.imread(folder / f"rounds/{number:03d}/predictions/halves.tif")


def test_a_prediction_is_kept_for_the_round_that_made_it(ready, paint, wait, saved, tmp_path):
    viewer, widget = ready()
    two_rounds(widget, viewer, paint, wait, saved, tmp_path / "p")
    before = prediction(tmp_path / "p", 2)
    assert (prediction(tmp_path / "p", 1) != before).any()
    widget.history.install(1)
    wait(widget)
    saved(widget)
    assert (prediction(tmp_path / "p", 2) == before).all()


def test_a_round_says_what_it_learnt_from_and_stays_selected_when_another_arrives(
    ready, paint, wait, saved, tmp_path, qtbot
):
    viewer, widget = ready()
    widget.keeper.create(tmp_path / "p")
    widget.adapt()
    wait(widget)
    saved(widget)
    table = widget.rounds.table
    learnt = "Learnt from halves: background 150 px, class 2 150 px."
    assert table.item(0, 0).toolTip().endswith(learnt)
    table.selectRow(0)
    paint(viewer.layers["annotations"], 2, 10, rows=(60, 79), width=20)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert [table.item(row, 0).text()[0] for row in range(2)] == ["2", "1"]
    assert [item.row() for item in table.selectionModel().selectedRows()] == [1]
    widget.rounds.install_button.click()
    wait(widget)
    assert widget.history.installed == 1
    # A round of another project is another round, whatever its number.
    Project.create(tmp_path / "q", Manifest(default_classes(2))).close()
    widget.keeper.open(tmp_path / "q")
    assert not widget.rounds.install_button.isEnabled()


def test_a_loaded_adapter_is_no_round_but_one_may_go_on_from_it(
    ready, paint, wait, saved, tmp_path
):
    viewer, widget = ready()
    two_rounds(widget, viewer, paint, wait, saved, tmp_path / "p")
    widget.keeper.project.rounds.adapter(1).save(tmp_path / "x.safetensors")
    before = prediction(tmp_path / "p", 2)
    widget.load_adapter(tmp_path / "x.safetensors")
    wait(widget)
    saved(widget)
    assert widget.history.installed is None
    assert (prediction(tmp_path / "p", 2) == before).all()
    widget.rounds.go_on.setChecked(True)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.history.records[-1].started_from == "a loaded adapter"
    begun = Adapter.load(tmp_path / "p/rounds/003/start.safetensors")
    loaded = Adapter.load(tmp_path / "x.safetensors")
    assert all(np.array_equal(begun.state[name], loaded.state[name]) for name in loaded.state)
    (tmp_path / "r").mkdir()
    widget.history.export_recipe(3, tmp_path / "r" / "r.json")
    assert (tmp_path / "r" / "r_start.safetensors").is_file()
    assert widget.history.installed == (3 if widget.history.records[-1].better else None)


def test_a_project_without_rounds_has_no_adapter_of_the_one_before(
    ready, paint, wait, saved, tmp_path, halves, qtbot
):
    viewer, widget = ready()
    two_rounds(widget, viewer, paint, wait, saved, tmp_path / "p")
    project = Project.create(tmp_path / "q", Manifest(default_classes(2)))
    tifffile.imwrite(tmp_path / "new.tif", np.rot90(halves).copy())
    project.add_file(tmp_path / "new.tif")
    project.close()
    widget.keeper.open(tmp_path / "q")
    wait(widget)
    assert not widget.workflow.has_adapter
    assert not widget.output.predict.isEnabled()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 60)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.status.startswith("Round 1 is done")
    assert widget.history.records[-1].reason == "Installed, as there was no adapter before."


def test_a_merged_class_stays_away_when_its_project_is_opened_again(
    ready, paint, wait, saved, tmp_path, qtbot, make_viewer, make_widget
):
    viewer, widget = ready()
    widget.table.add("third")
    paint(viewer.layers["annotations"], 3, 40)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 3)
    widget.keeper.create(tmp_path / "p")
    widget.adapt()
    wait(widget)
    widget.merge_class(3, 2)
    widget.history.install(1)
    wait(widget)
    assert [info.id for info in widget.classes] == [1, 2]
    merged = viewer.layers["prediction"].data.copy()
    saved(widget)
    widget.keeper.close()
    other = make_viewer()
    again = make_widget(other)
    again.keeper.open(tmp_path / "p")
    wait(again)
    again.predict()
    wait(again)
    assert [info.id for info in again.classes] == [1, 2]
    np.testing.assert_array_equal(other.layers["prediction"].data, merged)
