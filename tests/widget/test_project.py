"""Projects in the window: several images, autosave, rounds, recovery."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from qtpy.QtWidgets import QMessageBox, QPushButton

from napari_convlora.cli import commands, parser
from napari_convlora.errors import InputError
from napari_convlora.labels.reviewed import inside_outlines
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import Project, label_files
from napari_convlora.widget import dialogs
from napari_convlora.widget.autosave.image_list import ImageList
from napari_convlora.widget.autosave.image_work import ImageWork
from napari_convlora.widget.autosave.project_keeper import ProjectKeeper
from napari_convlora.widget.autosave.round_history import RoundHistory
from napari_convlora.widget.autosave.saving import Autosave
from napari_convlora.widget.layers import showing
from napari_convlora.widget.layers.image_layers import ImageLayers

_YES = QMessageBox.StandardButton.Yes


def test_images_of_a_project_remember_strokes_and_prediction(
    window, started, paint, wait, qtbot, saved, tmp_path, make_viewer, make_widget
):
    viewer, widget = started()
    assert [layer.name for layer in viewer.layers] == ["picture0"]
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    wait(widget)
    prediction = viewer.layers["prediction"].data.copy()
    painted = layer.data.copy()

    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["picture1"]
    paint(widget.start_annotating(), 2, 30)
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["picture2"]
    widget.keeper.step(-2)
    assert (viewer.layers["annotations"].data == painted).all()
    assert (viewer.layers["prediction"].data == prediction).all()
    saved(widget)
    rows = [widget.project.images.item(i).text() for i in range(3)]
    assert rows == [
        "✎● picture0  (background 150, class 2 150)",
        "✎ picture1  (class 2 150)",
        "· picture2",
    ]

    # Every image of the project is learnt from, whether it is open or not.
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.history.records[-1].pixels == {1: 150, 2: 300}
    assert widget.history.records[-1].images == ("picture0", "picture1")
    keeper = widget.keeper
    viewer.window.remove_dock_widget(widget)
    widget.deleteLater()
    qtbot.waitUntil(lambda: keeper.closed)

    other = make_viewer()
    fresh = make_widget(other)
    fresh.keeper.open(tmp_path / "p")
    wait(fresh)
    assert [layer.name for layer in other.layers] == ["picture0", "prediction", "annotations"]
    assert (other.layers["annotations"].data == painted).all()
    assert fresh.workflow.has_adapter
    assert [c.name for c in fresh.classes] == ["background", "class 2"]
    assert fresh.rounds.table.rowCount() == 2
    fresh.keeper.step(1)
    assert (other.layers["annotations"].data > 0).sum() == 150


def test_images_of_one_name_are_learnt_from_and_told_apart(
    started, paint, wait, saved, pictures, tmp_path
):
    _, widget = started()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cells.tif").write_bytes(pictures[0].read_bytes())
    widget.keeper.add_files([tmp_path / folder / "cells.tif" for folder in ("a", "b")])
    saved(widget)
    for stem, first in (("cells", 10), ("cells_2", 20)):
        widget.keeper.show_image(stem)
        layer = widget.start_annotating()
        paint(layer, 1, first)
        paint(layer, 2, 70)
    saved(widget)
    rows = [widget.project.images.item(i).text().split("  ")[0] for i in range(5)]
    assert rows[3:] == ["✎ cells", "✎ cells (2)"]
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.history.records[-1].pixels == {1: 300, 2: 300}
    assert set(widget.history.records[-1].images) == {"cells", "cells_2"}


def test_every_image_is_looked_at_as_before(started, saved, tmp_path, make_viewer, make_widget):
    viewer, widget = started()
    tifffile.imwrite(tmp_path / "stack.tif", np.random.default_rng(0).random((5, 80, 90)))
    widget.keeper.add_files([tmp_path / "stack.tif"])
    saved(widget)

    def look(plane, center, zoom, contrast):
        viewer.dims.set_current_step(0, plane)
        viewer.scene.camera.center, viewer.scene.camera.zoom = center, zoom
        widget.images.current.image.contrast_limits = contrast

    def looked(viewer, widget):
        camera, image = viewer.scene.camera, widget.images.current.image
        plane = viewer.dims.current_step[0] if viewer.dims.ndim == 3 else 0
        return plane, camera.center, camera.zoom, tuple(image.contrast_limits)

    stack, flat = (3, (0, 20, 30), 7.5, (0.25, 0.5)), (0, (0, 50, 60), 3.0, (40, 120))
    widget.keeper.step(3)
    look(*stack)
    widget.keeper.step(-3)
    look(*flat)
    widget.keeper.step(3)
    assert looked(viewer, widget) == stack
    widget.keeper.step(-3)
    assert looked(viewer, widget) == flat
    widget.keeper.step(3)
    widget.keeper.close()

    other = make_viewer()
    fresh = make_widget(other)
    fresh.keeper.open(tmp_path / "p")
    assert looked(other, fresh) == stack


def test_the_class_and_the_brush_go_along_to_another_image(started):
    viewer, widget = started()
    layer = widget.start_annotating()
    brush = layer.brush_size
    widget.table.select(2)
    widget.keeper.step(1)
    widget.start_annotating()
    widget.keeper.step(-1)
    again = viewer.layers["annotations"]
    assert (again.selected_label, again.brush_size) == (2, brush)
    assert widget.table.current == 2


def test_settings_are_saved_without_a_stroke(started, qtbot):
    _, widget = started()
    widget.settings.max_steps.value = 17
    widget.automatic.setChecked(True)
    project = widget.keeper.project
    qtbot.waitUntil(lambda: project.manifest.settings.train.max_steps == 17, timeout=20_000)
    assert project.manifest.automatic
    widget.table.add("stem")
    qtbot.waitUntil(lambda: len(project.manifest.classes) == 3, timeout=20_000)


_CRASHES = """
import os, sys
import numpy as np, napari
from napari_convlora.widget import ConvLoRAWidget
from napari_convlora.session.session import Session
from napari_convlora.backbones.testing import random_backbone
viewer = napari.Viewer(show=False)
viewer.add_image(np.random.default_rng(0).random((80, 90)), name="unsaved")
widget = ConvLoRAWidget(viewer, Session(_backbone=("litemedsam", random_backbone())))
viewer.window.add_dock_widget(widget)
layer = widget.start_annotating()
layer.data_setitem(tuple(np.mgrid[10:60, 10:13].reshape(2, -1)), 1)
layer.data_setitem(tuple(np.mgrid[10:60, 70:73].reshape(2, -1)), 2)
widget.reviewed.complete_plane()
import time
from qtpy.QtWidgets import QApplication
end = time.monotonic() + 60
while time.monotonic() < end:
    QApplication.processEvents()
    project = widget.keeper.project
    if project is not None and project.manifest.images and project.manifest.images[0].regions:
        break
