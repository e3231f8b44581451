"""The command line on projects and recipes."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import zarr

from napari_convlora.backbones import Backbone
from napari_convlora.cli import commands, parser
from napari_convlora.config import TrainConfig
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import ImageEntry, Manifest, Project, Settings
from tests.conftest import CLASSES, make_scene

QUICK = Settings(train=TrainConfig(max_steps=3, views=3, detail_steps=15, device="cpu"))


@pytest.fixture
def folder(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of three images, two of them annotated, and a tiny backbone for every name."""
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    project = Project.create(tmp_path / "p", Manifest(classes=CLASSES, settings=QUICK))
    for i in range(3):
        scene, _ = make_scene(seed=i)
        path = tmp_path / f"image{i}.tif"
        tifffile.imwrite(path, scene.image[0, ..., 0])
        shape = scene.image.shape
        own = project.add(
            ImageEntry("", f"image {i}", "", str(path), shape, shape[1:3]), scene.image
        )
        if i < 2:
            project.keep_annotations(own.stem, scene.annotations)
    project.close()
    return project.folder


def opened(folder: Path) -> Project:
    project = Project.open(folder)
    project.close()
    return project


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapt", "--project", "P", "--images", "a.tif"],
        ["adapt", "--project", "P", "--recipe", "R", "--out", "a.safetensors"],
        ["adapt", "--recipe", "R", "--out", "a.safetensors", "--method", "lora"],
        ["adapt", "--recipe", "R", "--out", "a.safetensors", "--max-steps", "5"],
        ["adapt", "--images", "a.tif", "--labels", "b.tif", "--out", "c", "--start", "installed"],
        ["predict", "a.safetensors", "--project", "P"],
        ["predict", "--project", "P", "--images", "a.tif"],
    ],
)
def test_what_would_be_ignored_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(arguments) == parser.BAD_USAGE
    said = capsys.readouterr().err
    assert "does not go with" in said or "go with --project" in said


def test_masks_of_a_project_do_not_replace_its_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    project = Project.open(folder)
    image = folder.parent / f"{project.manifest.images[0].stem}.tif"
    (folder.parent / "image0.tif").rename(image)
    project.locate(image.stem, image)
    project.close()
    before = image.read_bytes()
    predict = ["predict", "--project", str(folder), "--out", str(folder.parent)]
    assert parser.main(predict) == commands.FAILED
    assert "is read here" in capsys.readouterr().err
    assert image.read_bytes() == before


def same_state(a: Adapter, b: Adapter) -> bool:
    return a.state.keys() == b.state.keys() and all(
        torch.equal(tensor, b.state[name]) for name, tensor in a.state.items()
    )


def test_adapt_and_predict_a_project(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    said = capsys.readouterr().out
    assert "Installed, as there was no adapter before." in said
    assert "Learnt from 'image 0', 'image 1'." in said
    assert "Round 1: 3 classes, 3 steps" in said
    (first,) = opened(folder).rounds.records()
    assert first.images == ("image_0", "image_1")
    assert first.pixels == {1: 228, 2: 228, 3: 228}
    assert opened(folder).manifest.installed == 1

    out = folder.parent / "masks"
    assert parser.main(["predict", "--project", str(folder), "--out", str(out)]) == commands.DONE
    project = opened(folder)
    for i in range(3):
        mask = tifffile.imread(out / f"image_{i}.tif")
        painted, _ = project.annotations(f"image_{i}")
        kept = project.prediction(f"image_{i}")
        assert (mask > 0).all()
        free = np.ones_like(mask, bool) if painted is None else painted[0] == 0
        assert (mask[free] == kept[0][free]).all()
        if painted is not None:
            assert (mask[~free] == painted[0][~free]).all()


def test_options_of_the_command_go_before_the_projects_settings(folder: Path) -> None:
    assert parser.main(["adapt", "--project", str(folder), "--max-steps", "2"]) == commands.DONE
    (record,) = opened(folder).rounds.records()
    assert record.steps == 2
    assert opened(folder).manifest.settings == QUICK
    assert opened(folder).rounds.recipe(1).settings.train.detail_steps == 15


def test_a_second_round_is_compared_with_the_first_and_may_go_on_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    assert parser.main(["adapt", "--project", str(folder), "--start", "installed"]) == commands.DONE
    assert "without a comparison, as too few labels are held out" in capsys.readouterr().out
    assert [r.started_from for r in opened(folder).rounds.records()] == ["base", "round 1"]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--start", "base", "--no-keep-uncorrected"], True),
        (["--start", "base"], False),
        (["--start", "installed"], False),
    ],
)
def test_a_recipe_repeats_its_round_bit_for_bit(
    folder: Path, options: list[str], same: bool
) -> None:
    for more in ([], options):
        assert parser.main(["adapt", "--project", str(folder), *more]) == commands.DONE
    recipe = folder.parent / "mine.json"
    opened(folder).rounds.export_recipe(2, recipe)
    torch.rand(3)  # whatever else the process did with random numbers
    out = folder.parent / "again.safetensors"
    assert parser.main(["adapt", "--recipe", str(recipe), "--out", str(out)]) == commands.DONE
    assert same_state(Adapter.load(out), opened(folder).rounds.adapter(2))
    first, second = (opened(folder).rounds.adapter(n) for n in (1, 2))
    assert same_state(first, second) == same


