"""Large images are read by windows, and labels are written block by block."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import zarr

from napari_convlora.errors import InputError
from napari_convlora.formats import label_store, ome_zarr, opening
from napari_convlora.formats.label_store import open_labels
from napari_convlora.formats.ome_zarr import save_zarr
from napari_convlora.formats.opening import open_image, open_levels, read_image, read_labels
from napari_convlora.formats.tiff import save_tiff
from napari_convlora.images import regions
from napari_convlora.images.planes import LazyPlanes
from napari_convlora.images.regions import Block, plan_blocks
from napari_convlora.labels.classes import default_classes

CLASSES = default_classes(3)


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "LARGE", 1000)


def noise(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def whole(image: LazyPlanes) -> np.ndarray:
    return np.stack([plane[0 : image.shape[1], 0 : image.shape[2]] for plane in image])


def write_ome_zarr(path: Path, array: np.ndarray, axes: str, version: str = "0.5") -> None:
    new = version == "0.5"
    scales = [
        {
            "axes": [{"name": a} for a in axes],
            "datasets": [{"path": "full"}, {"path": "half"}],
        }
    ]
    attributes = {"ome": {"multiscales": scales}} if new else {"multiscales": scales}
    zarr.create_group(path, zarr_format=3 if new else 2, attributes=attributes)
    for name in ("full", "half"):
        data = array if name == "full" else array[..., ::2, ::2]
        made = zarr.create_array(
            path / name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=tuple(min(16, n) for n in data.shape),
            zarr_format=3 if new else 2,
        )
        made[...] = data


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (5, 40, 50), (2, 3, 40, 50)])
def test_a_zarr_array_reads_as_an_array_would(
    tmp_path: Path, shape: tuple[int, ...], zarr_format: int
) -> None:
    array = noise(*shape, dtype="uint16")
    np.save(tmp_path / "a.npy", array)
    made = zarr.create_array(
        tmp_path / "a.zarr",
        shape=shape,
        dtype=array.dtype,
        chunks=tuple(min(16, n) for n in shape),
        zarr_format=zarr_format,
    )
    made[...] = array
    image = open_image(tmp_path / "a.zarr")
    assert isinstance(image, LazyPlanes)
    expected = read_image(tmp_path / "a.npy")
    assert image.shape == expected.shape
    assert image.dtype == expected.dtype
    np.testing.assert_array_equal(whole(image), expected)
    np.testing.assert_array_equal(image[-1][5:9, 30:80], expected[-1][5:9, 30:80])
    with pytest.raises(IndexError):
        image[len(image)]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_is_read_at_full_resolution_by_its_axes(tmp_path: Path, version: str) -> None:
    array = noise(2, 3, 40, 50)
    write_ome_zarr(tmp_path / "a.zarr", array, "tcyx", version)
    image = open_image(tmp_path / "a.zarr")
    assert image.shape == (2, 40, 50, 3)
    np.testing.assert_array_equal(whole(image), np.moveaxis(array, 1, -1))


def test_a_bioformats_container_opens_its_first_image(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"bioformats2raw.layout": 3}})
    array = noise(40, 50)
    write_ome_zarr(tmp_path / "a.zarr" / "0", array, "yx")
    np.testing.assert_array_equal(whole(open_image(tmp_path / "a.zarr"))[0, ..., 0], array)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((200, 300), {"tile": (64, 64)}),
        ((200, 300), {"rowsperstrip": 16}),
        ((200, 300, 3), {"tile": (64, 64), "photometric": "rgb"}),
        ((200, 300, 4), {"tile": (64, 64), "photometric": "rgb", "extrasamples": ["unassalpha"]}),
        ((3, 200, 300), {"tile": (64, 64), "metadata": {"axes": "ZYX"}}),
        ((3, 200, 300), {"tile": (64, 64), "metadata": {"axes": "CYX"}, "ome": True}),
    ],
)
@pytest.mark.usefixtures("everything_is_large")
def test_a_large_tiff_reads_as_a_small_one(
    tmp_path: Path, shape: tuple[int, ...], options: dict, compression: str | None
) -> None:
    options = {"photometric": "minisblack", **options}
    tifffile.imwrite(tmp_path / "a.tif", noise(*shape), compression=compression, **options)
    image = open_image(tmp_path / "a.tif")
    assert isinstance(image, LazyPlanes)
    expected = read_image(tmp_path / "a.tif")
    assert image.shape == expected.shape
    np.testing.assert_array_equal(whole(image), expected)


@pytest.mark.usefixtures("everything_is_large")
def test_alpha_is_no_channel_of_a_large_stack_of_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for page in noise(3, 100, 120, 4):
            tif.write(page, photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    image, expected = open_image(tmp_path / "a.tif"), read_image(tmp_path / "a.tif")
    assert isinstance(image, LazyPlanes)
    assert image.shape == expected.shape == (3, 100, 120, 3)
    np.testing.assert_array_equal(whole(image), expected)


@pytest.mark.usefixtures("everything_is_large")
def test_full_resolution_of_a_pyramid_and_npy(tmp_path: Path) -> None:
    array = noise(256, 256)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(array, tile=(64, 64), subifds=1, compression="zlib")
        tif.write(array[::2, ::2], tile=(64, 64), subfiletype=1, compression="zlib")
    np.save(tmp_path / "b.npy", array)
    for name in ("a.tif", "b.npy"):
        image = open_image(tmp_path / name)
        assert isinstance(image, LazyPlanes)
        np.testing.assert_array_equal(whole(image)[0, ..., 0], array)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("kind", ["strips", "tiles", "npy"])
def test_a_large_file_is_opened_again_by_a_process_it_is_sent_to(tmp_path: Path, kind: str) -> None:
    image = noise(4, 64, 80)
    path = tmp_path / ("a.npy" if kind == "npy" else "a.tif")
    if kind == "npy":
        np.save(path, image)
    else:
        tile = (16, 16) if kind == "tiles" else None
        tifffile.imwrite(path, image, tile=tile, photometric="minisblack")
    sent = pickle.dumps(open_image(path))
    assert len(sent) < image.size / 4
    assert (whole(pickle.loads(sent))[..., 0] == image).all()


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_tiff_is_closed_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    path, array = tmp_path / "a.tif", noise(256, 256)
    with tifffile.TiffWriter(path) as tif:
        tif.write(array, tile=(64, 64), subifds=1, compression="zlib")
        tif.write(array[::2, ::2], tile=(64, 64), subfiletype=1, compression="zlib")

    def is_open() -> bool:
        return any(Path(file.path) == path for file in psutil.Process().open_files())

    levels = open_levels(path)
    sent = pickle.dumps(levels[0])
    np.testing.assert_array_equal(whole(levels[1])[0, ..., 0], array[::2, ::2])
    del levels
    again = pickle.loads(sent)
    np.testing.assert_array_equal(whole(again)[0, ..., 0], array)
    assert is_open()
    del again
    gc.collect()
    assert not is_open()


@pytest.mark.usefixtures("everything_is_large")
def test_smaller_copies_follow(tmp_path: Path) -> None:
    image = noise(64, 80)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(image, tile=(16, 16), subifds=1)
        tif.write(image[::2, ::2], tile=(16, 16), subfiletype=1)
    write_ome_zarr(tmp_path / "a.zarr", image, "yx")
    for name in ("a.tif", "a.zarr"):
        first, second = open_levels(tmp_path / name)
        assert (whole(first)[0, ..., 0] == image).all()
        assert (whole(second)[0, ..., 0] == image[::2, ::2]).all()


def test_small_files_are_read_whole(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(20, 30))
    assert isinstance(open_image(tmp_path / "a.tif"), np.ndarray)


@pytest.mark.parametrize("content", ["nothing", "group", "broken", "escape"])
def test_a_folder_that_is_no_image_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.zarr"
    path.mkdir()
    if content == "group":
        zarr.create_group(path)
    elif content == "broken":
        (path / "zarr.json").write_text("{")
    elif content == "escape":  # metadata may not lead out of the folder
        write_ome_zarr(tmp_path / "b.zarr", noise(40, 50), "yx")
        datasets = [{"path": "../b.zarr/full"}]
        zarr.create_group(path, attributes={"ome": {"multiscales": [{"datasets": datasets}]}})
    with pytest.raises(InputError, match=r"'a\.zarr'") as error:
        open_image(path)
    assert str(error.value).count("\n") == 0


def fill(folder: Path, labels: np.ndarray) -> label_store.LabelStore:
    store = open_labels(folder, labels.shape, "me")
    for block in plan_blocks(labels.shape):
        store.write(block, labels[block.plane, block.rows, block.columns])
    return store


@pytest.mark.parametrize("shape", [(1, 700, 1100), (2, 512, 600), (1, 5, 9)])
def test_labels_come_back_from_tiff_and_ome_zarr(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    labels = np.random.default_rng(0).integers(1, 4, shape).astype(np.uint8)
    expected = labels[0] if shape[0] == 1 else labels
    save_tiff(fill(tmp_path / "work", labels), tmp_path / "a.tif", CLASSES)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.pages[0].is_tiled
        np.testing.assert_array_equal(tif.asarray(), expected)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), labels)
    red_of = np.array([0, *(int(info.colour[1:3], 16) for info in CLASSES)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], red_of[labels])

    for _ in range(2):  # the second replaces the first
        save_zarr(fill(tmp_path / "again", labels), tmp_path / "a.zarr", CLASSES)
    assert not (tmp_path / "again").exists()
    np.testing.assert_array_equal(whole(open_image(tmp_path / "a.zarr"))[..., 0], labels)
    ome = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    assert ome["version"] == "0.5"
    colours = ome["image-label"]["colors"]
    assert [c["label-value"] for c in colours] == [1, 2, 3]
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    for i, level in enumerate(ome["multiscales"][0]["datasets"]):
        assert level["coordinateTransformations"][0]["scale"][-2:] == [2.0**i, 2.0**i]
        np.testing.assert_array_equal(group[level["path"]][...], expected[..., :: 2**i, :: 2**i])
    assert max(group[level["path"]].shape[-2:]) <= 1024


def test_what_is_written_is_not_missing(tmp_path: Path) -> None:
    shape = (2, 700, 700)
    store = open_labels(tmp_path / "work", shape, "me")
    blocks_ = plan_blocks(shape)
    assert store.missing(blocks_) == blocks_
    store.write(blocks_[3], np.ones((blocks_[3].height, blocks_[3].width), np.uint8))
    again = open_labels(tmp_path / "work", shape, "me")
    assert again.missing(blocks_) == [b for b in blocks_ if b != blocks_[3]]


def test_labels_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    open_labels(tmp_path / "work", (1, 9, 9), "me")
    with pytest.raises(InputError, match="another adapter, image or setting"):
        open_labels(tmp_path / "work", (1, 9, 9), "you")


def test_a_store_that_was_just_begun_is_begun_again(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "work")  # killed before the array was made
    store = open_labels(tmp_path / "work", (1, 9, 9), "me")
    store.write(Block(0, 0, 0, 9, 9), np.ones((9, 9), np.uint8))
    assert (store.array[...] == 1).all()


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="is not a prediction"):
        ome_zarr.check_replaceable(tmp_path / "a.zarr")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", ["[1]", "[" * 200_000, "pipe"])
@pytest.mark.parametrize("name", ["zarr.json", ".zattrs"])
def test_what_is_no_group_at_all_is_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "a.zarr"
    path.mkdir()
    if name == ".zattrs":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
    if content != "pipe":
        (path / name).write_text(content)
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path / name)
    with pytest.raises(InputError, match="is not a prediction"):
        ome_zarr.check_replaceable(path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_an_image_in_a_closed_folder_is_named(tmp_path: Path, name: str) -> None:
    folder, user = tmp_path / "closed", os.geteuid()
    folder.mkdir()
    if name == "a.tif":
        tifffile.imwrite(folder / name, noise(20, 30))
    else:
        write_ome_zarr(folder / name, noise(40, 50), "yx")
    folder.chmod(0)
    if user == 0:  # who may look anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"a\.(tif|zarr)' may not be read; ask for access"):
            open_image(folder / name)
    finally:
        if user == 0:
            os.seteuid(user)
        folder.chmod(0o700)


LACKING = """
import sys
sys.modules["imagecodecs"] = None
from pathlib import Path
from napari_convlora.images import regions
from napari_convlora.formats.opening import open_image
regions.LARGE = 1000
try:
    open_image(Path(sys.argv[1]))[0][0:32, 0:32]
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_a_large_tiff_whose_codec_is_lacking_is_not_called_damaged(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(64, 96), tile=(32, 32), compression=compression)
    root = str(Path(opening.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LACKING, str(path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("needs another package; run: pip install imagecodecs.")
    assert str(path) in done.stdout


@pytest.mark.parametrize("how", ["large", "small"])
def test_a_disk_that_drops_out_is_not_a_damaged_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(64, 96), tile=(32, 32), compression="zlib")
    if how == "large":
        monkeypatch.setattr(regions, "LARGE", 1000)
        opened = open_image(path)

    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("read", "read_segments", "read_array"):
        monkeypatch.setattr(tifffile.FileHandle, name, gone)
    with pytest.raises(InputError, match=r"cannot be read.*\(Input/output error\); check the disk"):
        opened[0][0:32, 0:32] if how == "large" else read_image(path)


def damage(path: Path, how: str) -> None:
    """Spoil a file as disks and copies do, or put something in its place that is none."""
    content = path.read_bytes()
    match how:
        case "flipped":
            path.write_bytes(bytes(b ^ 0x5A for b in content))
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "pipe":
            path.unlink()
            os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "pipe"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_damaged_chunk_is_one_sentence_with_file_and_block(
    tmp_path: Path, zarr_format: int, how: str
) -> None:
    if how == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path = tmp_path / "a.zarr"
    image = noise(2, 60, 80)
    zarr.create_array(path, data=image, chunks=(1, 20, 20), zarr_format=zarr_format)
    chunk = path / ("1.2.0" if zarr_format == 2 else "c/1/2/0")
    damage(chunk, how)
    opened = open_image(path)
    np.testing.assert_array_equal(opened[1][0:40, 0:80][..., 0], image[1, :40])
    with pytest.raises(InputError) as error:
        opened[1][40:60, 0:40]
    said = str(error.value)
    assert str(path) in said
    assert "\n" not in said
    if how == "pipe":
        assert str(chunk) in said
    else:
        assert "in plane 1, rows 40 to 59, columns 0 to 39" in said


@pytest.mark.parametrize("compression", ["zlib", "zstd", "lzw"])
def test_a_damaged_tile_is_one_sentence_with_file_and_block(
    tmp_path: Path, everything_is_large: None, compression: str
) -> None:
    path = tmp_path / "a.tif"
    image = noise(64, 96)
    tifffile.imwrite(path, image, tile=(32, 32), compression=compression)
    with tifffile.TiffFile(path) as tif:
        begin, n = tif.pages[0].dataoffsets[4], tif.pages[0].databytecounts[4]
    content = bytearray(path.read_bytes())
    content[begin : begin + n] = bytes(b ^ 0x5A for b in content[begin : begin + n])
    path.write_bytes(content)
    opened = open_image(path)
    np.testing.assert_array_equal(opened[0][0:32, 0:96][..., 0], image[:32])
    with pytest.raises(InputError, match=r"plane 0, rows 32 to 63, columns 32 to 63 \(") as error:
        opened[0][32:64, 32:64]
    assert f"'{path}' is damaged" in str(error.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["empty", "cut", "unlabelled", "pipe"])
def test_a_block_that_an_interrupted_run_left_damaged_is_missing(tmp_path: Path, how: str) -> None:
    shape, folder = (1, 700, 900), tmp_path / "labels"
    store = open_labels(folder, shape, "same")
    for block in plan_blocks(shape):
        store.write(block, np.full((block.height, block.width), 1 + block.top % 7, np.uint8))
    bad = plan_blocks(shape)[1]
    if how == "unlabelled":
        store.write(bad, np.zeros((bad.height, bad.width), np.uint8))
    elif how != "pipe" or hasattr(os, "mkfifo"):
        damage(store._chunk(bad), how)
    assert open_labels(folder, shape, "same").missing(plan_blocks(shape)) == [bad]


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
def test_a_run_whose_description_is_damaged_is_not_resumed(tmp_path: Path, name: str) -> None:
    shape, folder = (1, 700, 900), tmp_path / "labels"
    store = open_labels(folder, shape, "same")
    store.write(plan_blocks(shape)[0], np.ones((512, 512), np.uint8))
    damage(folder / name, "cut")
    with pytest.raises(InputError, match="is damaged, or part of a prediction with another"):
        open_labels(folder, shape, "same")
    assert store._chunk(plan_blocks(shape)[0]).exists()


def test_a_disk_that_is_full_at_the_last_step_keeps_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, folder, path = (1, 1100, 600), tmp_path / "unfinished", tmp_path / "labels.zarr"
    store = open_labels(folder, shape, "same")
    for block in plan_blocks(shape):
        store.write(block, np.ones((block.height, block.width), np.uint8))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(ome_zarr, "create_array", full)
        with pytest.raises(InputError, match=r"No space left on device\); free some space and run"):
            save_zarr(store, path, CLASSES)
    assert not path.exists()
    again = open_labels(folder, shape, "same")
    assert again.missing(plan_blocks(shape)) == []
    save_zarr(again, path, CLASSES)
    assert (whole(open_image(path)) == 1).all()