os.kill(os.getpid(), 9)
"""


def test_strokes_survive_a_kill_and_are_offered_again(
    make_viewer, make_widget, wait, recovery_folder
):
    done = subprocess.run([sys.executable, "-c", _CRASHES], check=False)
    assert done.returncode == -9
    viewer = make_viewer()
    widget = make_widget(viewer)
    assert not widget.offer.isHidden()
    assert widget.offer.sentence.text().startswith("Napari ended unexpectedly on ")
    assert widget.offer.sentence.text().endswith(
        ": 300 painted pixels, 1 reviewed region on 1 image."
    )
    widget.offer.recover_button.click()
    assert widget.offer.isHidden()
    painted = viewer.layers["annotations"].data
    assert (painted[10:60, 10:13] == 1).all()
    assert (painted > 0).sum() == 300
    assert len(viewer.layers["reviewed"].data) == 1
    assert (viewer.layers["unsaved"].data == np.random.default_rng(0).random((80, 90))).all()
    assert [f.name for f in recovery_folder.iterdir()] == [widget.keeper.project.folder.name]


def test_a_session_without_strokes_leaves_nothing_behind(
    make_viewer, make_widget, halves, recovery_folder
):
    viewer = make_viewer()
    viewer.add_image(halves)
    widget = make_widget(viewer)
    widget.start_annotating()
    widget.keeper.save()
    widget.keeper.close()
    assert not recovery_folder.exists()


def test_unsaved_strokes_are_offered_after_a_clean_close_until_discarded(
    ready, make_widget, recovery_folder
):
    viewer, widget = ready()
    widget.keeper.close()
    again = make_widget(viewer)
    assert again.offer.sentence.text().startswith("Napari was closed without saving on ")
    again.offer.discard_button.click()
    assert again.offer.isHidden()
    again.keeper.close()  # its layers are still open, so that it has kept them anew
    assert len(list(recovery_folder.iterdir())) == 1


def test_what_another_window_has_recovered_is_not_discarded(ready, make_widget, recovery_folder):
    viewer, widget = ready()
    widget.keeper.close()
    again = make_widget(viewer)
    (folder,) = recovery_folder.iterdir()
    code = "import sys, pathlib, napari_convlora.project as p\n"
    code += "p.Project.open(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        again.offer.discard_button.click()
        assert folder.exists()
        other.communicate(b"\n")


def test_a_project_that_is_open_elsewhere_opens_if_the_user_wants_to(
    started, tmp_path, monkeypatch
):
    _, widget = started()
    Project.create(tmp_path / "other").close()
    elsewhere = Project.open(tmp_path / "other")
    asked, answers = [], [QMessageBox.StandardButton.No, _YES]
    monkeypatch.setattr(
        dialogs.QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path / "other")
    )
    monkeypatch.setattr(QMessageBox, "question", lambda *a: (asked.append(a[2]), answers.pop(0))[1])
    buttons = {b.text(): b for b in widget.project.findChildren(QPushButton)}
    buttons["Open…"].click()
    assert "is open in another window or command" in asked[0]
    assert "Open it anyway?" in asked[0]
    assert widget.keeper.project.folder == tmp_path / "p"
    buttons["Open…"].click()
    assert widget.keeper.project.folder == tmp_path / "other"
    buttons["Open…"].click()  # of what is open here nothing is asked
    assert widget.status.startswith("This project is open already")
    assert len(asked) == 2
    elsewhere.close()


def test_saving_as_a_project_leaves_no_recovery_behind(ready, saved, tmp_path, recovery_folder):
    _, widget = ready()
    saved(widget)
    assert len(list(recovery_folder.iterdir())) == 1
    widget.keeper.create(tmp_path / "p")
    widget.keeper.close()
    assert list(recovery_folder.iterdir()) == []
    project = Project.open(tmp_path / "p")
    assert (project.annotations("halves")[0] > 0).sum() == 300
    assert project.entry("halves").read(project.folder).shape == (1, 80, 90, 1)


def test_rolling_back_installs_the_chosen_round(ready, wait, saved):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    first = widget.session.rounds[0].adapter.state
    widget.adapt()
    wait(widget)
    saved(widget)
    rounds = widget.rounds.table
    assert [rounds.item(row, 0).text() for row in range(2)] == ["2 ✓", "1"]
    assert "training" in rounds.item(0, 1).text()
    rounds.selectRow(1)
    widget.rounds.install_button.click()
    wait(widget)
    saved(widget)
    assert [rounds.item(row, 0).text() for row in range(2)] == ["2", "1 ✓"]
    assert all((widget.session.installed.state[k] == v).all() for k, v in first.items())
    assert widget.status.startswith("The prediction is ready")


def test_another_projects_adapter_does_not_stay_where_this_ones_is_damaged(
    ready, wait, saved, tmp_path
):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    saved(widget)
    other = tmp_path / "other"
    shutil.copytree(widget.keeper.project.folder, other)
    (other / "rounds" / "001" / "adapter.safetensors").write_bytes(b"damaged")
    widget.keeper.open(other)
    wait(widget)
    assert "export the adapter again" in widget.status
    assert widget.session.installed is None
    assert not widget.workflow.has_adapter


def test_a_worse_round_is_not_installed_and_says_so(ready, wait, saved, monkeypatch):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    first = widget.session.installed
    compared = {"installed": 0.9, "new": 0.4, "pixels": 320}
    monkeypatch.setattr("napari_convlora.training.loop.compare", lambda *_: compared)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert "Round 2 is done" in widget.status
    assert "Kept but not installed, as it scores 0.40 on 320 held-out pixels" in widget.status
    assert widget.session.installed is first
    assert [r.better for r in widget.history.records] == [True, False]
    assert widget.history.installed == 1
    assert [widget.rounds.table.item(row, 0).text() for row in range(2)] == ["2", "1 ✓"]


def test_the_next_round_goes_on_from_the_installed_one_if_asked(ready, wait, saved, tmp_path):
    _, widget = ready()
    widget.adapt()
    wait(widget)
    widget.rounds.go_on.setChecked(True)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert [r.started_from for r in widget.history.records] == ["base", "round 1"]
    widget.history.export_recipe(2, tmp_path / "mine.json")
    assert "adapt --recipe mine.json" in widget.status
    assert (tmp_path / "mine_start.safetensors").exists()
    widget.keeper.create(tmp_path / "p")
    widget.keeper.close()
    assert Project.open(tmp_path / "p").manifest.settings.train.start == "installed"


def test_the_next_image_is_annotated_while_a_round_goes_on(started, paint, wait, qtbot, saved):
    viewer, widget = started()
    widget.settings.max_steps.value = 5000
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
    widget.adapt()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > 1, timeout=20_000)
    widget.keeper.step(1)
    steps = len(widget.plot.losses)
    paint(widget.start_annotating(), 2, 30)
    qtbot.waitUntil(lambda: len(widget.plot.losses) > steps, timeout=20_000)
    widget.stop()
    wait(widget)
    assert widget.status.endswith("Press Predict to see what it makes of this image.")
    assert [layer.name for layer in viewer.layers] == ["picture1", "annotations"]
    saved(widget)
    (record,) = widget.history.records
    assert record.images == ("picture0",)
    assert record.pixels == {1: 150, 2: 150}
    assert widget.history.installed == 1
    widget.predict()
    wait(widget)
    assert viewer.layers["prediction"].data.all()


def test_the_windows_recipe_repeats_its_round_bit_for_bit(
    started, paint, wait, saved, tmp_path, monkeypatch, make_session
):
    _, widget = started()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    widget.keeper.step(1)  # learnt from one image, while another without a stroke is open
    widget.adapt()
    widget.settings.max_steps.value = 99  # of the next round
    wait(widget)
    saved(widget)
    assert widget.history.records[0].images == ("picture1", "picture0")
    recipe, out = tmp_path / "mine.json", tmp_path / "again.safetensors"
    widget.history.export_recipe(1, recipe)
    backbone = make_session().backbone()
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    assert parser.main(["adapt", "--recipe", str(recipe), "--out", str(out)]) == commands.DONE
    again, first = Adapter.load(out).state, widget.session.rounds[0].adapter.state
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_layers_made_from_a_prediction_go_with_their_image(started):
    viewer, widget = started()
    record = widget.images.need()
    labels = np.ones(record.planes_shape, np.uint8)
    showing.show(record, labels)
    showing.keep_previous(record)
    record.extra.show_uncertainty(labels)
    record.extra.show_instances(labels.astype(np.int32), {})
    assert {"previous prediction", "uncertainty", "instances"} <= {n.name for n in viewer.layers}
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["instances", "picture1"]
    assert not viewer.layers["instances"].visible  # they may have been edited


def test_reviewed_regions_go_with_their_image(
    started, paint, wait, saved, tmp_path, monkeypatch, make_session
):
    viewer, widget = started()
    paint(widget.start_annotating(), 2, 70)
    widget.reviewed.complete_plane()
    record = widget.images.current
    viewer.layers["reviewed"].add_ellipses([[9.3, 5.1], [9.3, 20], [30, 20], [30, 5.1]])
    before = inside_outlines(record.planes_shape, record.outlines())
    exact = [v.tolist() for _, v in record.outlines()]
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["picture1"]
    paint(widget.start_annotating(), 1, 10)
    saved(widget)
    rows = [widget.project.images.item(i).text() for i in range(2)]
    assert rows == ["✎ picture0  (class 2 150, 2 reviewed)", "✎ picture1  (background 150)"]

    widget.adapt()  # learns from the image that is not open as well
    wait(widget)
    saved(widget)
    assert widget.history.records[0].pixels == {1: 150 + 7200 - 150, 2: 150}
    widget.history.export_recipe(1, tmp_path / "mine.json")
    backbone = make_session().backbone()
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    command = ["adapt", "--recipe", str(tmp_path / "mine.json"), "--out", str(tmp_path / "a")]
    assert parser.main(command) == 0
    again, first = Adapter.load(tmp_path / "a").state, widget.session.rounds[0].adapter.state
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    widget.keeper.step(-1)
    assert viewer.layers.selection.active == viewer.layers["annotations"]
    record = widget.images.current
    assert [v.tolist() for _, v in record.outlines()] == exact
    assert (inside_outlines(record.planes_shape, record.outlines()) == before).all()
    widget.reviewed.complete_plane()
    assert widget.status.startswith("This plane is marked as complete already;")
    viewer.layers["reviewed"].data = viewer.layers["reviewed"].data[:1]
    saved(widget)
    assert widget.keeper.entries[0].regions == 1
    paint(viewer.layers["annotations"], 2, 30)
    viewer.layers.clear()  # as napari does when it closes: nobody meant to take them away
    saved(widget)
    saved(widget)
    assert widget.keeper.entries[0].counts == {2: 300}
    assert widget.keeper.entries[0].regions == 1
    assert widget.keeper.project.regions("picture0")[0][0][1].tolist() == exact[0]


def test_a_layer_of_regions_that_was_removed_stays_away(started, saved, qtbot):
    viewer, widget = started()
    widget.reviewed.complete_plane()  # nothing else is annotated, and need not be
    saved(widget)
    assert widget.keeper.entries[0].regions == 1
    viewer.layers.remove("reviewed")
    qtbot.waitUntil(lambda: (saved(widget), widget.keeper.entries[0].regions == 0)[1])
    widget.keeper.step(1)
    widget.keeper.step(-1)
    assert "reviewed" not in viewer.layers


def test_later_corrections_are_scored(ready, paint, wait, saved):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    prediction = viewer.layers["prediction"]
    paint(prediction, 3 - prediction.data[30, 40], 40, rows=(30, 31), width=1)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.history.curve[1].pixels == 1
    assert widget.history.curve[1].accuracy == 0
    assert widget.rounds.table.item(1, 4).text() == "0% of 1"
    assert widget.rounds.plot.later == [(1, 0.0)]
    assert [number for number, _ in widget.rounds.plot.scores] == [1, 2]
    assert not widget.rounds.plot.isHidden()
    assert "score" in [curve.label for curve in widget.rounds.plot.curves()]


def test_a_correction_without_annotations_goes_with_its_image(started, paint, wait, saved):
    viewer, widget = started()
    widget.images.restore(None, np.ones((1, 80, 90), np.uint8))
    paint(viewer.layers["prediction"], 2, 40)
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["picture1"]
    widget.keeper.step(-1)
    assert (viewer.layers["annotations"].data == 2).sum() == 150


def test_what_was_rejected_stays_away_when_its_image_comes_back(started, paint, saved):
    viewer, widget = started()
    paint(widget.start_annotating(), 1, 5)
    saved(widget)
    widget.images.restore(None, np.ones((1, 80, 90), np.uint8))
    mask = np.zeros((1, 80, 90), bool)
    mask[0, 40:60, 40:60] = True
    widget.review.take.pixels(False, mask, 0)
    mask[0, 40:50] = False
    widget.review.take.pixels(False, ~mask & (np.arange(80) < 2)[:, None], 0)
    viewer.layers["prediction"].undo()
    widget.keeper.step(1)
    widget.keeper.step(-1)
    assert (viewer.layers["prediction"].data == 0).sum() == 20 * 20


def test_the_latest_stroke_wins_over_a_correction_before_it(started, paint, saved):
    viewer, widget = started()
    widget.start_annotating()
    widget.images.restore(None, np.ones((1, 80, 90), np.uint8))
    viewer.layers.selection.active = viewer.layers["prediction"]
    paint(viewer.layers["prediction"], 2, 40)
    viewer.layers.selection.active = viewer.layers["annotations"]
    paint(viewer.layers["annotations"], 1, 40)
    saved(widget)
    assert widget.keeper.entries[0].counts == {1: 150}


def test_a_missing_image_is_said_and_located(started, pictures, tmp_path, paint):
    viewer, widget = started()
    paint(widget.start_annotating(), 1, 10)
    pictures[1].rename(tmp_path / "moved.tif")
    widget.project.images.itemClicked.emit(widget.project.images.item(1))
    assert "is no longer at" in widget.status
    assert [layer.name for layer in viewer.layers] == ["picture0", "annotations"]
    widget.keeper.locate("picture1", tmp_path / "moved.tif")
    assert [layer.name for layer in viewer.layers] == ["picture1"]


def test_a_round_goes_on_without_an_image_that_is_missing(
    started, pictures, paint, wait, saved, qtbot
):
    _, widget = started()
    said = []
    widget.workflow.failed.connect(lambda sentence, ours: said.append(sentence))
    paint(widget.start_annotating(), 1, 10)
    widget.keeper.step(1)
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    pictures[0].unlink()
    widget.adapt()
    wait(widget)
    saved(widget)
    assert widget.status.startswith("Round 1 is done")
    assert widget.history.records[0].images == ("picture1",)
    (sentence,) = said
    assert sentence.startswith("The round goes on without 'picture0', not found on disk; ")
    assert "Locate" in sentence


@pytest.fixture
def lost(started, paint, saved, qtbot, tmp_path):
    """A window whose project has strokes on two images; the first one's file is gone."""

    def make(older=False):
        viewer, widget = started()
        paint(widget.start_annotating(), 1, 10)
        saved(widget)
        if older:
            label_files.keep_version(tmp_path / "p" / "annotations" / "picture0.tif")
        widget.keeper.step(1)
        layer = widget.start_annotating()
        paint(layer, 1, 10)
        paint(layer, 2, 70)
        saved(widget)
        qtbot.waitUntil(lambda: len(widget.images.counts.pixels) == 2)
        (tmp_path / "p" / "annotations" / "picture0.tif").unlink()
        return viewer, widget

    return make


