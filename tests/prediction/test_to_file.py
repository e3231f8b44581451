"""An image of any size goes into a file, and neither a kill nor Ctrl-C costs a finished block."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from napari_convlora.backbones import Backbone
from napari_convlora.cli import commands, parser
from napari_convlora.control import RunControl
from napari_convlora.errors import InputError
from napari_convlora.formats import label_store, opening
from napari_convlora.formats.opening import open_image
from napari_convlora.images import regions
from napari_convlora.labels.classes import read_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction import to_file
from napari_convlora.prediction.predict import predict
from tests.conftest import make_scene

# What a user's command does, with a backbone of random weights.
COMMAND = """
import sys
import torch
from napari_convlora import cli
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.session import session
torch.set_num_threads(1)
session.load_backbone = lambda name: random_backbone()
sys.exit(cli.main(sys.argv[1:]))
"""


SLOW = 600, 1100
slowly = pytest.mark.parametrize("folder", [SLOW], indirect=True, ids=["slow"])
"""Blocks of full size, so that there is time to break a run off between them."""


@pytest.fixture
def folder(
    tmp_path: Path,
    sparse: Adapter,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An adapter, and an image of several blocks as zarr, small ones unless it is `slowly`."""
    size = getattr(request, "param", (260, 400))
    if size != SLOW:
        for module in (regions, label_store):
            monkeypatch.setattr(module, "BLOCK", 128)
    sparse.save(tmp_path / "a.safetensors")
    image = make_scene(*size)[0].image[0, ..., 0]
    zarr.create_array(tmp_path / "big.zarr", data=image, chunks=(size[0] // 2, size[0] // 2))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    images = ["--images", str(folder / "big.zarr"), "--out", str(folder / "out")]
    return ["predict", str(folder / "a.safetensors"), *images, "--device", "cpu", *more]


def test_a_zarr_that_was_written_to_is_another_image(folder: Path) -> None:
    adapter, image = folder / "a.safetensors", folder / "big.zarr"
    before = to_file.task(adapter, image, "litemedsam")
    assert to_file.task(adapter, image, "litemedsam") == before
    array = zarr.open_array(image, mode="r+")
    array[75:, 150:] = 1 - array[75:, 150:]
    assert to_file.task(adapter, image, "litemedsam") != before


def start(folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments(folder, *more)],
        stderr=subprocess.PIPE,
        text=True,
    )


def chunks(folder: Path, format_: str = "tif") -> dict[Path, int]:
    """Finished blocks, and when each was written."""
    work = folder / "out" / f".big.{format_}.unfinished" / "0" / "c"
    found = work.rglob("*") if work.exists() else ()
    return {p: p.stat().st_mtime_ns for p in found if p.is_file() and p.name.isdecimal()}


def wait_for_blocks(process: subprocess.Popen, folder: Path, n: int) -> None:
    end = time.monotonic() + 60
    while len(chunks(folder)) < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def steps(folder: Path, sparse: Adapter, backbone: Backbone):
    """Predict the image into a file, in this process."""

    def run(name: str = "big.tif", control: RunControl | None = None) -> Iterator:
        image = open_image(folder / "big.zarr")
        task = to_file.task(folder / "a.safetensors", folder / "big.zarr", "random_tiny", "cpu")
        return to_file.predict_file(
            task, sparse, backbone, image, folder / name, control or RunControl()
        )

    return run


def test_the_file_holds_what_predict_returns(
    folder: Path, steps, sparse: Adapter, backbone: Backbone
) -> None:
    whole = Returning(predict(sparse, backbone, open_image(folder / "big.zarr"), device="cpu"))
    list(whole)
    expected = whole.value.labels[0]
    assert len(np.unique(expected)) > 1
    for name in ("big.tif", "labels.zarr"):
        progress = list(steps(name))
        assert progress[-1].done == progress[-1].total
    np.testing.assert_array_equal(tifffile.imread(folder / "big.tif"), expected)
    zarr_labels = zarr.open_group(folder / "labels.zarr", mode="r")["0"]
    np.testing.assert_array_equal(zarr_labels[...], expected)
    assert (folder / "classes.json").exists()
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows knows no SIGKILL")
@slowly
def test_a_killed_run_goes_on_where_it_was(folder: Path, steps) -> None:
    process = start(folder)
    wait_for_blocks(process, folder, 2)
    process.kill()
    process.communicate()
    before = chunks(folder)
    assert 2 <= len(before) < 6
    assert not (folder / "out" / "big.tif").exists()

    process = start(folder)
    wait_for_blocks(process, folder, len(before) + 1)
    assert {p: t for p, t in chunks(folder).items() if p in before} == before
    assert process.wait(60) == commands.DONE, process.communicate()[1]
    process.communicate()
    list(steps())
    assert (folder / "out" / "big.tif").read_bytes() == (folder / "big.tif").read_bytes()
    assert sorted(os.listdir(folder / "out")) == ["big.tif", "classes.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
@slowly
def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    process = start(folder)
    wait_for_blocks(process, folder, 1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == commands.FAILED
    assert "the same command goes on where it was" in text
    assert "Traceback" not in text
    assert 1 <= len(chunks(folder)) < 6


def test_stop_cancels_between_tiles(folder: Path, steps) -> None:
    control = RunControl()
    seen = []
    for step in steps(control=control):
        seen.append(step)
        control.stop()
    assert len(seen) == 1 < seen[0].total
    assert not (folder / "big.tif").exists()
    rest = list(steps())
    assert rest[-1].total == seen[0].total
    assert (folder / "big.tif").exists()


@pytest.mark.parametrize("name", ["big.tif", "labels.zarr"])
def test_a_folder_keeps_its_class_table_and_damaged_blocks_are_predicted_again(
    folder: Path, steps, sparse: Adapter, name: str
) -> None:
    list(steps(name))
    whole = opening.open_image(folder / name)[0][:, :]
    (folder / "classes.json").write_text('{"1": "of other masks"}')
    control = RunControl()
    for step in steps(name, control):
        if step.done > 0.8 * step.total:  # the first blocks are written by then
            control.stop()
    store = folder / f".{name}.unfinished"
    chunk = next(p for p in sorted(store.rglob("*")) if p.is_file() and p.name.isdecimal())
    chunk.write_bytes(b"")  # as after a power cut
    list(steps(name))
    np.testing.assert_array_equal(opening.open_image(folder / name)[0][:, :], whole)
    assert (folder / "classes.json").read_text() == '{"1": "of other masks"}'
    assert read_classes(folder / f"{name}.classes.json") == sparse.classes


def test_another_adapter_does_not_go_on_with_it(folder: Path, steps, sparse: Adapter) -> None:
    control = RunControl()
    for _ in steps(control=control):
        control.stop()
    replace(sparse, pixel_scale=0.3).save(folder / "a.safetensors")
    with pytest.raises(InputError, match=r"delete that folder, or choose another --out\.$"):
        list(steps())


def test_probabilities_and_foreign_folders_are_refused(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: None)
    assert parser.main(arguments(folder, "--probabilities")) == commands.FAILED
    assert "--probabilities is for small images" in capsys.readouterr().err
    (folder / "out" / "big.zarr").mkdir()
    assert parser.main(arguments(folder, "--format", "zarr")) == commands.FAILED
    assert "is not a prediction" in capsys.readouterr().err


def test_a_finished_mask_counts_though_its_blocks_cannot_be_removed(
    folder: Path, steps, monkeypatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    for _ in steps():
        monkeypatch.setattr("os.rmdir", refuse)
    assert (folder / "big.tif").exists()
    assert (folder / "classes.json").exists()


def test_an_image_that_vanishes_while_it_is_opened_does_not_end_the_others(
    folder: Path, backbone: Backbone, monkeypatch, capsys
) -> None:
    tifffile.imwrite(folder / "small.tif", make_scene()[0].image[0, ..., 0])
    monkeypatch.setattr("napari_convlora.session.session.load_backbone", lambda name: backbone)

    def then_gone(path: Path):
        image = open_image(path)
        if path.name == "big.zarr":
            path.rename(folder / "elsewhere.zarr")
        return image

    monkeypatch.setattr("napari_convlora.cli.sources.open_image", then_gone)
    both = ["--images", str(folder / "big.zarr"), str(folder / "small.tif")]
    assert parser.main([*arguments(folder), *both]) == commands.FAILED
    said = capsys.readouterr()
    assert "big.zarr' cannot be read or written (No such file or directory); check it" in said.err
    assert "1 of 2 images predicted" in said.out
    assert (folder / "out" / "small.tif").exists()


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from napari_convlora.prediction import to_file
from napari_convlora.model.adapter import Adapter
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.control import RunControl
from napari_convlora.formats.opening import open_image
torch.set_num_threads(1)
folder = Path(sys.argv[1])
peaks = []
for name in sys.argv[2:]:
    adapter, image = folder / "a.safetensors", folder / name
    task = to_file.task(adapter, image, "random_tiny", "cpu")
    out = folder / f"{image.stem}.tif"
    model = Adapter.load(adapter), random_backbone()
    list(to_file.predict_file(task, *model, open_image(image), out, RunControl()))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_sixteen_times_the_pixels_take_no_more_memory(tmp_path: Path, adapter: Adapter) -> None:
    """16 MB of pixels, whose logits alone would take 200 MB."""
    branch = replace(adapter.model, detail=False)
    state = {n: t for n, t in adapter.state.items() if not n.startswith("detail.")}
    replace(adapter, model=branch, state=state, pixel_scale=0.125).save(tmp_path / "a.safetensors")
    for name, n in (("small", 1024), ("big", 4096)):
        made = zarr.create_array(
            tmp_path / f"{name}.zarr", shape=(n, n), dtype=np.uint8, chunks=(512, 512)
        )
        made[...] = np.random.default_rng(0).integers(0, 255, (n, n), np.uint8)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "small.zarr", "big.zarr"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    small, big = map(float, done.stdout.split())
    print(f"{big - small:.0f} MB more")
    assert big - small < 60
