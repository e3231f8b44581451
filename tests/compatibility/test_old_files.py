"""Adapters, a project and recipes that an earlier version has left on disk; see `make_files`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

from napari_convlora import Adapter, predict, read_image
from napari_convlora.backbones import Backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.cli import main
from napari_convlora.project import Project

DATA = Path(__file__).with_name("data")
ADAPTERS = {
    "conv_lora": DATA / "adapters" / "conv_lora.safetensors",
    "classification_branch": DATA / "adapters" / "classification_branch.safetensors",
    "decoder_only": DATA / "adapters" / "decoder_only.safetensors",
    "lora": DATA / "project" / "rounds" / "002" / "adapter.safetensors",
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The one that everything was made with, for every name."""
    backbone = random_backbone()
    backbone.load_state_dict(load_file(DATA / "backbone.safetensors"), strict=False)
    return backbone


@pytest.fixture(scope="module")
def before() -> dict[str, np.ndarray]:
    """What was predicted before."""
    with np.load(DATA / "predictions.npz") as found:
        return dict(found)


@pytest.fixture
def old(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all files, to be written to."""
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    return shutil.copytree(DATA, tmp_path / "old")


@pytest.fixture
def project(old: Path) -> Iterator[Project]:
    with closing(Project.open(old / "project")) as project:
        yield project


def run(*arguments: object) -> None:
    assert main([*map(str, arguments)]) == 0


def same(array: np.ndarray, before: np.ndarray) -> None:
    """Class ids are the same, but for few that another processor may round differently."""
    assert array.shape == before.shape
    assert (array != before).mean() <= 1e-3


def probabilities(
    adapter: Adapter, backbone: Backbone, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return class ids, and how likely each class is."""
    steps = predict(adapter, backbone, image, probabilities=True, device="cpu")
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value.labels, end.value.probabilities


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_predicts_what_it_did(
    name: str, backbone: Backbone, before: dict[str, np.ndarray]
) -> None:
    adapter = Adapter.load(ADAPTERS[name])
    assert [(c.id, c.name, c.colour, c.background) for c in adapter.classes] == [
        (1, "matrix", "#4477aa", True),
        (2, "Körner", "#ee6677", False),
        (7, "stripes", "#228833", False),
    ]
    image = read_image(DATA / "images" / "colours.png")
    labels, shares = probabilities(adapter, backbone, image)
    before_shares = before[f"{name}_probabilities"]
    np.testing.assert_allclose(shares[..., ::3, ::3], before_shares, rtol=0, atol=1e-5)
    # Another processor adds up in another order, which may tip where two classes are as likely.
    second, first = np.sort(shares, axis=1)[:, -2:].swapaxes(0, 1)
    tied = first - second < 1e-4
    np.testing.assert_array_equal(labels[~tied], before[name][~tied])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_saved_again_loses_nothing(name: str, tmp_path: Path) -> None:
    old = Adapter.load(ADAPTERS[name])
    again = Adapter.load(old.save(tmp_path / "again.safetensors"))
    assert "holds no SHA-256" in old.remark  # earlier versions wrote none
    assert replace(again, state={}) == replace(old, state={}, remark="")
    assert again.state.keys() == old.state.keys()
    assert all(torch.equal(tensor, old.state[key]) for key, tensor in again.state.items())


def test_an_adapter_predicts_files(old: Path, before: dict[str, np.ndarray]) -> None:
    image = old / "images" / "colours.png"
    for name in ("conv_lora", "classification_branch"):
        run("predict", ADAPTERS[name], "--images", image, "--out", old / name, "--device", "cpu")
        same(tifffile.imread(old / name / "colours.tif"), before[name][0])


def test_a_project_says_what_it_said(project: Project) -> None:
    said: dict[str, Any] = {
        "manifest": asdict(project.manifest),
        "rounds": [asdict(record) for record in project.rounds.records()],
        "correction": asdict(project.rounds.corrections(1)),
    }
    before = json.loads((DATA / "said.json").read_text(encoding="utf-8"))
    annotations = before.pop("annotations")
    assert kept(json.loads(json.dumps(said)), before) == before
    assert set(annotations) == {entry.stem for entry in project.manifest.images}
    for stem, (counts, regions) in annotations.items():
        labels, outlines = project.annotated(stem)
        assert np.unique(labels, return_counts=True)[1].tolist() == counts
        assert [[plane, outline.tolist()] for plane, outline in outlines] == regions
        assert project.entry(stem).read(project.folder).shape == (*labels.shape, 3)


def kept(found: Any, before: Any) -> Any:
    """Return `found` without what an earlier version did not know of."""
    if isinstance(before, dict):
        return {key: kept(found[key], value) for key, value in before.items()}
    if isinstance(before, list) and len(found) == len(before):
        return [kept(*pair) for pair in zip(found, before, strict=True)]
    return found


def test_a_project_predicts_what_it_did(old: Path, before: dict[str, np.ndarray]) -> None:
    run("predict", "--project", old / "project", "--out", old / "masks")
    for stem in ("stack", "colours_RGB"):
        same(tifffile.imread(old / "masks" / f"{stem}.tif"), before[f"mask_{stem}"])
        predicted = Path("predictions", f"{stem}.tif")
        now, then = (tifffile.imread(at / "project" / predicted) for at in (old, DATA))
        same(now, then)


@pytest.mark.parametrize("start", ["installed", "base"])
def test_a_project_goes_on(old: Path, start: str) -> None:
    run("adapt", "--project", old / "project", "--start", start, "--max-steps", 3)
    with closing(Project.open(old / "project")) as project:
        first, second, third = project.rounds.records()
        assert (third.steps, third.images) == (3, second.images)
        assert third.started_from == ("base" if start == "base" else "round 2")
        assert third.pixels == {**second.pixels, 1: second.pixels[1] + 20}  # painted since
        assert {r.number: project.rounds.adapter(r.number).classes for r in (first, third)} == {
            1: project.manifest.classes,
            3: project.manifest.classes,
        }


def test_a_project_is_painted_on_and_copied(project: Project, old: Path) -> None:
    labels, regions = project.annotated("colours_RGB")
    labels[0, 20:24, 4:8] = 2
    project.keep_annotations("colours_RGB", labels, regions)
    project.save_as(old / "copy").close()
    with closing(Project.open(old / "copy")) as copy:
        np.testing.assert_array_equal(copy.annotated("colours_RGB")[0], labels)
        assert copy.entry("colours_RGB").counts == {2: 16}
        assert copy.rounds.records() == project.rounds.records()
        assert copy.manifest.removed == ("dropped",)


@pytest.mark.parametrize(
    ("recipe", "number"), [("recipe/mine.json", 1), ("project/rounds/002/recipe.json", 2)]
)
def test_a_recipe_repeats_its_round(
    recipe: str, number: int, old: Path, backbone: Backbone, project: Project
) -> None:
    run("adapt", "--recipe", old / recipe, "--out", old / "again.safetensors")
    again, round_ = Adapter.load(old / "again.safetensors"), project.rounds.adapter(number)
    assert (again.model, again.classes, again.pixel_scale, again.normalizer) == (
        round_.model,
        round_.classes,
        round_.pixel_scale,
        round_.normalizer,
    )
    settled = "steps", "ended_by", "seed", "start", "labelled_pixels", "threads"
    assert [again.summary[key] for key in settled] == [round_.summary[key] for key in settled]
    # Not bit for bit: the loss was mended since and weighs smoothing by the pixel's own class. With
    # the loss of then they are equal; another seed or start is ten times as far away.
    image = project.entry("stack").read(project.folder)
    now, then = (probabilities(adapter, backbone, image)[1] for adapter in (again, round_))
    assert abs(now - then).mean() < 0.02