@pytest.fixture
def asked(monkeypatch):
    """Questions that were asked; what is put into the second list is answered."""
    questions, answers = [], []
    monkeypatch.setattr(
        QMessageBox, "question", lambda *a: (questions.append(a[2]), answers.pop(0))[1]
    )
    return questions, answers


def test_annotations_of_closed_images_are_read_while_the_window_answers(
    lost, asked, wait, monkeypatch, qtbot
):
    viewer, widget = lost(older=True)
    threads, go_on = [], threading.Event()
    read = Project.annotated

    def slowly(project, stem):
        threads.append(threading.current_thread())
        assert go_on.wait(20)
        return read(project, stem)

    monkeypatch.setattr(Project, "annotated", slowly)
    widget.adapt()  # would hang here
    assert widget.running
    assert widget.run_bar.main_button.text() == "Stop"
    qtbot.waitUntil(lambda: bool(threads))
    assert threading.main_thread() not in threads
    widget.stop()
    go_on.set()
    wait(widget)
    assert widget.status == "Stopped; nothing has changed."
    assert not widget.history.records
    assert asked[0] == []
    assert "prediction" not in viewer.layers


def test_a_round_goes_on_when_its_image_is_left_while_others_are_read(
    started, paint, saved, wait, monkeypatch, qtbot
):
    _, widget = started()
    paint(widget.start_annotating(), 1, 10)
    widget.keeper.step(1)
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    saved(widget)
    go_on, read = threading.Event(), Project.annotated
    monkeypatch.setattr(Project, "annotated", lambda *a: go_on.wait(20) and read(*a))
    widget.adapt()
    widget.keeper.step(1)
    assert widget.keeper.current == "picture2"
    go_on.set()
    wait(widget)
    saved(widget)
    assert set(widget.history.records[0].images) == {"picture0", "picture1"}
    assert widget.status.endswith("Press Predict to see what it makes of this image.")


