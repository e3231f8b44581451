"""Exported masks open elsewhere with the ids, colours and names the user chose."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import io

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.exports.masks import save_masks, save_probabilities
from napari_convlora.formats.opening import read_image, read_labels
from napari_convlora.labels.classes import default_classes, read_classes

CLASSES = default_classes(255)


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["uint8", "int32", "int64"]),
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
        elements=st.integers(0, 120),
    )
)
def test_masks_round_trip(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("masks")
    expected = labels.reshape(-1, *labels.shape[-2:])
    names = ["m.tif"] if len(expected) > 1 else ["m.tif", "m.png"]
    for name in names:
        save_masks(labels, folder / name, CLASSES)
        np.testing.assert_array_equal(read_labels(folder / name, expected.shape), expected)
    assert read_classes(folder / "classes.json") == CLASSES


@pytest.mark.parametrize("shape", [(40, 50), (1, 40, 50), (3, 40, 50), (6, 40, 50), (5, 3)])
def test_tiff_shows_the_class_colours_and_every_reader_gets_the_ids(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    classes = (ClassInfo(1, "soil", "#102030"), ClassInfo(255, "root", "#fffefd"))
    labels = np.random.default_rng(0).choice([0, 1, 255], shape).astype(np.uint8)
    path = tmp_path / "m.tif"
    save_masks(labels, path, classes)
    np.testing.assert_array_equal(tifffile.imread(path), labels)
    planes = labels.reshape(-1, *shape[-2:])
    np.testing.assert_array_equal(read_labels(path), planes)
    if shape[0] != 3:  # scikit-image takes the first of three axes for colours, whatever is said
        np.testing.assert_array_equal(io.imread(path), labels)
    with Image.open(path) as image:
        for i, plane in enumerate(planes):
            image.seek(i)
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), plane)
            colours = np.array([[0, 0, 0], [16, 32, 48], [255, 254, 253]])
            shown = colours[np.searchsorted([0, 1, 255], plane)]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), shown)


def test_tiff_is_compressed_uint8(tmp_path: Path) -> None:
    path = tmp_path / "m.TIFF"
    save_masks(np.ones((3, 40, 50), np.int64), path, CLASSES)
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert not tif.is_imagej
        assert tif.series[0].dtype == np.uint8
        assert tif.series[0].axes == "ZYX"


def test_png_shows_the_class_colours(tmp_path: Path) -> None:
    classes = (ClassInfo(1, "soil", "#102030"), ClassInfo(255, "root", "#fffefd"))
    save_masks(np.array([[0, 1, 255]]), tmp_path / "m.png", classes)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), [[0, 1, 255]])
    np.testing.assert_array_equal(
        read_image(tmp_path / "m.png")[0, 0], [[0, 0, 0], [16, 32, 48], [255, 254, 253]]
    )


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (np.ones((2, 4, 4), int), "m.png", "2 planes.*TIFF"),
        (np.ones((4, 4), int), "m.jpg", "use one of .tif"),
        (np.ones((4, 4)), "m.tif", "float64"),
        (np.ones((0, 4), int), "m.tif", "shape"),
        (np.full((4, 4), 7), "m.tif", r"\[7\], not in the class table"),
        (np.ones((4, 4), int), "absent/m.tif", "create the folder"),
    ],
)
def test_what_cannot_be_exported_is_explained_and_writes_nothing(
    tmp_path: Path, labels: np.ndarray, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save_masks(labels, tmp_path / name, default_classes(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.tif", "m.png"])
def test_strangers_classes_json_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "classes.json").write_text("something else")
    own = tmp_path / f"{name}.classes.json"
    assert save_masks(np.ones((4, 4), int), tmp_path / name, CLASSES) == own
    assert (tmp_path / "classes.json").read_text() == "something else"
    assert read_classes(own) == CLASSES

    own.write_text("of somebody else, too")
    with pytest.raises(InputError, match="is not a class table"):
        save_masks(np.ones((4, 4), int), tmp_path / name, CLASSES)
    assert own.read_text() == "of somebody else, too"


def test_renamed_class_reaches_the_masks_own_table_and_no_other_mask(tmp_path: Path) -> None:
    first = (ClassInfo(1, "soil", "#102030"),)
    renamed = (ClassInfo(1, "root", "#102030"),)
    shared, own = tmp_path / "classes.json", tmp_path / "b.tif.classes.json"
    mask = np.ones((4, 4), int)
    assert save_masks(mask, tmp_path / "a.tif", first) == shared
    before = shared.read_bytes()
    for _ in range(2):
        assert save_masks(mask, tmp_path / "b.tif", renamed) == own
        assert shared.read_bytes() == before
        assert read_classes(own) == renamed
    assert save_masks(mask, tmp_path / "c.tif", first) == shared
    # A table that counts before the other must not say what the mask was called before.
    assert save_masks(mask, tmp_path / "b.tif", first) == own
    assert read_classes(own) == read_classes(shared) == first
    masks = {"a.tif", "b.tif", "c.tif"}
    assert {p.name for p in tmp_path.iterdir()} == masks | {shared.name, own.name}


def test_full_disk_keeps_the_old_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m.tif", "m.png"):
        path = tmp_path / name
        save_masks(np.ones((4, 4), int), path, CLASSES)
        old = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match="disk is full"):
                save_masks(np.zeros((4, 4), int), path, CLASSES)
        assert path.read_bytes() == old
    renamed = tuple(ClassInfo(c.id, f"other {c.id}", c.colour) for c in CLASSES)
    save_masks(np.ones((4, 4), int), path, renamed)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="disk is full"):
            save_masks(np.zeros((4, 4), int), path, CLASSES)
    assert read_classes(tmp_path / f"{path.name}.classes.json") == renamed  # as the mask stays
    (tmp_path / f"{path.name}.classes.json").unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"m.tif", "m.png", "classes.json"}


@pytest.mark.parametrize("shape", [(3, 9, 8), (2, 3, 9, 8), (1, 3, 9, 8)])
def test_probabilities_round_trip_as_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random(shape)
    save_probabilities(values, tmp_path / "p.tif", default_classes(3))
    planes = read_image(tmp_path / "p.tif")
    assert planes.dtype == np.float32
    expected = np.moveaxis(values.reshape(-1, *shape[-3:]), 1, -1)
    np.testing.assert_array_equal(planes, expected.astype(np.float32))
    assert read_classes(tmp_path / "classes.json") == default_classes(3)


def test_probabilities_must_fit_the_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not fit 2 classes"):
        save_probabilities(np.ones((3, 4, 4)), tmp_path / "p.tif", default_classes(2))
    with pytest.raises(InputError, match=r"use one of \.tif"):
        save_probabilities(np.ones((3, 4, 4)), tmp_path / "p.png", default_classes(3))
