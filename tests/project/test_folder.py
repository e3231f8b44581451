"""Projects on disk: round trips, crashes, strangers' files, rounds and their recipes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from napari_convlora.config import TrainConfig
from napari_convlora.errors import InputError
from napari_convlora.images.planes import lazy_planes
from napari_convlora.labels.annotations import known_only
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import (
    ImageEntry,
    Manifest,
    Project,
    Recipe,
    Settings,
    Viewpoint,
    label_files,
    lock,
)

SHAPE = (1, 40, 50, 1)
VIEW = {"point": [0, 0], "center": [0, 9, 9], "zoom": 2, "contrast": [0, 1]}


def entry(name: str = "cells", path: Path | str = "", **more) -> ImageEntry:
    fields = {"shape": SHAPE, "layer_shape": SHAPE[1:3]} | more
    return ImageEntry(stem="", name=name, path="", absolute=str(path), **fields)


def picture(path: Path, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 255, SHAPE, np.uint8)
    tifffile.imwrite(path, pixels[0, ..., 0])
    return pixels


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with one image by reference, and strokes on it."""
    pixels = picture(tmp_path / "a.tif")
    made = Project.create(tmp_path / "p", Manifest(classes=default_classes(2)))
    made.add(entry(path=tmp_path / "a.tif"), pixels)
    made.keep_annotations("cells", strokes())
    return made


def strokes(*values: int) -> np.ndarray:
    painted = np.zeros(SHAPE[:3], np.int32)
    for i, value in enumerate(values or (1, 2)):
        painted[0, 5:9, 5 + 8 * i : 9 + 8 * i] = value
    return painted


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_everything_comes_back(project: Project, tmp_path: Path) -> None:
    chosen = Settings("vit_b", train=TrainConfig(max_steps=7, start="installed"))
    project.update(lambda m: replace(m, settings=chosen, current="cells"))
    project.keep_prediction("cells", strokes(2, 1))
    project.keep_view("cells", Viewpoint((0.0, 3.0), (0.0, 1.0, 2.0), 1.5, (-1.0, 1.0)))
    project.close()
    again = Project.open(tmp_path / "p")
    assert again.manifest == project.manifest
    assert again.manifest.settings == chosen
    assert again.manifest.images[0].counts == {1: 16, 2: 16}
    assert (again.annotations("cells")[0] == strokes()).all()
    assert (again.prediction("cells") == strokes(2, 1)).all()
    (pixels,) = again.labelled()[1]
    assert (pixels.image == picture(tmp_path / "b.tif")).all()


@given(
    arrays.arrays(np.int32, (2, 7, 9), elements=st.integers(0, 65535)),
    st.text(max_size=30),
    st.sampled_from([None, 0, 1]),
)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_annotations_and_pixels_come_back(
    tmp_path_factory: pytest.TempPathFactory, painted: np.ndarray, name: str, axis: int | None
) -> None:
    folder = tmp_path_factory.mktemp("p")
    layer = np.random.default_rng(0).random((2, 3, 7, 9))  # planes or channels come first
    if axis is None:
        painted = np.repeat(painted, 3, 0)
        pixels = layer.reshape(6, 7, 9, 1)
    else:
        pixels = np.moveaxis(layer, axis, -1).reshape(-1, 7, 9, layer.shape[axis])
        painted = np.resize(painted, pixels.shape[:3])
    made = Project.create(folder / "x")
    own = made.add(
        entry(name, shape=pixels.shape, layer_shape=layer.shape, channel_axis=axis), pixels
    )
    made.keep_annotations(own.stem, painted)
    made.close()
    again = Project.open(folder / "x")
    again.close()
    assert (again.annotations(own.stem)[0] == painted).all()
    (found,) = again.manifest.images
    assert found.name == name.replace("\0", "")
    read = found.read(again.folder)
    assert (read == pixels).all()
    assert (found.as_layer(read) == layer).all()


