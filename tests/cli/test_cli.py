from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import tifffile
import torch
import zarr
from PIL import Image
from rich.console import Console

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.cli import commands, console, parser
from napari_convlora.config import TrainConfig
from napari_convlora.labels.classes import read_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import Settings
from tests.conftest import make_scene

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
COMMANDS = ["adapt", "predict", "evaluate", "weights", "doctor", "demo"]


@pytest.fixture
def folder(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images with strokes and truth, and a tiny random backbone under every name."""
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)
    quick = Settings(train=TrainConfig(detail_steps=60))
    monkeypatch.setattr("napari_convlora.cli.sources.Settings", lambda: quick)
    for i in range(2):
        scene, truth = make_scene(seed=i)
        grey = (scene.image[0, ..., 0] * 255).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"image{i}.tif", grey)
        tifffile.imwrite(tmp_path / f"strokes{i}.tif", scene.annotations[0].astype(np.uint8))
        (tmp_path / "truth").mkdir(exist_ok=True)
        Image.fromarray(truth[0].astype(np.uint8)).save(tmp_path / "truth" / f"image{i}.png")
    return tmp_path


@pytest.fixture
def trained(folder: Path, adapter: Adapter) -> Path:
    """The same folder with an adapter in it."""
    adapter.save(folder / "a.safetensors")
    return folder


def adapt(folder: Path, *more: str) -> int:
    return parser.main(
        [
            "adapt",
            *("--images", str(folder / "image0.tif"), "--labels", str(folder / "strokes0.tif")),
            *("--out", str(folder / "a.safetensors"), "--max-steps", "4", "--device", "cpu"),
            *more,
        ]
    )


def test_the_bar_of_a_round_shows_the_time_that_the_round_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = io.StringIO()
    terminal = Console(file=text, force_terminal=True, width=120)
    monkeypatch.setattr(console, "err", terminal)
    with console.bar("adapting", 4) as update:
        update(completed=2, note="loss 0.100", left=75.0)
    assert "2/4 loss 0.100 about 1 min 15 s left" in re.sub(
        r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text.getvalue()
    )
    with console.bar("predicting", 4) as update:
        update(completed=2)
    assert "-:--:--" in text.getvalue(), "rich's own guess, where nothing is told"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    return text


def test_zarr_images_are_learnt_from_and_predicted(folder: Path) -> None:
    grey = tifffile.imread(folder / "image0.tif")
    zarr.create_array(folder / "image0.zarr", data=grey, chunks=(40, 40))
    images = ["--images", str(folder / "image0.zarr")]
    assert adapt(folder, *images) == commands.DONE
    out = folder / "masks"
    command = ["predict", str(folder / "a.safetensors"), "--out", str(out), "--device", "cpu"]
    assert parser.main([*command, *images]) == commands.DONE
    from_zarr = tifffile.imread(out / "image0.tif")
    assert parser.main([*command, "--images", str(folder / "image0.tif")]) == commands.DONE
    np.testing.assert_array_equal(tifffile.imread(out / "image0.tif"), from_zarr)
    assert parser.main([*command, *images, "--format", "zarr"]) == commands.DONE
    np.testing.assert_array_equal(zarr.open_group(out / "image0.zarr")["0"][...], from_zarr)


def test_adapt_predict_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "classes.json"
    table.write_text('{"1": "dark", "2": "bright", "3": "striped"}')
    history = folder / "history.csv"
    assert adapt(folder, "--classes", str(table), "--history", str(history)) == commands.DONE
    rows = list(csv.DictReader(history.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 for row in rows)
    said = one_line(capsys)
    assert said.startswith("A step takes ")
    assert "; about " in said
    assert said.endswith(" to go.")

    images = [str(folder / f"image{i}.tif") for i in range(2)]
    out = folder / "masks"
    command = ["predict", str(folder / "a.safetensors"), "--images", *images, "--out", str(out)]
    assert parser.main([*command, "--probabilities", "--device", "cpu"]) == commands.DONE
    for i in range(2):
        mask = tifffile.imread(out / f"image{i}.tif")
        assert mask.shape == (96, 96)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {1, 2, 3}
        assert tifffile.imread(out / f"image{i}_probabilities.tif").shape == (3, 96, 96)
    names = [c["name"] for c in json.loads((out / "classes.json").read_text())["classes"]]
    assert names == ["dark", "bright", "striped"]

    for path in out.glob("*_probabilities.tif"):
        path.unlink()
    (out / "classes.json").unlink()
    result = folder / "scores.json"
    command = ["evaluate", "--predictions", str(out), "--labels", str(folder / "truth")]
    assert parser.main([*command, "--json", str(result)]) == commands.DONE
    scores = json.loads(result.read_text())
    assert set(scores["images"]) == {"image0", "image1"}
    printed = capsys.readouterr().out
    assert f"{scores['scores']['mean_iou']:.4f}" in printed


@pytest.mark.parametrize("method", ["lora", "decoder_only"])
def test_other_methods_are_selectable(folder: Path, method: str) -> None:
    assert adapt(folder, "--method", method, "--preset", "full") == commands.DONE


def test_one_bad_image_does_not_spoil_the_others(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    images = [str(folder / name) for name in ("broken.png", "image1.tif")]
    command = ["predict", str(folder / "a.safetensors"), "--images", *images]
    assert parser.main([*command, "--out", str(folder / "masks")]) == commands.FAILED
    assert (folder / "masks" / "image1.tif").exists()
    assert "broken.png" in one_line(capsys)


def spoil(folder: Path, what: str) -> list[str]:
    """Make one thing wrong; returns further arguments of `adapt`."""
    labels = folder / "strokes0.tif"
    strokes = tifffile.imread(labels)
    match what:
        case "damaged":
            (folder / "image0.tif").write_bytes((folder / "image0.tif").read_bytes()[:400])
        case "empty":
            tifffile.imwrite(labels, strokes * 0)
        case "one class":
            tifffile.imwrite(labels, np.minimum(strokes, 1))
        case "another size":
            tifffile.imwrite(labels, strokes[:50])
        case "float":
            tifffile.imwrite(labels, strokes.astype(np.float32))
        case "class table":
            (folder / "c.json").write_text('{"1": "dark"}')
            return ["--classes", str(folder / "c.json")]
        case "pixel":
            tifffile.imwrite(folder / "image0.tif", np.full((96, 96), 7, np.uint8))
        case "NaN":
            tifffile.imwrite(folder / "image0.tif", np.full((96, 96), np.nan, np.float32))
        case "seed":
            return ["--seed", "-1"]
        case "cuda":
            return ["--device", "cuda"]
        case "cannot be written":
            return ["--out", str(folder / "image1.tif" / "a.safetensors")]
    return []


@pytest.mark.parametrize(
    "what",
    [
        *("damaged", "empty", "one class", "another size", "float", "class table"),
        *("pixel", "NaN", "cannot be written", "seed"),
        pytest.param("cuda", marks=NO_CUDA),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"empty": "Nothing is annotated", "one class": "Only class 1", "float": "whole numbers"}
    said |= {"another size": "50 x 96"}
    assert adapt(folder, *spoil(folder, what)) == commands.FAILED
    assert said.get(what, what) in one_line(capsys)
    assert not (folder / "a.safetensors").exists()


def test_a_pickle_is_no_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "evil.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    command = ["predict", str(path), "--images", str(folder / "image0.tif"), "--out", str(folder)]
    assert parser.main(command) == commands.FAILED
    assert "not an adapter" in one_line(capsys)


def test_a_missing_checkpoint_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert parser.main(["weights", "path", "vit_b"]) == commands.FAILED
    assert "weights fetch vit_b" in one_line(capsys)


@pytest.mark.parametrize("command", ["adapt", "predict"])
def test_a_missing_backbone_is_one_sentence(
    trained: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", load_backbone)
    monkeypatch.setenv("NAPARI_CONVLORA_WEIGHTS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    image, out = ("--images", str(folder / "image0.tif")), str(folder / "masks")
    if command == "adapt":
        assert adapt(folder, "--backbone", "vit_b") == commands.FAILED
    else:
        adapter = str(folder / "a.safetensors")
        more = ("--out", out, "--backbone", "vit_b")
        assert parser.main(["predict", adapter, *image, *more]) == commands.FAILED
    assert "weights fetch vit_b" in one_line(capsys)


@pytest.mark.parametrize("option", ["--out", "--history"])
@pytest.mark.parametrize("place", [".", "absent/file"])
def test_where_results_go_is_checked_before_training(
    folder: Path,
    option: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "napari_convlora.session.session.adapt", lambda *_, **__: pytest.fail("trained")
    )
    assert adapt(folder, option, str(folder / place)) == commands.FAILED
    assert "cannot be written" in one_line(capsys)


def spoil_prediction(folder: Path, what: str) -> list[str]:
    """Make one thing wrong; returns the arguments of `predict`."""
    adapter, image, out = folder / "a.safetensors", folder / "image0.tif", folder / "masks"
    more: list[str] = []
    match what:
        case "no adapter file":
            adapter = folder / "absent.safetensors"
        case "damaged":
            adapter.write_bytes(adapter.read_bytes()[:-100])
        case "no napari-convlora adapter":
            safetensors.numpy.save_file({"x": np.zeros(2)}, adapter)
        case "Cannot create":
            out = image / "masks"
        case "3 channels":
            tifffile.imwrite(image, np.eye(30, dtype=np.uint8)[..., None].repeat(3, -1))
        case "NaN":
            tifffile.imwrite(image, np.full((30, 30), np.nan, np.float32))
        case "does not exist":
            image.unlink()
        case "cuda":
            more = ["--device", "cuda"]
    return ["predict", str(adapter), "--images", str(image), "--out", str(out), *more]


@pytest.mark.parametrize(
    "what",
    [
        *("no adapter file", "damaged", "no napari-convlora adapter", "Cannot create"),
        *("3 channels", "NaN", "does not exist"),
        pytest.param("cuda", marks=NO_CUDA),
    ],
)
def test_a_prediction_that_cannot_be_made_is_one_sentence(
    trained: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.main(spoil_prediction(trained, what)) == commands.FAILED
    assert what in one_line(capsys)


@pytest.mark.parametrize("name", ["a[red]b", "c[/d]e"])
def test_brackets_in_names_are_printed_as_they_are(
    trained: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = ("--images", str(trained / "image0.tif"))
    out = trained / name
    assert parser.main(["predict", str(trained / "a.safetensors"), *image, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["adapt", "history", "predict", "linked"])
def test_no_result_replaces_what_it_is_made_from(
    trained: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, strokes = trained / "image0.tif", trained / "strokes0.tif"
    before = image.read_bytes(), strokes.read_bytes()
    match command:
        case "adapt":
            status = adapt(trained, "--out", str(image))
        case "history":
            status = adapt(trained, "--history", str(strokes))
        case _:
            out = trained if command == "predict" else trained / "link"
            if command == "linked":
                out.symlink_to(trained)
            adapter = str(trained / "a.safetensors")
            status = parser.main(["predict", adapter, "--images", str(image), "--out", str(out)])
    assert status == commands.FAILED
    assert "is read here, and the result would replace it" in one_line(capsys)
    assert (image.read_bytes(), strokes.read_bytes()) == before


def test_an_image_of_another_scale_is_remarked_on(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tifffile.imwrite(trained / "usual.tif", tifffile.imread(trained / "image0.tif") / 255)
    tifffile.imwrite(trained / "odd.tif", tifffile.imread(trained / "image0.tif") + 1e5)
    images = [str(trained / name) for name in ("usual.tif", "odd.tif")]
    predict = ["predict", str(trained / "a.safetensors"), "--images", *images]
    assert parser.main([*predict, "--out", str(trained / "masks")]) == commands.DONE
    (record,) = caplog.records
    assert record.getMessage().startswith("odd.tif: Its values (1000")


@pytest.mark.parametrize("steps", [0, 1])
def test_an_interrupted_round_is_no_success(
    folder: Path, steps: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> float:
        signal.raise_signal(signal.SIGINT)
        return 0.5

    name = "begin_head" if steps == 0 else "take_score"
    monkeypatch.setattr(f"napari_convlora.training.loop.{name}", interrupt)
    (folder / "a.safetensors").write_bytes(b"of before")
    more = ["--max-steps", "30"]
    assert adapt(folder, *more) == commands.FAILED
    if steps == 0:
        said = capsys.readouterr().err
        assert "Stopped before the first step; nothing was written." in said
        assert (folder / "a.safetensors").read_bytes() == b"of before"
    else:
        assert Adapter.load(folder / "a.safetensors").summary["ended_by"] == "stopped"


def test_zarr_masks_are_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.array(Image.open(folder / "truth" / "image0.png"))
    for name in ("masks", "wrong", "labels"):
        (folder / name).mkdir()
    Image.fromarray(truth).save(folder / "labels" / "image0.png")
    zarr.create_array(folder / "masks" / "image0.zarr", data=truth)
    zarr.create_array(folder / "wrong" / "image0.zarr", data=truth[1:])
    labels = ["--labels", str(folder / "labels")]
    assert (
        parser.main(["evaluate", "--predictions", str(folder / "masks"), *labels]) == commands.DONE
    )
    assert "1.0000" in capsys.readouterr().out
    failed = parser.main(["evaluate", "--predictions", str(folder / "wrong"), *labels])
    assert failed == commands.FAILED
    assert "compare masks of one size" in one_line(capsys)


def test_a_stack_goes_in_and_comes_out(folder: Path) -> None:
    for name in ("image0.tif", "strokes0.tif"):
        plane = tifffile.imread(folder / name)
        tifffile.imwrite(folder / name, np.stack([plane] * 2), metadata={"axes": "ZYX"})
    assert adapt(folder) == commands.DONE
    image = ("--images", str(folder / "image0.tif"))
    command = ["predict", str(folder / "a.safetensors"), *image, "--out", str(folder / "masks")]
    assert parser.main([*command, "--probabilities"]) == commands.DONE
    assert tifffile.imread(folder / "masks" / "image0.tif").shape == (2, 96, 96)
    shares = tifffile.imread(folder / "masks" / "image0_probabilities.tif")
    assert shares.shape == (2, 3, 96, 96)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main([command, "--help"]) == commands.DONE
    assert "usage: napari-convlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["adapt"],
        ["adapt", "--images", "a", "b", "--labels", "c", "--out", "d"],
        ["adapt", "--images", "a", "--labels", "c", "--out", "d", "--max-steps", "0"],
        ["adapt", "--images", "a", "--labels", "c", "--out", "d", "--max-minutes", "nan"],
        ["predict", "a", "--images", "x/same.tif", "y/same.png", "--out", "d"],
        ["predict", "--project", "p", "--probabilities"],
        ["evaluate", "--predictions", "a", "--labels", "b", "--ignore", "-1"],
        ["weights"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    assert parser.main(arguments) == parser.BAD_USAGE


def test_weights_and_doctor_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main(["weights", "list"]) == commands.DONE
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("vit_b", "vit_l", "vit_h", "vit_t", "litemedsam"))
    assert parser.main(["doctor"]) == commands.DONE
    assert "torch" in capsys.readouterr().out


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "napari_convlora", "predict"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == parser.BAD_USAGE
    assert "usage:" in run.stderr


def test_finished_masks_have_a_background(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.asarray(Image.open(folder / "truth" / "image0.png"))
    mask = Image.fromarray(((truth == 2) * 255).astype(np.uint8))
    mask.save(folder / "mask.png")
    labels = ["--labels", str(folder / "mask.png")]
    assert adapt(folder, *labels) == commands.FAILED
    assert "0 means unlabelled" in (said := one_line(capsys))
    assert "--zero-is-background" in said
    assert adapt(folder, *labels, "--zero-is-background") == commands.DONE
    learnt = Adapter.load(folder / "a.safetensors").classes
    assert [(c.id, c.name, c.background) for c in learnt] == [
        (1, "background", True),
        (2, "object", False),
    ]


def test_finished_masks_may_be_stored_column_by_column(folder: Path) -> None:
    truth = np.asarray(Image.open(folder / "truth" / "image0.png"))
    np.save(folder / "mask.npy", np.asfortranarray((truth == 2) * np.uint8(255)))
    more = ["--labels", str(folder / "mask.npy"), "--zero-is-background"]
    assert adapt(folder, *more) == commands.DONE
    learnt = Adapter.load(folder / "a.safetensors").classes
    assert [(c.id, c.name) for c in learnt] == [(1, "background"), (2, "object")]


def test_finished_masks_keep_the_ids_of_a_class_table(folder: Path) -> None:
    truth = np.asarray(Image.open(folder / "truth" / "image0.png"))
    Image.fromarray((truth == 2).astype(np.uint8)).save(folder / "mask.png")
    (folder / "classes.json").write_text('{"1": "cell", "2": "wall"}')
    more = ["--labels", str(folder / "mask.png"), "--classes", str(folder / "classes.json")]
    assert adapt(folder, *more, "--zero-is-background") == commands.DONE
    learnt = Adapter.load(folder / "a.safetensors").classes
    assert [(c.id, c.name) for c in learnt] == [(1, "cell"), (3, "background")]


def test_a_second_prediction_does_not_rename_the_masks_of_the_first(
    trained: Path, adapter: Adapter, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained / "masks"
    renamed = tuple(replace(c, name=f"other {c.id}") for c in adapter.classes)
    replace(adapter, classes=renamed).save(trained / "b.safetensors")

    def run(name: str, *images: str, more: tuple[str, ...] = ()) -> str:
        paths = [str(trained / image) for image in images]
        command = ["predict", str(trained / name), "--images", *paths, "--out", str(out)]
        assert parser.main([*command, "--device", "cpu", *more]) == commands.DONE
        return capsys.readouterr().out

    assert "classes.json" not in run("a.safetensors", "image0.tif")
    before = (out / "classes.json").read_bytes()
    for _ in range(2):  # again is as once
        said = run("b.safetensors", "image1.tif")
        assert "are in image1.tif.classes.json, which counts before the classes.json" in said
        assert (out / "classes.json").read_bytes() == before
        assert read_classes(out / "image1.tif.classes.json") == renamed
        names = ["classes.json", "image0.tif", "image1.tif", "image1.tif.classes.json"]
        assert sorted(path.name for path in out.iterdir()) == names

    both = "image0.tif", "image1.tif"
    said = run("b.safetensors", *both, more=("--format", "zarr"))
    assert "are in image0.zarr.classes.json and 1 more like it" in said
    assert read_classes(out / "image0.zarr.classes.json") == renamed
    assert read_classes(out / "classes.json") == adapter.classes
    # A table beside its mask is no mask.
    shutil.rmtree(out / "image0.zarr")
    shutil.rmtree(out / "image1.zarr")
    labels = ["--labels", str(trained / "truth")]
    assert parser.main(["evaluate", "--predictions", str(out), *labels]) == commands.DONE


def damaged_zarr(path: Path, pixels: np.ndarray) -> Path:
    """An image of which one chunk is cut off."""
    zarr.create_array(path, data=pixels, chunks=(40, 40))
    chunk = path / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    return path


def test_a_damaged_chunk_ends_its_image_and_no_other(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = tifffile.imread(trained / "image0.tif")
    bad = damaged_zarr(trained / "bad.zarr", grey)
    images = [str(bad), str(trained / "image1.tif")]
    command = ["predict", str(trained / "a.safetensors"), "--images", *images, "--device", "cpu"]
    assert parser.main([*command, "--out", str(trained / "masks")]) == commands.FAILED
    assert (trained / "masks" / "image1.tif").exists()
    said = capsys.readouterr()
    assert "1 of 2 images predicted" in said.out
    assert said.err.startswith(f"{bad}: '{bad}' is damaged in plane 0, rows 0 to 95, ")
    assert len(said.err.strip().splitlines()) == 1

    assert adapt(trained, "--images", str(bad)) == commands.FAILED
    assert f"'{bad}' is damaged in plane 0, rows" in one_line(capsys)

    masks = trained / "masks"
    (masks / "image1.tif").unlink()
    damaged_zarr(masks / "image0.zarr", grey // 200 + 1)
    zarr.create_array(masks / "image1.zarr", data=grey // 200 + 1)
    labels = ["--labels", str(trained / "truth")]
    assert parser.main(["evaluate", "--predictions", str(masks), *labels]) == commands.FAILED
    assert f"'{masks / 'image0.zarr'}' is damaged in plane 0, rows" in one_line(capsys)


PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@PIPES
@pytest.mark.timeout(120)
def test_a_pipe_or_device_among_images_is_refused_and_the_others_are_predicted(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, zero = trained / "pipe", trained / "zero.png"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    images = [str(path) for path in (pipe, zero, trained / "image0.tif")]
    command = ["predict", str(trained / "a.safetensors"), "--images", *images, "--device", "cpu"]
    assert parser.main([*command, "--out", str(trained / "masks")]) == commands.FAILED
    assert (trained / "masks" / "image0.tif").exists()
    said = capsys.readouterr()
    assert "1 of 3 images predicted" in said.out
    first, second = said.err.strip().splitlines()
    assert f"'{pipe}' is a pipe" in first
    assert f"'{zero}' is a device" in second


@PIPES
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "what",
    [
        *("adapter", "backbone", "mask", "image", "labels", "classes", "recipe", "project"),
        *("out", "history", "json"),
    ],
)
def test_pipes_and_devices_are_refused_in_one_sentence(
    trained: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, masks, truth = trained / "pipe", trained / "masks", str(trained / "truth")
    os.mkfifo(pipe)
    image, adapter = str(trained / "image0.tif"), str(trained / "a.safetensors")
    to_masks = ["--images", image, "--out", str(masks)]
    evaluate = ["evaluate", "--labels", truth, "--predictions"]
    expected = "pipe"
    match what:
        case "adapter":
            status = parser.main(["predict", str(pipe), *to_masks])
        case "backbone":
            monkeypatch.setattr("napari_convlora.session.session.load_backbone", load_backbone)
            status = parser.main(["predict", adapter, *to_masks, "--backbone", str(pipe)])
        case "mask":
            masks.mkdir()
            for i in range(2):
                os.mkfifo(masks / f"image{i}.tif")
            status = parser.main([*evaluate, str(masks)])
        case "image":
            status = adapt(trained, "--images", str(pipe))
        case "labels":
            status = adapt(trained, "--labels", str(pipe))
        case "classes":
            status = adapt(trained, "--classes", str(pipe))
        case "recipe":
            out = str(trained / "b.safetensors")
            status = parser.main(["adapt", "--recipe", str(pipe), "--out", out])
        case "project":
            (trained / "p").mkdir()
            os.mkfifo(trained / "p" / "project.json")
            status = parser.main(["predict", "--project", str(trained / "p")])
            expected = "project"
        case "out":
            status = adapt(trained, "--out", str(pipe))
        case "history":
            status = adapt(trained, "--history", os.devnull)
            expected = "device"
        case "json":
            status = parser.main([*evaluate, truth, "--json", os.devnull])
            expected = "device"
    assert status == commands.FAILED
    assert expected in one_line(capsys)
    assert pipe.is_fifo()
    assert Path(os.devnull).is_char_device()


def test_a_disk_without_room_is_found_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10_000))
    monkeypatch.setattr(
        "napari_convlora.training.loop.fit_detail", lambda *_: pytest.fail("trained")
    )
    assert adapt(folder) == commands.FAILED
    assert f"'{folder}' has 0.0 MB free, but about " in one_line(capsys)
    assert not (folder / "a.safetensors").exists()


def test_an_adapter_whose_disk_has_filled_up_is_somewhere_else(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(folder / "user"))
    replace_file = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).parent == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr("os.replace", full)
    assert adapt(folder) == commands.FAILED
    (place,) = (folder / "user" / "rescued").iterdir()
    assert Adapter.load(place).summary["steps"] == 4
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in said
    assert said.endswith(f"; what was learnt is in {place} instead.")
