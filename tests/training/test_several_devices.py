from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.cli import commands, parser
from napari_convlora.config import MethodName, ModelConfig, TrainConfig
from napari_convlora.errors import InputError
from napari_convlora.events import Step
from napari_convlora.formats.opening import read_image, read_labels
from napari_convlora.labels.around_labels import labelled_parts
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.training import adapt, several_devices
from tests.conftest import make_scene
from tests.random_command import QUICK
from tests.training.rounds import finished

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image and its strokes."""
    scene, _ = make_scene()
    tifffile.imwrite(tmp_path / "image.tif", (scene.image[0, ..., 0] * 255).astype(np.uint8))
    tifffile.imwrite(tmp_path / "strokes.tif", scene.annotations[0].astype(np.uint8))
    return tmp_path


def command(folder: Path, method: MethodName, *more: str) -> list[str]:
    files = "--images", str(folder / "image.tif"), "--labels", str(folder / "strokes.tif")
    fixed = "--device", "cpu", "--max-steps", str(STEPS), "--seed", "3", "--method", method
    return ["adapt", *files, *fixed, "--out", str(folder / "a.safetensors"), *more]


def in_two_processes(folder: Path, method: MethodName, *more: str) -> tuple[Adapter, str]:
    pytest.importorskip("lightning_fabric", reason="needs the extra multi-gpu")
    ended = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "random_command.py"),
            *command(folder, method, "--devices", "2", *more),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == commands.DONE, ended.stderr
    assert ended.stdout.count("a.safetensors: 3 classes") == 1, "one process reports"
    return Adapter.load(folder / "a.safetensors"), ended.stderr


def alone(folder: Path, method: MethodName) -> tuple[Adapter, list[float]]:
    """The same round with batches of two in this process, and its losses."""
    image = read_image(folder / "image.tif")
    labels = read_labels(folder / "strokes.tif", image.shape[:3])
    images = [part for _, part in labelled_parts(image, labels, "image")]
    config = replace(QUICK, batch=2, max_steps=STEPS, seed=3, device="cpu")
    model = ModelConfig(method=method)
    events = list(adapt(random_backbone(), images, default_classes(3), model, config))
    return finished(events).adapter, [e.loss for e in events if isinstance(e, Step)]


def test_two_processes_learn_what_one_learns_from_the_same_batches(folder: Path) -> None:
    shared, said = in_two_processes(folder, "lora", "--history", str(folder / "history.csv"))
    assert "Batches have 2 views" in said
    expected, losses = alone(folder, "lora")
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-4)
    assert shared.summary["score"] == pytest.approx(expected.summary["score"], abs=1e-3)
    assert shared.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        # Adam makes much of the rounding of a gradient near zero: single values may differ.
        difference = (shared.state[name] - tensor).abs()
        assert difference.mean() < 2e-5, name


@pytest.mark.parametrize("where", ["--project", "--recipe"])
def test_projects_and_recipes_are_trained_on_one_device(
    folder: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "--out", str(folder / "a.safetensors")
    assert parser.main(["adapt", where, str(folder), *out, "--devices", "2"]) == parser.BAD_USAGE
    assert "--devices does not go with" in capsys.readouterr().err


def test_without_the_extra_a_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(InputError, match=r"napari-convlora\[multi-gpu\]"):
        several_devices.launch(2, "cpu")


def test_batches_have_a_view_for_every_device() -> None:
    config = several_devices.enlarge_batches(TrainConfig(batch=1, decoder_batch=6), 4)
    assert (config.batch, config.decoder_batch) == (4, 6)