def test_names_that_a_file_system_takes_for_one_get_files_of_their_own(project: Project) -> None:
    pixels = np.zeros(SHAPE)
    stems = [project.add(entry(n), pixels).stem for n in ("CELLS", "cells", "../x", "con/trol", "")]
    assert len({s.lower() for s in ["cells", *stems]}) == 6
    written = [p for p in project.folder.parent.rglob("*") if p.suffix == ".npy"]
    assert all(p.parent == project.folder / "images" for p in written)


def test_a_colour_image_without_a_file_is_copied(project: Project) -> None:
    layer = np.random.default_rng(0).integers(0, 255, (40, 50, 4), np.uint8)
    planes = layer[None, ..., :3]
    own = project.add(entry(shape=planes.shape, layer_shape=layer.shape, rgb=True), planes)
    assert (own.read(project.folder) == planes).all()
    assert own.as_layer(planes).shape == (40, 50, 3)


def test_a_moved_project_finds_its_images(project: Project, tmp_path: Path) -> None:
    project.close()
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "p", tmp_path / "elsewhere" / "p")
    os.rename(tmp_path / "a.tif", tmp_path / "elsewhere" / "a.tif")
    again = Project.open(tmp_path / "elsewhere" / "p")
    assert again.manifest.images[0].read(again.folder).shape == SHAPE


def test_a_missing_image_names_its_path_and_locate_mends_it(
    project: Project, tmp_path: Path
) -> None:
    os.rename(tmp_path / "a.tif", tmp_path / "renamed.tif")
    with pytest.raises(InputError) as error:
        project.entry("cells").read(project.folder)
    text = one_sentence(error)
    assert str(tmp_path / "a.tif") in text
    assert "Locate" in text
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((9, 9), np.uint8))
    with pytest.raises(InputError, match="9 x 9"):
        project.locate("cells", tmp_path / "other.tif")
    project.locate("cells", tmp_path / "renamed.tif")
    assert project.entry("cells").read(project.folder).shape == SHAPE
    assert project.entry("cells").counts == {1: 16, 2: 16}


