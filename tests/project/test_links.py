"""Links in a stranger's project: nothing is written, deleted or copied through them."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_convlora.backbones import Backbone
from napari_convlora.cli import commands, parser
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import ImageEntry, Manifest, Project, Recipe, Settings, label_files
from tests.conftest import CLASSES, make_scene

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs links")

SCENE = make_scene()[0]
PAINTED = SCENE.annotations
SQUARE = np.array([[-0.5, -0.5], [-0.5, 3.5], [3.5, 3.5], [3.5, -0.5]])


@pytest.fixture
def folder(
    tmp_path: Path, adapter: Adapter, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A closed project with all that one can hold."""
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    tifffile.imwrite(tmp_path / "cells.tif", SCENE.image[0, ..., 0])
    project = Project.create(tmp_path / "p", Manifest(classes=CLASSES))
    at = str(tmp_path / "cells.tif")
    shape = SCENE.image.shape
    project.add(ImageEntry("", "cells", "", at, shape, shape[1:3]), SCENE.image)
    project.add(ImageEntry("", "copied", "", "", shape, shape[1:3]), SCENE.image)
    for _ in range(2):
        project.keep_annotations("cells", PAINTED, [(0, SQUARE)])
        project.keep_prediction("cells", PAINTED)
        project.rounds.add(adapter, {"cells": (PAINTED, ())}, Settings(), (), (1, adapter))
        project.rounds.keep_prediction(1, "cells", PAINTED)
    project.close()
    return project.folder


def do_everything(folder: Path, adapter: Adapter) -> list[str]:
    """Use a project in every way that writes or copies, and return what was refused."""
    refused: list[str] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except ConvLoRAError as error:
            refused.append(str(error))

    beside = folder.parent
    (beside / "out").mkdir()
    attempt(lambda: parser.main(["predict", "--project", str(folder)]) and None)
    try:
        project = Project.open(folder)
    except InputError as error:
        return [str(error)]
    entry = ImageEntry("", "more", "", "", SCENE.image.shape, SCENE.image.shape[1:3])
    path = folder / "annotations" / "cells.tif"
    attempt(lambda: label_files.keep_version(path, least=0))
    attempt(lambda: project.keep_annotations("cells", PAINTED * 0 + 1, [(0, SQUARE + 1)]))
    attempt(lambda: project.keep_prediction("cells", PAINTED * 0 + 2))
    attempt(lambda: project.rounds.keep_prediction(1, "cells", PAINTED * 0 + 2))
    attempt(lambda: project.rounds.export_recipe(1, beside / "out" / "mine.json"))
    attempt(lambda: project.rounds.adapter(1))
    attempt(lambda: project.rounds.corrections(1))
    attempt(lambda: project.save_as(beside / "copy").close())
    attempt(lambda: project.add(entry, SCENE.image))
    attempt(lambda: project.rounds.add(adapter, {"cells": (PAINTED, ())}, Settings()))
    attempt(lambda: project.relabel("cells", 1, 2))
    attempt(lambda: project.update(lambda m: replace(m, automatic=True)))
    attempt(lambda: project.remove("cells"))
    project.close()
    return refused


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


NAMES = [
    "project.json",
    "open.json",
    "open.lock",
    "annotations",
    "annotations/cells.tif",
    "annotations/cells.json",
    "annotations/versions",
    "annotations/versions/cells.*.tif",
    "predictions",
    "predictions/cells.tif",
    "images",
    "images/copied.npy",
    "rounds",
    "rounds/001",
    "rounds/001/adapter.safetensors",
    "rounds/001/annotations",
    "rounds/001/annotations/cells.tif",
    "rounds/001/predictions",
    "rounds/001/predictions/cells.tif",
    "rounds/001/recipe.json",
    "rounds/001/round.json",
    "rounds/001/start.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_deleted_or_copied_through_a_link(
    folder: Path, tmp_path: Path, adapter: Adapter, name: str
) -> None:
    place = next(folder.glob(name), folder / name)
    away = tmp_path / "elsewhere" / place.name
    away.parent.mkdir()
    if place.exists():
        shutil.move(place, away)
        if away.is_file():
            away.write_bytes(away.read_bytes() + b"   ")  # so that there is no other file like it
    else:
        away.write_bytes(b"precious")
    place.symlink_to(away)
    before = content(away.parent)
    refused = do_everything(folder, adapter)
    assert content(away.parent) == before
    assert any(f"'{place}' is a link" in sentence for sentence in refused)
    assert all(s.count(". ") == 0 and s.endswith(".") for s in refused)
    copied = [p for where in ("copy", "out") for p in (tmp_path / where).rglob("*")]
    assert not any(p.is_symlink() for p in copied)
    if away.is_file() and name != "open.lock":
        assert all(p.read_bytes() != before[away] for p in copied if p.is_file())


@pytest.mark.parametrize("name", ["images/x", "rounds/001/notes.txt", "annotations/extra"])
def test_save_as_copies_no_target_of_a_link_and_leaves_no_half_copy(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / name).symlink_to(tmp_path / "secret")
    project = Project.open(folder)
    with pytest.raises(InputError, match="is a link"):
        project.save_as(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (folder / name).unlink()
    project.save_as(tmp_path / "copy").close()
    assert (tmp_path / "copy" / "images" / "copied.npy").is_file()


def test_a_project_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(folder)
    project = Project.open(tmp_path / "shortcut")
    project.keep_annotations("cells", PAINTED * 0 + 3)
    assert (project.annotations("cells")[0] == 3).all()
    project.save_as(tmp_path / "copy").close()
    project.close()
    assert not (folder / "open.json").exists()


def test_predicting_a_strangers_project_writes_over_no_file_of_mine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (folder / "open.json").symlink_to(mine)
    assert parser.main(["predict", "--project", str(folder)]) == commands.FAILED
    assert "is a link" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_names_in_a_strangers_files_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.npy").write_bytes(b"mine")
    project = Project.open(folder)
    images = tuple(
        replace(e, path="images/../../mine.npy") if e.stem == "copied" else e
        for e in project.manifest.images
    )
    project.update(lambda m: replace(m, images=images))
    there = project.save_as(tmp_path / "deep" / "er" / "copy")
    assert there.entry("copied").places(there.folder)[0].resolve() == tmp_path / "mine.npy"
    for name in ("..", "../x", "a/b"):
        recipe = replace(project.rounds.recipe(1), labels=name)
        recipe.write(tmp_path / "bad.json")
        with pytest.raises(InputError, match="damaged"):
            Recipe.read(tmp_path / "bad.json")
    with contextlib.suppress(ConvLoRAError):
        project.own("..", "mine.npy").unlink()
    assert (tmp_path / "mine.npy").exists()