def test_a_round_waits_for_an_answer_where_labels_are_lost(lost, asked, wait, saved):
    _, widget = lost()
    questions, answers = asked
    answers.extend([QMessageBox.StandardButton.No, _YES])
    widget.run_bar.adapt_pressed.emit()
    wait(widget)
    assert "'picture0' (annotations/picture0.tif) are gone" in questions[0]
    assert "'picture0' (annotations/picture0.tif) are gone" in widget.status
    widget.run_bar.adapt_pressed.emit()
    wait(widget)
    saved(widget)
    assert len(questions) == 2
    assert widget.history.records[0].images == ("picture1",)
    assert widget.keeper.project.entry("picture0").counts == {1: 150}


def test_an_automatic_round_does_not_ask_about_lost_labels(lost, asked, paint, qtbot):
    viewer, widget = lost()
    widget.automatic.setChecked(True)
    widget.automatic._soon.setInterval(10)
    paint(viewer.layers["annotations"], 1, 30)
    qtbot.waitUntil(lambda: "Automatic rounds are paused" in widget.status)
    assert "annotations/picture0.tif" in widget.status
    assert not widget.running
    assert asked[0] == []


def test_lost_labels_are_not_forgotten_when_their_image_is_opened(
    lost, asked, saved, wait, paint, tmp_path
):
    _, widget = lost()
    path = tmp_path / "p" / "annotations" / "picture0.tif"
    widget.keeper.step(-1)
    assert "annotations/picture0.tif" in widget.status
    widget.start_annotating()
    saved(widget)
    assert not path.exists()
    asked[1].append(QMessageBox.StandardButton.No)
    widget.adapt()
    wait(widget)
    widget.keeper.step(1)
    saved(widget)
    assert widget.keeper.project.entry("picture0").counts == {1: 150}
    assert not path.exists()
    widget.keeper.step(-1)
    paint(widget.start_annotating(), 2, 30)  # what is painted anew counts
    saved(widget)
    assert widget.keeper.project.entry("picture0").counts == {2: 150}