def test_a_zarr_folder_is_learnt_from_and_moves_with_its_project(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
    (tmp_path / "here").mkdir()
    folder = tmp_path / "here" / "a.zarr"
    zarr.create_array(folder, shape=SHAPE[1:3], dtype=np.uint8)[...] = pixels[0, ..., 0]
    made = Project.create(tmp_path / "here" / "p", Manifest(classes=default_classes(2)))
    made.add(entry(path=folder), pixels)
    made.keep_annotations("cells", strokes())
    made.close()
    assert not (made.folder / "images").exists()
    (tmp_path / "here").rename(tmp_path / "there")
    (image,) = Project.open(tmp_path / "there" / "p").labelled()[1]
    assert (image.image == pixels).all()


@pytest.mark.parametrize("shape", [(2, 3, 1, 20, 30), (2, 1, 20, 30, 3)])
def test_a_zarr_is_added_as_it_is_held(project: Project, tmp_path: Path, shape: tuple) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    names = "tczyx" if shape[-1] > 3 else "tzyxc"
    zarr.create_array(tmp_path / "a.zarr", shape=shape, dtype=np.uint8, dimension_names=names)[
        ...
    ] = pixels
    own = project.add_file(tmp_path / "a.zarr")
    assert own.rgb == (shape[-1] == 3)
    (planes,) = own.levels(project.folder)
    expected = np.moveaxis(pixels, names.index("c"), -1).reshape(2, 20, 30, 3)
    assert (planes[1][3:9, 5:30] == expected[1, 3:9, 5:30]).all()
    layer = own.as_layer(planes)
    assert (layer[(slice(None),) * 5] == pixels).all()
    assert (layer[(1, *(slice(None),) * 4)] == pixels[1]).all()


def test_what_is_too_large_to_copy_and_without_a_file_has_no_place(project: Project) -> None:
    lazy = lazy_planes(np.zeros(SHAPE[1:3], np.uint8))
    own = project.add(entry("lazy"), lazy)
    assert (own.path, own.absolute) == ("", "")
    with pytest.raises(InputError, match="press Locate") as error:
        own.find(project.folder)
    one_sentence(error)
    elsewhere = project.save_as(project.folder.parent / "copy")
    assert elsewhere.entry("lazy") == own


def test_of_two_places_the_one_with_the_same_content_counts(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    os.rename(tmp_path / "a.tif", tmp_path / "old" / "a.tif")
    picture(tmp_path / "a.tif", seed=1)
    moved = replace(project.entry("cells"), absolute=str(tmp_path / "old" / "a.tif"))
    assert moved.find(project.folder) == tmp_path / "old" / "a.tif"


def test_older_versions_are_kept_now_and_then_and_pruned(project: Project) -> None:
    path = project.folder / "annotations" / "cells.tif"
    for i in range(40):
        label_files.keep_version(path, now=1000.0 + 50 * i)
        label_files.write_label_file(path, strokes(1 + i))
    kept = label_files.label_versions(path)
    assert len(kept) == label_files.VERSIONS
    moments = [int(p.name.split(".")[1]) / 1000 for p in kept]
    assert min(np.diff(moments)) >= label_files.VERSION_SECONDS
    values = [tifffile.imread(p).max() for p in kept]
    assert values == sorted(values)
    assert tifffile.imread(path).max() == 40


def test_damaged_annotations_give_way_to_the_version_before(project: Project) -> None:
    project.keep_annotations("cells", strokes(2, 1))
    path = project.folder / "annotations" / "cells.tif"
    path.write_bytes(path.read_bytes()[:90])
    found, note = project.annotations("cells")
    assert (found == strokes()).all()
    assert "older version" in note
    project.keep_annotations("cells", strokes(1, 1))
    assert project.annotations("cells")[1] == ""


outlines = st.lists(
    st.tuples(
        st.just(0),
        arrays.arrays(
            np.float64, st.tuples(st.integers(3, 8), st.just(2)), elements=st.floats(-1e6, 1e6)
        ),
    ),
    max_size=4,
)


@given(outlines)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_reviewed_regions_come_back_exactly(
    project: Project, regions: list[tuple[int, np.ndarray]]
) -> None:
    project.keep_annotations("cells", strokes(), regions)
    found, note = project.regions("cells")
    assert note == ""
    assert [(p, v.tolist()) for p, v in found] == [(p, v.tolist()) for p, v in regions]
    assert project.entry("cells").regions == len(regions)


SQUARE = np.array([[-0.5, -0.5], [-0.5, 3.5], [3.5, 3.5], [3.5, -0.5]])


def test_what_is_unpainted_in_reviewed_regions_is_learnt_as_background(project: Project) -> None:
    nothing = np.zeros_like(strokes())
    project.keep_annotations("cells", nothing, [(0, SQUARE)])
    (image,) = project.labelled()[1]
    assert image.annotations.sum() == (image.annotations[0, :4, :4] == 1).sum() == 16
    project.update(lambda m: replace(m, classes=m.classes[1:]))
    with pytest.raises(InputError, match="mark one in the class table"):
        project.labelled()


def test_damaged_regions_give_way_to_the_version_before(project: Project) -> None:
    project.keep_annotations("cells", strokes(), [(0, SQUARE)])
    project.keep_annotations("cells", strokes(), [])
    assert project.regions("cells") == ((), "")
    (project.folder / "annotations" / "cells.json").write_bytes(b"{")
    ((plane, _),), note = project.regions("cells")
    assert plane == 0
    assert "older version" in note


@pytest.mark.parametrize(
    "regions",
    [
        [{"plane": 2, "outline": SQUARE.tolist()}],
        [{"plane": -1, "outline": SQUARE.tolist()}],
        [{"plane": 0, "outline": SQUARE[:2].tolist()}],
        [{"plane": 0, "outline": [[0, 0, 0]] * 3}],
        [{"plane": 0, "outline": [[0, 1e300]] * 3}],
        [{"plane": 0, "outline": [[0, 0]] * 20_000}],
        [{"plane": 0}],
        [{"plane": 0, "outline": SQUARE.tolist()}] * 10_001,
        {"plane": 0},
        None,
    ],
)
def test_hostile_regions_are_refused_in_one_sentence(project: Project, regions: object) -> None:
    path = project.folder / "annotations" / "cells.json"
    path.write_text(json.dumps({"format": 1, "reviewed": regions}))
    with pytest.raises(InputError) as error:
        project.regions("cells")
    assert "restore a copy" in one_sentence(error)


_KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from napari_convlora.project import Project
project = Project.open(Path(sys.argv[1]))
replace = os.replace
def killed(source, target):
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killed
project.keep_annotations("cells", np.full((1, 40, 50), 2))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["cells.tif", "project.json"])
def test_a_kill_between_write_and_rename_loses_nothing(project: Project, moment: str) -> None:
    project.close()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(project.folder), moment])
    assert done.returncode == -9
    assert lock.crashed(project.folder)
    again = Project.open(project.folder)  # the dead process's claim does not lock anybody out
    found, _ = again.annotations("cells")
    assert (found == (strokes() if moment == "cells.tif" else 2)).all()
    again.keep_annotations("cells", strokes(2, 2))
    assert again.entry("cells").counts == {2: 32}


