"""Label files of a project that are gone or damaged are said, and not taken for none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_convlora import cli, commands
from napari_convlora.backbones import Backbone
from napari_convlora.config import InputError, TrainConfig
from napari_convlora.project import ImageEntry, Manifest, Project, Settings, labels
from tests.conftest import CLASSES, make_scene

QUICK = Settings(train=TrainConfig(max_steps=3, views=3, detail_steps=15, device="cpu"))
WHOLE = np.array([[-1, -1], [-1, 999], [999, 999], [999, -1]])


@pytest.fixture
def folder(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed project of two annotated images, and a tiny backbone for every name."""
    monkeypatch.setattr("napari_convlora.session.load_backbone", lambda name: backbone)
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
    if how == "regions":
        project.keep_annotations("image0", project.annotated("image0")[0], [(0, WHOLE)])
        path = path.with_suffix(".json")
    if how == "with an older version":
        labels.keep_version(path)
    project.close()
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:90])
    else:
        path.unlink()
    return f"annotations/{path.name}"


LOST = ["gone", "damaged", "regions", "with an older version"]


@pytest.mark.parametrize("how", LOST)
def test_a_round_of_the_command_waits_for_an_answer(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    named = lose(folder, how)
    assert cli.main(["adapt", "--project", str(folder)]) == commands.FAILED
    said = capsys.readouterr().err.strip()
    assert "'image0'" in said
    assert named in said
    assert said.endswith("or give --without-missing.")
    assert ("annotations/versions" in said) == (how == "with an older version")
    assert cli.main(["adapt", "--project", str(folder), "--without-missing"]) == commands.DONE
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
    assert cli.main(["adapt", "--project", str(folder), "--without-missing"]) == commands.FAILED
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
    assert cli.main(["adapt", "--project", str(folder)]) == commands.DONE
    lose(folder, "gone")
    out = folder.parent / "masks"
    assert cli.main(["predict", "--project", str(folder), "--out", str(out)]) == commands.DONE
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
    assert newest in [p.read_bytes() for p in labels.versions(path)]


def test_what_was_never_annotated_is_not_missed(folder: Path) -> None:
    project = Project.open(folder)
    project.update(
        lambda m: replace(
            m, images=(*m.images, ImageEntry("new", "new", "", "", (1, 9, 9, 1), (9, 9)))
        )
    )
    assert project.annotations("new") == (None, "")
    assert not project.annotated("new")[0].any()