def test_regions_without_their_labels_write_no_empty_mask(
    started, paint, saved, tmp_path, make_viewer, make_widget
):
    _, widget = started()
    paint(widget.start_annotating(), 1, 10)
    widget.reviewed.complete_plane()
    saved(widget)
    widget.keeper.close()
    (tmp_path / "p" / "annotations" / "picture0.tif").unlink()
    other = make_widget(make_viewer())
    other.keeper.open(tmp_path / "p")
    saved(other)
    other.keeper.step(1)
    saved(other)
    assert other.keeper.project.entry("picture0").counts == {1: 150}
    assert not (tmp_path / "p" / "annotations" / "picture0.tif").exists()


def test_an_older_version_takes_the_place_of_what_is_lost_once_it_is_looked_at(
    lost, asked, saved, wait, tmp_path
):
    viewer, widget = lost(older=True)
    asked[1].append(QMessageBox.StandardButton.No)
    widget.adapt()
    wait(widget)
    assert "annotations/versions" in asked[0][0]
    widget.keeper.step(-1)
    assert "an older version" in widget.status
    assert (viewer.layers["annotations"].data == 1).sum() == 150
    saved(widget)
    assert (tmp_path / "p" / "annotations" / "picture0.tif").exists()
    widget.adapt()
    wait(widget)
    saved(widget)
    assert set(widget.history.records[0].images) == {"picture0", "picture1"}
    assert len(asked[0]) == 1