_HOLDING = """
import sys, time
from pathlib import Path
from napari_convlora.project import Project
Project.open(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_into_one_project(project: Project) -> None:
    project.close()
    command = [sys.executable, "-c", _HOLDING, str(project.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="close it there") as error:
            Project.open(project.folder)
        one_sentence(error)
        other.kill()
    Project.open(project.folder)


def damage(project: Project, change) -> Path:
    project.close()
    path = project.folder / "project.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return project.folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=2), "newer napari-convlora"),
        (lambda d: d.pop("format"), "damaged"),
        (lambda d: d["images"][0].update(stem="../../evil"), "file name"),
        (lambda d: d["images"][0].update(stem=".."), "file name"),
        (lambda d: d["images"].append(d["images"][0] | {"stem": "CELLS"}), "share their files"),
        (lambda d: d["images"][0].update(shape=[1, 10**12, 2, 1]), "no size"),
        (lambda d: d["images"][0].update(shape=[1, 2]), "no size"),
        (lambda d: d["images"][0].update(layer_shape=[]), "layer shape"),
        (lambda d: d["images"][0].update(channel_axis=7), "layer shape"),
        (lambda d: d["images"][0].update(counts={"a": 1}), "damaged"),
        (lambda d: d["images"][0].update(view=VIEW | {"zoom": 0}), "looked at"),
        (lambda d: d["images"][0].update(view=VIEW | {"contrast": [2, 1]}), "looked at"),
        (lambda d: d["images"][0].update(view=VIEW | {"center": [1] * 99}), "looked at"),
        (lambda d: d["images"][0].update(view=VIEW | {"point": ["x"]}), "number"),
        (lambda d: d.update(removed="cells"), "not a list"),
        (lambda d: d["images"][0].pop("name"), "damaged"),
        (lambda d: d.update(images={}), "not a list"),
        (lambda d: d.update(installed="1"), "whole number"),
        (lambda d: d.update(installed=True), "whole number"),
        (lambda d: d["settings"]["train"].update(device="rm -rf"), "none of"),
        (lambda d: d["settings"]["train"].update(max_minutes=float("inf")), "number"),
        (lambda d: d["settings"]["model"]["method_config"].update(rank=0), "rank"),
        (lambda d: d["classes"][0].update(colour="url(x)"), "colour"),
        (lambda d: d["classes"][0].update(id=0), "id"),
        (lambda d: d.update(settings="x" * 10_000), "no object"),
    ],
)
def test_hostile_manifests_are_refused_in_one_sentence(
    project: Project, change, words: str
) -> None:
    folder = damage(project, change)
    with pytest.raises(InputError, match=words) as error:
        Project.open(folder)
    assert len(one_sentence(error)) < 500


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 200_000, b" " * 17_000_000]
)
def test_damaged_manifests_are_refused_in_one_sentence(project: Project, raw: bytes) -> None:
    project.close()
    (project.folder / "project.json").write_bytes(raw)
    with pytest.raises(InputError, match="damaged") as error:
        Project.open(project.folder)
    one_sentence(error)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_links_and_pipes_of_a_stranger_lead_nowhere(project: Project, tmp_path: Path) -> None:
    mine = tmp_path / "mine.tif"
    mine.write_bytes(b"mine")
    path = project.folder / "annotations" / "cells.tif"
    path.unlink()
    path.symlink_to(mine)
    with pytest.raises(InputError, match="leads out of the project"):
        project.keep_annotations("cells", strokes())
    assert mine.read_bytes() == b"mine"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.tif").unlink()
    waiting = replace(project.entry("cells"), absolute=str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="no longer"):
        waiting.read(project.folder)


def test_unknown_keys_of_the_same_format_are_left_alone(project: Project) -> None:
    folder = damage(project, lambda d: d["settings"]["train"].update(later_option=3))
    assert Project.open(folder).manifest.settings == Settings()


def test_a_project_of_before_reviewed_regions_opens(project: Project) -> None:
    def older(data: dict) -> None:
        del data["automatic"], data["images"][0]["regions"]

    again = Project.open(damage(project, older))
    assert again.regions("cells") == ((), "")
    assert not again.manifest.automatic
    assert (again.annotated("cells")[0] == strokes()).all()


def test_an_instance_map_is_refused_and_nothing_is_lost(project: Project) -> None:
    with pytest.raises(InputError, match="70000") as error:
        project.keep_annotations("cells", strokes(70_000))
    one_sentence(error)
    assert (project.annotations("cells")[0] == strokes()).all()


@pytest.fixture
def with_rounds(project: Project, adapter: Adapter) -> Project:
    """The project with a first round, and a second that is worse."""
    project.update(lambda m: replace(m, classes=adapter.classes))
    project.rounds.add(adapter, {"cells": (strokes(), ())}, Settings())
    compared = {"installed": 0.8, "new": 0.6, "pixels": 300}
    worse = replace(adapter, summary=adapter.summary | {"compared": compared})
    project.rounds.add(worse, {"cells": (strokes(1, 1), ())}, Settings())
    return project


def test_what_an_image_that_was_removed_leaves_behind_is_no_other_images(
    with_rounds: Project, tmp_path: Path
) -> None:
    with_rounds.rounds.keep_prediction(1, "cells", strokes())
    with_rounds.remove("cells")
    assert with_rounds.manifest.images == ()
    assert with_rounds.rounds.records()[0].images == ("cells",)
    assert with_rounds.rounds.corrections(1).pixels == 0
    again = with_rounds.add(entry(path=tmp_path / "a.tif"))
    assert again.stem == "cells_2"
    assert with_rounds.annotations(again.stem) == (None, "")
    with_rounds.close()
    assert Project.open(with_rounds.folder).manifest.removed == ("cells",)


def test_a_worse_round_is_kept_but_not_installed(with_rounds: Project) -> None:
    first, second = with_rounds.rounds.records()
    assert (first.number, first.better) == (1, True)
    assert (second.number, second.better) == (2, False)
    assert second.reason.startswith("Kept but not installed, as it scores 0.60 on 300")
    assert with_rounds.manifest.installed == 1
    with_rounds.install(2)
    with_rounds.close()
    again = Project.open(with_rounds.folder)
    assert again.manifest.installed == 2
    assert again.rounds.adapter(2).classes == again.manifest.classes
    assert (again.rounds.labels(2)[0][1] == strokes(1, 1)).all()


def test_a_damaged_record_does_not_close_the_project(with_rounds: Project) -> None:
    (with_rounds.rounds.folder(1) / "round.json").write_text("{")
    assert [r.number for r in with_rounds.rounds.records()] == [2]
    with_rounds.rounds.add(with_rounds.rounds.adapter(2), {"cells": (strokes(), ())}, Settings())
    assert [r.number for r in with_rounds.rounds.records()] == [2, 3]


def test_a_round_is_kept_although_the_installed_adapter_cannot_be_read(
    with_rounds: Project, adapter: Adapter
) -> None:
    (with_rounds.rounds.folder(1) / "adapter.safetensors").write_bytes(b"damaged")
    record = with_rounds.rounds.add(adapter, {"cells": (strokes(), ())}, Settings(), (), (1, None))
    recipe = with_rounds.rounds.recipe(record.number)
    assert (recipe.start, recipe.settings.train.keep_uncorrected) == (None, False)


def test_merged_classes_that_lead_in_a_circle_are_survived(tmp_path):
    Manifest(merged={3: 4, 4: 3, 5: 6, 6: 1}).write(tmp_path / "project.json")
    merged = Manifest.read(tmp_path / "project.json").merged
    found = known_only(np.array([1, 3, 4, 5]), default_classes(2), merged)
    np.testing.assert_array_equal(found, [1, 0, 0, 1])


def test_merged_classes_count_as_the_one_that_took_them(with_rounds: Project) -> None:
    with_rounds.rounds.keep_prediction(1, "cells", np.full(SHAPE[:3], 3, np.uint8))
    with_rounds.update(lambda m: replace(m, classes=m.classes[:2], merged={3: 2}))
    later = strokes()
    later[0, 30:34, :4] = 2
    with_rounds.keep_annotations("cells", later)
    assert with_rounds.rounds.corrections(1).accuracy == 1


def test_the_correction_score_is_that_of_later_strokes(with_rounds: Project) -> None:
    assert with_rounds.rounds.corrections(1).pixels == 0
    with_rounds.rounds.keep_prediction(1, "cells", np.ones(SHAPE[:3], np.uint8))
    later = strokes()
    later[0, 20:24, :4], later[0, 30:34, :4] = 1, 2
    with_rounds.keep_annotations("cells", later)
    found = with_rounds.rounds.corrections(1)
    assert found.pixels == 32
    assert found.accuracy == 0.5
    assert found.mean_iou == 0.25  # half of class 1, nothing of class 2


def test_a_score_leaves_out_images_whose_labels_of_then_are_lost(with_rounds: Project) -> None:
    with_rounds.rounds.keep_prediction(1, "cells", np.ones(SHAPE[:3], np.uint8))
    with_rounds.rounds.file(1, "annotations", "cells.tif").unlink()
    assert with_rounds.rounds.corrections(1).pixels == 0  # all strokes would count as later ones


@pytest.mark.parametrize("better", [True, False])
def test_a_round_is_added_once_however_often_the_disk_is_full(
    project: Project, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    from napari_convlora.project.background_writer import Writer

    project.update(lambda m: replace(m, classes=adapter.classes))
    project.rounds.add(adapter, {"cells": (strokes(), ())}, Settings())
    writer, full, real = Writer(), {"project.json"}, os.replace
    later = [replace(adapter, summary=adapter.summary | {"note": i}) for i in range(2)]

    def move(source: str, target: str) -> None:
        if Path(target).name in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.replace", move)
    for one in later:
        writer.put(
            lambda a=one: project.rounds.add(a, {"cells": (strokes(), ())}, Settings()), keep=True
        )
        writer.flush()
    for _ in range(3):
        writer.retry()
        writer.flush()
    assert [r.number for r in project.rounds.records()] == [1, 2, 3]
    assert project.manifest.installed == 1
    assert len(set(writer.failures)) == 2
    assert all("ound 2" in s or "ound 3" in s for s in writer.failures)
    full.clear()
    if not better:  # another round ends when there is room, and before it is tried again
        project.rounds.add(adapter, {"cells": (strokes(), ())}, Settings())
    writer.retry()
    writer.flush()
    assert not writer.waiting
    assert [r.number for r in project.rounds.records()] == [1, 2, 3] + [4] * (not better)
    assert project.manifest.installed == (3 if better else 4)


def test_a_recipe_says_what_reviewed_regions_it_lost(
    project: Project, adapter: Adapter, tmp_path: Path
) -> None:
    whole = np.array([[-1, -1], [-1, 999], [999, 999], [999, -1]], float)
    project.update(lambda m: replace(m, classes=adapter.classes))
    project.rounds.add(adapter, {"cells": (strokes(), [(0, whole)])}, Settings())
    project.rounds.add(adapter, {"cells": (strokes(), ())}, Settings())
    assert len(project.rounds.labels(2)) == 1
    path = tmp_path / "mine.json"
    project.rounds.export_recipe(1, path)
    for folder, read in (
        (tmp_path / "mine_annotations", lambda: Recipe.read(path).learnt(tmp_path)),
        (project.rounds.folder(1) / "annotations", lambda: project.rounds.labels(1)),
    ):
        read()
        (folder / "cells.json").write_text('{"format": 1, "reviewed": []}')
        with pytest.raises(InputError, match=r"cells\.json"):
            read()
        (folder / "cells.json").unlink()
        with pytest.raises(InputError, match=r"cells\.json"):
            read()
    data = json.loads(path.read_text())
    del data["regions"]  # as it was before
    path.write_text(json.dumps(data))
    Recipe.read(path).learnt(tmp_path)


def test_a_recipe_is_exported_with_all_it_needs(with_rounds: Project, tmp_path: Path) -> None:
    from napari_convlora.project import Recipe

    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "mine.json"
    with_rounds.rounds.export_recipe(2, path)
    recipe = Recipe.read(path)
    (image,) = recipe.labelled(path.parent)
    assert (image.annotations == strokes(1, 1)).all()
    assert (image.image == picture(tmp_path / "b.tif")).all()
    assert "adapt --recipe mine.json" in recipe.command
    assert any(v.startswith("torch ") for v in recipe.versions)


@pytest.mark.parametrize(
    "change", [{"labels": "../x"}, {"start": "/etc/passwd"}, {"images": 3}, {"regions": [1, 2]}]
)
def test_hostile_recipes_are_refused(with_rounds: Project, tmp_path: Path, change: dict) -> None:
    from napari_convlora.project import Recipe

    data = json.loads((with_rounds.rounds.folder(1) / "recipe.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(data | change))
    with pytest.raises(InputError, match="damaged") as error:
        Recipe.read(tmp_path / "r.json")
    one_sentence(error)


def test_twenty_images_reopen_within_seconds(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "p", Manifest(classes=default_classes(2)))
    pixels = np.random.default_rng(0).integers(0, 255, (1, 512, 512, 1), np.uint8)
    painted = np.zeros((1, 512, 512), np.int32)
    painted[0, 100:200, 100:300] = 2
    for i in range(20):
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels[0, ..., 0])
        place = {"shape": pixels.shape, "layer_shape": (512, 512)}
        own = project.add(entry(f"image {i}", tmp_path / f"{i}.tif", **place), pixels)
        project.keep_annotations(own.stem, painted)
    project.close()
    start = time.perf_counter()
    again = Project.open(tmp_path / "p")
    stems, images = again.labelled()
    assert time.perf_counter() - start < 5
    assert len(stems) == len(images) == 20
    assert all((image.annotations == painted).all() for image in images)


@pytest.mark.parametrize("in_memory", [True, False])
def test_strokes_on_an_image_whose_file_is_damaged_are_kept(
    tmp_path: Path, in_memory: bool
) -> None:
    pixels = np.random.default_rng(0).random((60, 80))
    path = tmp_path / "a.zarr"
    source = zarr.create_array(path, data=pixels, chunks=(20, 20))
    chunk = path / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    project = Project.create(tmp_path / "p")
    shape = (1, 60, 80, 1)
    image = entry("a", path, shape=shape, layer_shape=shape[1:3])
    own = project.add(image, pixels.reshape(shape) if in_memory else lazy_planes(source))
    painted = np.ones(shape[:3], np.uint8)
    project.keep_annotations(own.stem, painted)
    assert (project.annotations(own.stem)[0] == 1).all()
    if in_memory:  # the file could not bring it back
        assert (own.read(project.folder)[0][..., 0] == pixels).all()
    else:
        assert Path(own.absolute) == path
    project.close()
