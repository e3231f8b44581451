"""Label files of a project that are gone or damaged are said, and not taken for none."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_convlora.backbones import Backbone
from napari_convlora.cli import commands, parser
from napari_convlora.config import TrainConfig
from napari_convlora.errors import InputError
from napari_convlora.project import (
    ImageEntry,
    LostLabelsError,
    Manifest,
    Project,
    Settings,
    label_files,
    recovery,
)
from napari_convlora.project.lost_labels import Lost
from tests.conftest import CLASSES, make_scene

QUICK = Settings(train=TrainConfig(max_steps=3, views=3, detail_steps=15, device="cpu"))
WHOLE = np.array([[-1, -1], [-1, 999], [999, 999], [999, -1]])


@pytest.fixture
def folder(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed project of two annotated images, and a tiny backbone for every name."""
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    project = Project.create(tmp_path / "p", Manifest(classes=CLASSES, settings=QUICK))
    for i in range(2):
        scene, _ = make_scene(seed=i)
        tifffile.imwrite(tmp_path / f"image{i}.tif", scene.image[0, ..., 0])
        own = project.add_file(tmp_path / f"image{i}.tif")
        project.keep_annotations(own.stem, scene.annotations)
    project.close()
    return project.folder


def lose(folder: Path, how: str) -> str:
    """Spoil the labels of the first image, and return the file that is named."""
    path = folder / "annotations" / "image0.tif"
    project = Project.open(folder)
    if how in ("regions", "without regions"):
        project.keep_annotations("image0", project.annotated("image0")[0], [(0, WHOLE)])
        path = path.with_suffix(".json")
    if how == "with an older version":
        label_files.keep_version(path)
    project.close()
    if how == "empty":
        label_files.write_label_file(path, np.zeros(project.entry("image0").shape[:3], np.uint8))
    elif how == "without regions":
        label_files.write_regions(path, ())
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:90])
    else:
        path.unlink()
    return f"annotations/{path.name}"


LOST = ["gone", "damaged", "regions", "with an older version", "empty", "without regions"]


@pytest.mark.parametrize("how", LOST)
def test_a_round_of_the_command_waits_for_an_answer(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    named = lose(folder, how)
    assert parser.main(["adapt", "--project", str(folder)]) == commands.FAILED
    said = capsys.readouterr().err.strip()
    assert "'image0'" in said
    assert named in said
    assert said.endswith("or give --without-missing.")
    assert ("annotations/versions" in said) == (how == "with an older version")
    assert parser.main(["adapt", "--project", str(folder), "--without-missing"]) == commands.DONE
    project = Project.open(folder)
    assert [r.images for r in project.rounds.records()] == [("image1",)]
    assert project.entry("image0").annotated  # nothing has been forgotten
    (said,) = caplog.messages
    assert "image0" in said


def test_when_all_are_gone_nothing_is_learnt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        (folder / "annotations" / f"image{i}.tif").unlink()
    assert parser.main(["adapt", "--project", str(folder), "--without-missing"]) == commands.FAILED
    assert "image0.tif" in capsys.readouterr().err


@pytest.mark.parametrize("how", LOST)
def test_merging_a_class_writes_no_empty_mask_over_what_is_gone(folder: Path, how: str) -> None:
    named = folder / lose(folder, how)
    project = Project.open(folder)
    before = {p: p.read_bytes() for p in (folder / "annotations").rglob("*.*")}
    with pytest.raises(InputError, match=named.name):
        project.relabel("image0", 1, 2)
    assert {p: p.read_bytes() for p in (folder / "annotations").rglob("*.*")} == before
    assert project.entry("image0").counts[1] > 0


def test_predicted_masks_say_that_strokes_are_not_on_top(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    lose(folder, "gone")
    out = folder.parent / "masks"
    assert parser.main(["predict", "--project", str(folder), "--out", str(out)]) == commands.DONE
    assert (out / "image0.tif").exists()
    (said,) = caplog.messages
    assert "annotations/image0.tif" in said
    assert "prediction alone" in said


def test_a_damaged_file_stays_among_the_older_versions_when_it_is_replaced(folder: Path) -> None:
    path = folder / "annotations" / "image0.tif"
    project = Project.open(folder)
    painted = project.annotated("image0")[0]
    project.keep_annotations("image0", painted)  # which keeps a version
    path.write_bytes(path.read_bytes()[:-40])
    newest = path.read_bytes()
    found, note = project.annotations("image0")
    assert (found == painted).all()
    assert note.startswith("'image0.tif' is damaged; an older version")
    project.keep_annotations("image0", painted)
    assert newest in [p.read_bytes() for p in label_files.label_versions(path)]


def test_what_was_never_annotated_is_not_missed(folder: Path) -> None:
    project = Project.open(folder)
    project.update(
        lambda m: replace(
            m, images=(*m.images, ImageEntry("new", "new", "", "", (1, 9, 9, 1), (9, 9)))
        )
    )
    assert project.annotations("new") == (None, "")
    assert not project.annotated("new")[0].any()


def test_an_empty_file_in_place_of_strokes_gives_way_to_the_version_before(folder: Path) -> None:
    project = Project.open(folder)
    painted = project.annotated("image0")[0]
    label_files.keep_version(folder / "annotations" / "image0.tif")
    project.close()
    lose(folder, "empty")
    project = Project.open(folder)
    found, note = project.annotations("image0")
    assert (found == painted).all()
    assert "an older version" in note
    found, note = project.annotations("image1")
    assert found.any()
    assert not note


def test_strokes_that_were_erased_are_not_missed(folder: Path) -> None:
    project = Project.open(folder)
    project.keep_annotations("image0", np.zeros(project.entry("image0").shape[:3], np.uint8))
    project.close()
    project = Project.open(folder)
    assert not project.annotated("image0")[0].any()
    assert project.annotations("image0")[1] == ""
    assert project.labelled()[0] == ("image1",)


def forget(folder: Path) -> None:
    """Let a project end between writing the first labels of an image and its manifest."""
    project = Project.open(folder)
    before = project.manifest.images[0]
    project.keep_annotations("image0", project.annotated("image0")[0], [(0, WHOLE)])
    project.update(
        lambda m: replace(m, images=(replace(before, counts={}, regions=0), *m.images[1:]))
    )
    project.close()


def test_labels_that_a_crash_kept_out_of_the_manifest_are_learnt_from(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget(folder)
    project = Project.open(folder)
    painted = project.annotated("image0")[0]
    counts = {i: (painted == i).sum() for i in (1, 2, 3)}
    assert project.labelled()[0] == ("image0", "image1")
    assert (project.entry("image0").counts, project.entry("image0").regions) == (counts, 1)
    project.close()
    (folder / "annotations" / "image0.tif").write_bytes(b"II*")
    assert Project.open(folder).labelled()[0] == ("image1",)  # it opens all the same
    assert "'image0' counts as not annotated" in caplog.text


def test_unsaved_labels_that_a_crash_kept_out_of_the_manifest_are_offered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(folder.parent / "aside"))
    forget(folder)
    recovery.root().mkdir(parents=True)
    project = Project.open(folder)
    project.remove("image1")
    project.close()
    forget(folder)
    folder.rename(recovery.root() / "session")
    (left,) = recovery.leftovers()
    assert (left.images, left.regions) == (1, 1)
    assert left.pixels > 0


def test_the_error_survives_the_way_between_processes() -> None:
    error = LostLabelsError(Lost("a", "annotations/a.tif", True), Lost("b", "b.tif", False))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.lost) == (str(error), error.lost)