def test_an_image_is_removed_with_its_strokes_and_its_rounds_stay(
    started, pictures, paint, wait, saved, monkeypatch
):
    viewer, widget = started()
    asked, failed = [], []
    monkeypatch.setattr(
        "qtpy.QtWidgets.QMessageBox.question", lambda *a: asked.append(a[2]) or _YES
    )
    widget.keeper.failed.connect(failed.append)
    remove = next(b for b in widget.project.findChildren(QPushButton) if b.text() == "Remove…")
    for i in range(2):
        layer = widget.start_annotating()
        paint(layer, 1, 10)
        paint(layer, 2, 70)
        widget.keeper.step(1 - i)
    widget.adapt()
    wait(widget)
    saved(widget)
    widget.keeper.step(-1)
    widget.project.images.setCurrentRow(0)
    remove.click()
    assert asked == [
        "Remove 'picture0' and its 300 painted pixels from the project? The image file and all "
        "rounds stay; Undo does not bring the strokes back."
    ]
    assert [e.stem for e in widget.keeper.entries] == ["picture1", "picture2"]
    assert "picture0" not in viewer.layers
    assert widget.keeper.current == "picture1"
    folder = widget.keeper.project.folder / "annotations"
    assert not (folder / "picture0.tif").exists()
    newest = max((folder / "versions").glob("picture0.*.tif"))
    assert (tifffile.imread(newest) > 0).sum() == 300

    pictures[2].unlink()  # one that is missing can be removed as well
    widget.project.images.setCurrentRow(1)
    remove.click()
    paint(widget.start_annotating(), 1, 30)
    widget.adapt()
    wait(widget)
    saved(widget)
    assert [r.images for r in widget.history.records] == [("picture1", "picture0"), ("picture1",)]
    widget.keeper.add_files(pictures[:1])
    saved(widget)
    widget.keeper.step(1)
    assert [layer.name for layer in viewer.layers] == ["picture0"]  # and no strokes of before
    assert widget.keeper.current == "picture0_2"
    assert not failed