def test_reviewed_regions_are_learnt_exported_and_repeated(folder: Path) -> None:
    project = Project.open(folder)
    whole = np.array([[-1, -1], [-1, 999], [999, 999], [999, -1]])
    painted = project.annotated("image_0")[0]
    project.keep_annotations("image_0", painted, [(0, whole)])
    project.keep_annotations("image_1", np.zeros_like(painted), [(0, whole)])
    project.close()
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    (record,) = opened(folder).rounds.records()
    assert record.images == ("image_0", "image_1")
    assert sum(record.pixels.values()) == 2 * painted.size
    assert record.pixels[2] == (painted == 2).sum()

    masks = folder.parent / "masks"
    assert parser.main(["predict", "--project", str(folder), "--out", str(masks)]) == commands.DONE
    complete = np.where(painted[0] == 0, 1, painted[0])
    np.testing.assert_array_equal(tifffile.imread(masks / "image_0.tif"), complete)
    assert (tifffile.imread(masks / "image_1.tif") == 1).all()

    opened(folder).rounds.export_recipe(1, folder.parent / "mine.json")
    recipe, out = str(folder.parent / "mine.json"), folder.parent / "again.safetensors"
    assert parser.main(["adapt", "--recipe", recipe, "--out", str(out)]) == commands.DONE
    assert same_state(Adapter.load(out), opened(folder).rounds.adapter(1))


def test_a_round_that_was_stopped_is_repeated_until_there(folder: Path) -> None:
    assert parser.main(["adapt", "--project", str(folder), "--max-steps", "9"]) == commands.DONE
    path = folder / "rounds" / "001" / "recipe.json"
    stopped = replace(opened(folder).rounds.recipe(1), stop_after=2)
    stopped.write(path)
    out = folder.parent / "again.safetensors"
    assert parser.main(["adapt", "--recipe", str(path), "--out", str(out)]) == commands.DONE
    assert Adapter.load(out).summary["steps"] == 2
    assert Adapter.load(out).summary["ended_by"] == "stopped"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("adapt", "--images, --labels, --out"),
        ("adapt --recipe r.json", "required: --out"),
        ("predict", "adapter, --images, --out"),
    ],
)
def test_what_is_missing_is_named(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(command.split()) == parser.BAD_USAGE
    assert words in capsys.readouterr().err


def test_a_project_without_a_round_says_how_to_get_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(["predict", "--project", str(folder)]) == commands.FAILED
    assert f"napari-convlora adapt --project {folder}" in capsys.readouterr().err


def test_a_round_goes_on_without_an_image_that_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "image0.tif").unlink()
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    assert opened(folder).rounds.records()[0].images == ("image_1",)
    (said,) = caplog.messages
    assert said.startswith("The round goes on without 'image 0', not found on disk; ")
    (folder.parent / "image1.tif").unlink()
    assert parser.main(["adapt", "--project", str(folder)]) == commands.FAILED
    assert "The image 'image 0' is no longer at" in capsys.readouterr().err


def test_one_missing_image_does_not_spoil_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    (folder.parent / "image2.tif").unlink()
    assert parser.main(["predict", "--project", str(folder)]) == commands.FAILED
    captured = capsys.readouterr()
    assert "2 of 3 images predicted" in captured.out
    assert "Locate" in captured.err


def test_a_damaged_image_ends_its_prediction_and_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(["adapt", "--project", str(folder)]) == commands.DONE
    capsys.readouterr()
    project = Project.open(folder)
    pixels = tifffile.imread(folder.parent / "image1.tif")
    bad = folder.parent / "bad.zarr"
    zarr.create_array(bad, data=pixels, chunks=(40, 40))
    project.locate("image_1", bad)
    project.close()
    chunk = bad / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert parser.main(["predict", "--project", str(folder)]) == commands.FAILED
    said = capsys.readouterr()
    assert "2 of 3 images predicted" in said.out
    assert said.err.startswith("image 1: ")
    assert f"{bad.name}' is damaged in plane 0, rows " in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert opened(folder).prediction("image_2") is not None


@pytest.mark.parametrize("out", [False, True])
def test_a_round_whose_disk_has_filled_up_leaves_its_adapter_elsewhere(
    folder: Path, out: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    user, asked = folder.parent / "user", folder.parent / "a.safetensors"
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(user))
    replace_file = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == "adapter.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr("os.replace", full)
    more = ["--out", str(asked)] if out else []
    assert parser.main(["adapt", "--project", str(folder), *more]) == commands.FAILED
    place = asked if out else next((user / "rescued").glob("p-*.safetensors"))
    assert Adapter.load(place).summary["steps"] == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in said
    assert said.endswith(f"; what was learnt is in {place} instead.")
    assert opened(folder).rounds.records() == []


def test_a_round_that_is_written_but_not_installed_is_not_called_elsewhere(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(folder.parent / "user"))
    replace_file = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == "project.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        assert parser.main(["adapt", "--project", str(folder)]) == commands.FAILED
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Round 1 is in the project, but not installed" in said
    assert "instead" not in said
    assert "the disk is full" in said
    assert not (folder.parent / "user").exists()
    project = opened(folder)
    assert [r.number for r in project.rounds.records()] == [1]
    project.install(1)
    assert project.rounds.adapter(1).summary["steps"] == 3


def test_a_project_without_room_is_refused_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10_000))
    monkeypatch.setattr(
        "napari_convlora.training.loop.fit_detail", lambda *_: pytest.fail("trained")
    )
    assert parser.main(["adapt", "--project", str(folder)]) == commands.FAILED
    assert f"'{folder}' has 0.0 MB free" in capsys.readouterr().err