def test_an_image_that_was_removed_finds_its_strokes_again(
    started, paint, saved, pictures, tmp_path
):
    viewer, widget = started()
    paint(widget.start_annotating(), 1, 10)
    saved(widget)
    data = viewer.layers["picture0"].data
    viewer.layers.remove("picture0")
    paint(viewer.layers["annotations"], 2, 50)  # somebody goes on painting
    viewer.add_image(data, name="picture0")
    saved(widget)
    assert [e.stem for e in widget.keeper.entries] == ["picture0", "picture1", "picture2"]
    assert widget.keeper.entries[0].counts == {1: 150, 2: 150}


def test_opening_a_project_keeps_what_was_painted_before(
    ready, saved, make_widget, tmp_path, recovery_folder
):
    viewer, widget = ready()
    Project.create(tmp_path / "other").close()
    widget.keeper.open(tmp_path / "other")
    assert widget.status.startswith("What was painted before is kept aside")
    assert len(viewer.layers) == 0
    widget.keeper.close()
    assert Project.open(tmp_path / "other").manifest.images == ()
    again = make_widget(viewer)
    again.offer.recover_button.click()
    assert (viewer.layers["annotations"].data > 0).sum() == 300


def test_where_nothing_is_uncertain_any_more_next_names_the_image_that_follows(
    started, paint, wait
):
    _, widget = started()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    widget.adapt()
    wait(widget)
    for _ in range(100):
        widget.review.next_place()
        wait(widget)
        if "Nothing else" in widget.status:
            break
    assert "Press N again to open 'picture1', the next image of the project" in widget.status


def test_a_window_that_is_closed_comes_back_with_the_image_that_was_worked_on(
    window, started, qtbot, tmp_path
):
    viewer, widget = started()
    widget.keeper.step(1)
    keeper = widget.keeper
    viewer.close()  # takes the layers away first
    qtbot.waitUntil(lambda: keeper.closed)
    assert Project.open(tmp_path / "p").manifest.current == "picture1"


def test_a_class_of_an_image_that_is_not_open_stays_in_the_table(started, paint, wait, tmp_path):
    _, widget = started()
    (tmp_path / "two.json").write_text('{"1": "soil", "2": "leaf"}')
    third = widget.table.add("stem").id
    paint(widget.start_annotating(), third, 10)
    widget.keeper.step(1)
    paint(widget.start_annotating(), 2, 70)
    widget.load_classes(tmp_path / "two.json")
    assert [c.name for c in widget.classes] == ["soil", "leaf", "stem"]
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")


def test_a_full_disk_is_said_and_the_next_autosave_catches_up(
    started, paint, saved, monkeypatch, tmp_path
):
    _, widget = started()

    def full(*_):
        raise InputError("The disk is full; free some space.")

    with monkeypatch.context() as broken:
        broken.setattr(widget.keeper.project, "keep_annotations", full)
        paint(widget.start_annotating(), 1, 10)
        saved(widget)
        assert widget.status == "The disk is full; free some space."
        saved(widget)
        with pytest.raises(InputError, match="disk is full"):  # its strokes are nowhere else
            widget.keeper.step(1)
        assert widget.keeper.current == "picture0"
    saved(widget)
    assert (widget.keeper.project.annotations("picture0")[0] == 1).sum() == 150


def test_only_what_changed_is_written(started, paint, saved, monkeypatch):
    _, widget = started()
    written = []
    project = widget.keeper.project
    keep = project.keep_annotations
    monkeypatch.setattr(
        project, "keep_annotations", lambda stem, *what: (written.append(stem), keep(stem, *what))
    )
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    widget.reviewed.complete_plane()
    saved(widget)
    layer.refresh()  # tells everybody of a change where there is none
    saved(widget)
    widget.keeper.step(1)
    widget.keeper.step(-1)
    saved(widget)
    assert written == ["picture0"]


def test_twenty_images_reopen_within_seconds(make_viewer, make_widget, tmp_path, halves):
    project = Project.create(tmp_path / "p")
    painted = np.zeros((1, *halves.shape), int)
    painted[0, 10:60, 10:13] = 1
    for i in range(20):
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", halves)
        own = project.add_file(tmp_path / f"{i:02d}.tif")
        project.keep_annotations(own.stem, painted)
        project.keep_prediction(own.stem, painted + 1)
    project.update(lambda m: replace(m, current="07"))
    project.close()
    viewer = make_viewer()
    widget = make_widget(viewer)
    begun = time.perf_counter()
    widget.keeper.open(tmp_path / "p")
    assert time.perf_counter() - begun < 5
    assert [layer.name for layer in viewer.layers] == ["07", "prediction", "annotations"]
    assert widget.project.images.count() == 20
    assert widget.project.images.currentRow() == 7
    assert (viewer.layers["annotations"].data == painted[0]).all()


def test_a_round_that_finds_no_room_is_kept_and_written_when_there_is_some(
    started, paint, wait, saved, qtbot, monkeypatch, tmp_path
):
    _, widget = started()
    said = []
    widget.keeper.failed.connect(said.append)
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    saved(widget)
    replace_file = os.replace

    def full(source, target):
        if Path(target).name == "adapter.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", full)
        broken.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10_000))
        widget.adapt()
        wait(widget)
        saved(widget)
        first, second = said
        assert f"'{tmp_path / 'p'}' has 0.0 MB free" in first
        assert first.endswith("until then the round is in memory only.")
        assert "the disk is full" in second
        assert widget.history.records == []
        assert widget.workflow.has_adapter
        for _ in range(2):
            saved(widget)
        assert len(said) == 2  # a full disk is not news at every try
        with pytest.raises(InputError, match="press Export adapter to keep it elsewhere"):
            widget.keeper.open(tmp_path / "other")
    qtbot.waitUntil(lambda: len(widget.history.records) == 1, timeout=20_000)  # by itself
    saved(widget)
    assert widget.history.installed == 1
    adapter = widget.keeper.project.rounds.adapter(1)
    assert all(
        torch.equal(tensor, adapter.state[name])
        for name, tensor in widget.session.installed.state.items()
    )
    assert widget.keeper.project.rounds.recipe(1).images[0].name == "picture0"


def test_a_round_that_never_found_room_is_rescued_when_the_window_closes(
    started, paint, wait, saved, monkeypatch, recovery_folder, caplog, tmp_path
):
    _, widget = started()
    layer = widget.start_annotating()
    paint(layer, 1, 10)
    paint(layer, 2, 70)
    saved(widget)
    replace_file = os.replace

    def full(source, target):
        if Path(target).is_relative_to(tmp_path / "p"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr("os.replace", full)
    widget.adapt()
    wait(widget)
    widget.keeper.close()
    (place,) = (recovery_folder.parent / "rescued").iterdir()
    assert Adapter.load(place).summary["steps"] == 3
    assert any(f"is in {place} instead" in record.getMessage() for record in caplog.records)


def test_what_is_written_is_what_there_was_when_it_was_to_be_saved(
    make_viewer, make_widget, halves, paint
):
    viewer = make_viewer()
    layers = [viewer.add_image(halves + i, name=name) for i, name in enumerate("ab")]
    widget = make_widget(viewer)
    stems = {}
    for layer in layers[::-1]:
        widget.source.choose(layer, None)
        paint(widget.start_annotating(), 1, 10)
        widget.keeper.save()
        widget.keeper.writer.flush()
        stems[layer.name] = widget.keeper.current
    go_on = threading.Event()
    widget.keeper.writer.put(lambda: go_on.wait(20))
    widget.keeper.save()
    widget.source.choose(layers[1], None)
    go_on.set()
    widget.keeper.writer.flush()
    assert widget.keeper.current == stems["b"]
    assert widget.keeper.project.manifest.current == stems["a"]


def test_the_writer_touches_nothing_of_the_window(ready, wait, saved, paint, qtbot, monkeypatch):
    viewer, widget = ready()
    touched = set()
    for kind in (ImageWork, ImageLayers, Autosave, ImageList, ProjectKeeper, RoundHistory):

        def get(self, name, kind=kind, get=kind.__getattribute__):
            if threading.current_thread().name == "convlora-writer":
                touched.add((kind.__name__, name))
            return get(self, name)

        monkeypatch.setattr(kind, "__getattribute__", get)
    saved(widget)
    widget.adapt()
    wait(widget)
    paint(viewer.layers["annotations"], 1, 30)
    saved(widget)
    qtbot.waitUntil(lambda: list(widget.history.curve) == [1])
    assert [record.number for record in widget.history.records] == [1]
    assert widget.keeper.project.prediction(widget.keeper.current) is not None
    assert not touched
