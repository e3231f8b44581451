"""Reading images and labels as people have them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from napari_convlora.errors import InputError
from napari_convlora.formats import limits, opening
from napari_convlora.formats.opening import open_image, read_image, read_labels
from napari_convlora.images.planes import check_contrast, drop_alpha, lazy_planes, to_planes

few = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from(["uint8", "uint16", "int16", "int32", "float32", "float64"])


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def assert_one_sentence(error: pytest.ExceptionInfo[InputError]) -> None:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text.removesuffix(".")


# --- TIFF -----------------------------------------------------------------------------------


def test_a_tiff_of_several_pictures_says_that_one_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as tif:
        for picture in (noise(20, 30), noise(10, 12)):
            tif.write(picture)
    assert read_image(path).shape == (1, 20, 30, 1)
    assert "'two.tif' holds 2 pictures, of which the first is read" in caplog.text
    caplog.clear()
    tifffile.imwrite(tmp_path / "stack.tif", noise(5, 20, 30))
    read_image(tmp_path / "stack.tif")
    assert not caplog.text


@few
@given(
    hnp.arrays(dtypes, hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=6)),
    st.sampled_from([None, "zlib", "lzw"]),
)
def test_tiff_axes_decide_the_layout(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, compression: str | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "axes.tif"
    axes = "TCZYX"
    axes = {2: "YX", 3: "CYX", 4: "ZCYX", 5: axes}[array.ndim]
    tifffile.imwrite(
        path, array, photometric="minisblack", metadata={"axes": axes}, compression=compression
    )
    planes = read_image(path)
    expected = np.moveaxis(array, axes.index("C"), -1) if "C" in axes else array[..., None]
    expected = expected.reshape(-1, *expected.shape[-3:])
    np.testing.assert_array_equal(planes, expected)
    assert planes.dtype == array.dtype


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((20, 30), {}, (1, 20, 30, 1)),
        ((20, 30, 3), {"photometric": "rgb"}, (1, 20, 30, 3)),
        ((3, 20, 30), {"photometric": "rgb", "planarconfig": "separate"}, (1, 20, 30, 3)),
        ((5, 20, 30, 3), {"photometric": "rgb"}, (5, 20, 30, 3)),
        ((20, 30, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, (1, 20, 30, 3)),
        ((20, 30, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, (1, 20, 30, 4)),
        ((20, 30, 3), {"photometric": "minisblack", "metadata": None}, (1, 20, 30, 3)),
        ((20, 30, 4), {"photometric": "minisblack"}, (1, 20, 30, 4)),
        ((4, 20, 30), {"photometric": "minisblack"}, (4, 20, 30, 1)),
        ((4, 20, 30), {"imagej": True, "metadata": {"axes": "ZYX"}}, (4, 20, 30, 1)),
        ((2, 4, 3, 20, 30), {"imagej": True, "metadata": {"axes": "TZCYX"}}, (8, 20, 30, 3)),
        ((2, 3, 4, 20, 30), {"ome": True, "metadata": {"axes": "TCZYX"}}, (8, 20, 30, 3)),
        ((2, 20, 30), {"ome": True, "metadata": {"axes": "CYX"}}, (1, 20, 30, 2)),
        ((10, 4000), {}, (1, 10, 4000, 1)),
        ((1, 1), {}, (1, 1, 1, 1)),
    ],
)
def test_tiff_flavours(
    tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(*shape), **options)
    assert read_image(path).shape == expected


def test_big_endian_tiff_is_returned_in_native_order(tmp_path: Path) -> None:
    image = noise(6, 7, dtype="uint16") * 300
    tifffile.imwrite(tmp_path / "a.tif", image, byteorder=">")
    planes = read_image(tmp_path / "a.tif")
    assert planes.dtype == np.dtype("uint16")
    assert planes.dtype.isnative
    np.testing.assert_array_equal(planes[0, ..., 0], image)


def test_palette_tiff_is_coloured_as_image_and_kept_as_labels(tmp_path: Path) -> None:
    ids = noise(6, 7) % 3
    colours = np.zeros((3, 256), np.uint16)
    colours[:, 1], colours[:, 2] = (65535, 0, 0), (0, 65535, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ids, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(read_image(path)[0], (colours.T >> 8)[ids])
    np.testing.assert_array_equal(read_labels(path)[0], ids)


@pytest.mark.parametrize("compression", ["lzw", "zstd"])
def test_a_codec_that_is_lacking_is_named(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(20, 30), compression=compression)
    np.testing.assert_array_equal(read_image(path)[0, ..., 0], noise(20, 30))
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from napari_convlora import read_image\nfrom napari_convlora.errors import InputError\n"
        "try: read_image(sys.argv[1])\n"
        "except InputError as error: sys.exit('pip install imagecodecs' not in str(error))\n"
        "sys.exit(2)"
    )
    root = str(Path(opening.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0


@few
@given(
    st.sampled_from([None, "zlib", "lzw"]),
    st.sampled_from([{}, {"metadata": None}, {"bigtiff": True}, {"imagej": True}, {"ome": True}]),
    st.floats(0.005, 0.995),
)
def test_truncated_tiff_is_never_read_in_part(
    tmp_path_factory: pytest.TempPathFactory,
    compression: str | None,
    options: dict[str, Any],
    fraction: float,
) -> None:
    image = noise(5, 32, 32)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric="minisblack", compression=compression, **options)
    path = tmp_path_factory.getbasetemp() / "cut.tif"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * fraction)])
    try:
        planes = read_image(path)
    except InputError as error:
        assert "cut.tif" in str(error)  # noqa: PT017
    else:  # only text after the pixels is missing
        np.testing.assert_array_equal(planes.reshape(image.shape), image)


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"metadata": None}])
def test_tiff_cut_at_any_byte_is_never_read_in_part(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    image = noise(3, 4, 4)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric="minisblack", compression="zlib", **options)
    path = tmp_path / "cut.tif"
    for size in range(len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:size])
        with contextlib.suppress(InputError):
            np.testing.assert_array_equal(read_image(path).reshape(image.shape), image)


# --- PNG, JPEG and others -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix", "shape", "dtype"),
    [
        ("L", ".png", (1, 9, 8, 1), "uint8"),
        ("1", ".png", (1, 9, 8, 1), "bool"),
        ("I;16", ".png", (1, 9, 8, 1), "uint16"),
        ("RGB", ".png", (1, 9, 8, 3), "uint8"),
        ("RGBA", ".png", (1, 9, 8, 3), "uint8"),
        ("LA", ".png", (1, 9, 8, 1), "uint8"),
        ("P", ".png", (1, 9, 8, 3), "uint8"),
        ("RGB", ".jpg", (1, 9, 8, 3), "uint8"),
        ("CMYK", ".jpg", (1, 9, 8, 3), "uint8"),
        ("L", ".bmp", (1, 9, 8, 1), "uint8"),
    ],
)
def test_pillow_formats(
    tmp_path: Path, mode: str, suffix: str, shape: tuple[int, ...], dtype: str
) -> None:
    path = tmp_path / f"image{suffix}"
    grey = Image.fromarray(noise(9, 8))
    (grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)).save(path)
    planes = read_image(path)
    assert planes.shape == shape
    assert planes.dtype == dtype


def test_grey_rgba_png_keeps_its_grey_values(tmp_path: Path) -> None:
    grey = noise(9, 8)
    alpha = np.full_like(grey, 7)
    Image.fromarray(np.stack([grey, grey, grey, alpha], -1)).save(tmp_path / "a.png")
    planes = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(planes[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png")[0], grey)


@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_png_keeps_16_bits(tmp_path: Path, channels: int) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    image = noise(9, 8, channels, dtype="uint16") * 300
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], image[..., :3])


def test_frames_of_a_gif_are_planes(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(9, 8, seed=i)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    planes = read_image(tmp_path / "a.gif")
    assert planes.shape == (3, 9, 8, 3)
    np.testing.assert_array_equal(planes[2, ..., 0], noise(9, 8, seed=2))
    with pytest.raises(InputError, match="TIFF stack"):
        read_labels(tmp_path / "a.gif")


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "b.tif", noise(9, 8))
    (tmp_path / "b.tif").rename(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[0, ..., 0], noise(9, 8))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npy", ".bmp"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, fraction: float) -> None:
    path = tmp_path / f"broken{suffix}"
    if suffix == ".npy":
        np.save(path, noise(64, 64))
    else:
        Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    for read in (read_image, read_labels) if suffix != ".jpg" else (read_image,):
        with pytest.raises(InputError, match=f"broken{suffix}") as error:
            read(path)
        assert_one_sentence(error)


@few
@given(st.binary(max_size=200), st.sampled_from(["", "II*\0", "MM\0*", "\x89PNG\r\n\x1a\n"]))
def test_random_bytes_give_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(magic.encode("latin1") + data)
    with pytest.raises(InputError, match=r"random\.bin"):
        read_image(path)


def test_absent_empty_and_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for path, message in (
        (tmp_path / "absent.png", "does not exist"),
        (tmp_path / "empty.png", "is empty"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.png" / "x.png", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=message) as error:
            read_image(path)
        assert_one_sentence(error)


def test_bombs_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_BYTES", 1000)
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", noise(64, 64), compression="zlib")
    np.save(tmp_path / "a.npy", noise(64, 64))
    for name in ("a.png", "a.tif", "a.npy"):
        with pytest.raises(InputError, match="crop it or split it"):
            read_image(tmp_path / name)


def test_npy_is_read_without_pickle(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", noise(4, 9, 8, dtype="float32"))
    assert read_image(tmp_path / "good.npy").shape == (4, 9, 8, 1)
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones((4, 4), complex))
    for name in ("bad.npy", "complex.npy"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


# --- labels ---------------------------------------------------------------------------------


@few
@given(
    hnp.arrays(
        st.sampled_from(["bool", "uint8", "uint16", "int32"]),
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
        elements={"min_value": 0},
    )
)
def test_label_tiff_and_npy_round_trip(
    tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray
) -> None:
    if labels.dtype == np.int32:
        labels = labels % 65536
    folder = tmp_path_factory.getbasetemp()
    np.save(folder / "l.npy", labels)
    axes = "YX" if labels.ndim == 2 else "ZYX"
    plain = labels.astype(np.uint8) if labels.dtype == bool else labels
    tifffile.imwrite(folder / "l.tif", plain, photometric="minisblack", metadata={"axes": axes})
    expected = labels.reshape(-1, *labels.shape[-2:])
    for name in ("l.npy", "l.tif"):
        read = read_labels(folder / name, expected.shape)
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, expected)


def test_palette_png_keeps_indices(tmp_path: Path) -> None:
    ids = noise(9, 8) % 3
    image = Image.fromarray(ids).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png")[0], ids)
    assert read_image(tmp_path / "a.png").shape == (1, 9, 8, 3)


def test_0_255_masks_and_grey_in_rgb_are_ids(tmp_path: Path) -> None:
    ids = (noise(9, 8) % 2 * 255).astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    Image.fromarray(ids).convert("RGB").save(tmp_path / "rgb.png")
    for name in ("grey.png", "rgb.png"):
        labels = read_labels(tmp_path / name)
        assert sorted(np.unique(labels)) == [0, 255]


@pytest.mark.parametrize("n_planes", [3, 4])
def test_label_planes_saved_as_colours_are_planes(tmp_path: Path, n_planes: int) -> None:
    labels = noise(n_planes, 20, 30) % 4
    colours: Any = {"photometric": "rgb", "planarconfig": "separate"}  # as tifffile guesses
    tifffile.imwrite(tmp_path / "a.tif", labels, **colours)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), labels)
    tifffile.imwrite(tmp_path / "b.tif", np.stack([labels[0]] * n_planes), **colours)
    assert read_labels(tmp_path / "b.tif").shape == labels.shape


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_ids_in_a_png_of_few_bits_are_not_spread(tmp_path: Path, depth: int) -> None:
    ids = noise(7, 11) % 2**depth
    bits = np.unpackbits(ids[..., None], axis=2)[..., 8 - depth :].reshape(7, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 11, 7, depth, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png")[0], ids)


def write_ome_parts(folder: Path, planes: list[np.ndarray], names: list[str] | None = None) -> None:
    """Write an OME-TIFF of one file per plane, which it says to be called `names`."""
    ids = [f"urn:uuid:{uuid.uuid4()}" for _ in planes]
    names = names or [f"z{z}.ome.tif" for z in range(len(planes))]
    parts = "".join(
        f'<TiffData FirstZ="{z}" FirstC="0" FirstT="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">{own}</UUID></TiffData>'
        for z, (name, own) in enumerate(zip(names, ids, strict=True))
    )
    for z, (plane, own) in enumerate(zip(planes, ids, strict=True)):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{own}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
            'SizeX="40" SizeY="40" SizeZ="2" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{parts}</Pixels></Image></OME>'
        )
        path = folder / f"z{z}.ome.tif"
        tifffile.imwrite(path, plane, description=xml, metadata=None, compression="zlib")


def test_an_ome_tiff_may_lie_in_several_files(tmp_path: Path) -> None:
    planes = [np.zeros((40, 40), np.uint8), noise(40, 40)]  # the second file is the larger
    write_ome_parts(tmp_path, planes)
    for z in (0, 1):
        np.testing.assert_array_equal(read_image(tmp_path / f"z{z}.ome.tif")[..., 0], planes)
    whole = (tmp_path / "z1.ome.tif").read_bytes()
    (tmp_path / "z1.ome.tif").write_bytes(whole[:-800])
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / "z0.ome.tif")


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [read_image, open_image])
def test_a_pipe_among_the_files_of_an_ome_tiff_is_not_waited_for(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    write_ome_parts(tmp_path, [noise(40, 40), noise(40, 40)])
    (tmp_path / "z1.ome.tif").unlink()
    os.mkfifo(tmp_path / "z1.ome.tif")
    with pytest.raises(InputError, match=r"z1\.ome\.tif' is a pipe") as error:
        read(tmp_path / "z0.ome.tif")
    assert_one_sentence(error)


@pytest.mark.parametrize("read", [read_image, open_image])
def test_an_ome_tiff_does_not_lead_to_other_folders(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "sent").mkdir()
    for name in (str(tmp_path / "mine" / "z1.ome.tif"), "../mine/z1.ome.tif"):
        write_ome_parts(tmp_path / "sent", [noise(40, 40), noise(40, 40)], ["z0.ome.tif", name])
        (tmp_path / "sent" / "z1.ome.tif").replace(tmp_path / "mine" / "z1.ome.tif")
        with pytest.raises(InputError, match=r"only files in the same folder are read") as error:
            read(tmp_path / "sent" / "z0.ome.tif")
        assert_one_sentence(error)


def test_a_moved_ome_tiff_may_name_itself_by_its_old_place(tmp_path: Path) -> None:
    write_ome_parts(tmp_path, [noise(40, 40)], ["/old/place/z0.ome.tif"])
    np.testing.assert_array_equal(read_image(tmp_path / "z0.ome.tif")[0, ..., 0], noise(40, 40))


def test_labels_are_read_of_no_other_file(tmp_path: Path) -> None:
    labels = noise(40, 40) % 3
    for name in ("z1.ome.tif", str(tmp_path / "secret.tif")):
        write_ome_parts(tmp_path, [labels, labels + 7], ["z0.ome.tif", name])
        (tmp_path / "z1.ome.tif").replace(tmp_path / name)
        np.testing.assert_array_equal(read_labels(tmp_path / "z0.ome.tif"), labels[None])
        with pytest.raises(InputError, match="2 planes of 40 x 40"):
            read_labels(tmp_path / "z0.ome.tif", (2, 40, 40))


def write_micro_manager(path: Path, plane: np.ndarray, z: int | None) -> None:
    """Write a file of Micro-Manager: plane `z` of a stack of 2; of an NDTiff where it is None."""
    about = json.dumps({"MicroManagerVersion": "2", "Frames": 1, "Slices": 2}).encode()
    at = 40 + len(about) + 28  # of the pixels; pages follow
    page = at + plane.size
    if z is None:
        head = struct.pack("<4I", 483729, 2, 2355492, len(about)) + about
    else:
        head = struct.pack("<8I", 54773648, 40 + len(about), 0, 0, 0, 0, 2355492, len(about))
        head += about + struct.pack("<7I", 3453623, 1, 0, z, 0, 0, page)
    height, width = plane.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, at)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, plane.size)]
    rows = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags]
    rows.append(struct.pack("<HHII", 51123, 2, 8, page + 2 + 12 * 10 + 4))
    pages = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4) + b"{     }\0"
    start = struct.pack("<2sHI", b"II", 42, page)
    path.write_bytes((start + head).ljust(at, b"\0") + plane.tobytes() + pages)


def write_ndtiff_index(path: Path, names: list[str]) -> None:
    """Write what tells which file has which plane of 40 x 40."""
    rows = []
    for z, name in enumerate(names):
        axes = json.dumps({"z": z}).encode()
        rows.append(struct.pack("<I", len(axes)) + axes + struct.pack("<I", len(name.encode())))
        rows.append(name.encode() + struct.pack("<8I", 0, 40, 40, 0, 0, 0, 0, 0))
    path.write_bytes(b"".join(rows))


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["stack", "ndtiff", "index"])
def test_a_pipe_among_the_files_of_micro_manager_is_not_waited_for(
    tmp_path: Path, kind: str
) -> None:
    planes = np.stack([noise(40, 40), noise(40, 40, seed=1)])
    names = ["a_MMStack.tif", "a_MMStack_1.tif"]
    for z, (name, plane) in enumerate(zip(names, planes, strict=True)):
        write_micro_manager(tmp_path / name, plane, z if kind == "stack" else None)
    if kind != "stack":
        write_ndtiff_index(tmp_path / "NDTiff.index", names)
    np.testing.assert_array_equal(read_image(tmp_path / names[0])[..., 0], planes)
    pipe = tmp_path / ("NDTiff.index" if kind == "index" else names[1])
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=f"{pipe.name}' is a pipe"):
        read_image(tmp_path / names[0])
    np.testing.assert_array_equal(read_labels(tmp_path / names[0])[0], planes[0])


def test_an_ndtiff_does_not_lead_to_other_folders(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    write_micro_manager(tmp_path / "sent" / "a.tif", noise(40, 40), None)
    write_micro_manager(tmp_path / "b.tif", noise(40, 40), None)
    write_ndtiff_index(tmp_path / "sent" / "NDTiff.index", ["a.tif", "../b.tif"])
    with pytest.raises(InputError, match="only files in the same folder are read"):
        read_image(tmp_path / "sent" / "a.tif")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.ones((4, 5), np.float32), "whole numbers"),
        (np.full((4, 5), -2, np.int16), "value -2"),
        (np.full((4, 5), 70000, np.int32), "value 70000"),
        (noise(9, 8, 3), "3 channels"),
    ],
)
def test_unusable_labels_are_explained(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", labels)
    with pytest.raises(InputError, match=message) as error:
        read_labels(tmp_path / "a.tif")
    assert_one_sentence(error)


def test_jpeg_labels_are_refused_whatever_their_suffix(tmp_path: Path) -> None:
    Image.fromarray(noise(9, 8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(InputError, match="JPEG") as error:
        read_labels(tmp_path / "a.png")
    assert_one_sentence(error)


def test_wrong_size_names_both_sizes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(35, 50))
    with pytest.raises(InputError, match=r"35 x 50, but its image is 2 planes of 35 x 51"):
        read_labels(tmp_path / "a.tif", (2, 35, 51))


# --- arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((9, 8), {}, (1, 9, 8, 1)),
        ((9, 8, 3), {}, (1, 9, 8, 3)),
        ((9, 8, 3), {"rgb": False}, (9, 8, 3, 1)),
        ((5, 9, 8), {}, (5, 9, 8, 1)),
        ((5, 9, 8, 4), {"rgb": True}, (5, 9, 8, 4)),
        ((5, 9, 8, 2), {}, (5, 9, 8, 2)),
        ((2, 5, 9, 8), {"rgb": False}, (10, 9, 8, 1)),
        ((9, 8, 1), {}, (1, 9, 8, 1)),
        ((10, 4000, 3), {}, (1, 10, 4000, 3)),
    ],
)
def test_to_planes_views_every_layout(
    shape: tuple[int, ...], options: dict[str, bool], expected: tuple[int, ...]
) -> None:
    array = noise(*shape)
    planes = to_planes(array, **options)
    assert planes.shape == expected
    assert np.shares_memory(planes, array)


def test_to_planes_moves_the_channel_axis() -> None:
    array = noise(2, 9, 8)
    planes = to_planes(array, channel_axis=0)
    np.testing.assert_array_equal(planes[0, ..., 1], array[1])
    assert np.shares_memory(planes, array)
    with pytest.raises(InputError, match="channel axis 5"):
        to_planes(array, channel_axis=5)
    with pytest.raises(InputError, match="height and width"):
        to_planes(array[0], channel_axis=0)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((9, 8), {}),
        ((9, 8, 3), {"rgb": True}),
        ((2, 5, 9, 8), {}),
        ((5, 9, 8, 4), {"rgb": True}),
        ((2, 9, 8), {"channel_axis": 0}),
        ((5, 2, 9, 8), {"channel_axis": 1}),
        ((3, 5, 2, 9, 8), {"channel_axis": 0}),
        ((5, 9, 8, 2), {"channel_axis": 3}),
        ((5, 9, 2, 8), {"channel_axis": 2}),
    ],
)
def test_a_region_is_read_as_to_planes_would_show_it(
    shape: tuple[int, ...], options: dict[str, int]
) -> None:
    array, region = noise(*shape), np.s_[2:7, 1:8]
    planes = to_planes(array, **{"rgb": False, **options})
    for plane in range(len(planes)):
        read = lazy_planes(array, **{"rgb": False, **options})[plane][region]
        np.testing.assert_array_equal(read, planes[plane][region])


def test_drop_alpha_is_a_view_of_the_colours() -> None:
    planes = noise(1, 9, 8, 4)
    np.testing.assert_array_equal(drop_alpha(planes), planes[..., :3])
    assert drop_alpha(planes[..., :2]).shape[-1] == 2


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        (np.zeros((0, 4, 4, 1)), "no pixels"),
        (np.zeros((2, 4, 4, 1)), "value 0.0 in every pixel"),
        (np.ones((1, 1, 1, 1), np.uint8), "1 x 1"),
        (np.array([1, np.nan, np.inf, 2]).reshape(1, 2, 2, 1), "2 NaN or infinite"),
        (np.ones((1, 2, 2, 1), complex), "complex"),
        (np.ones((1, 2, 2, 1), object), "object"),
    ],
)
def test_pixels_nothing_can_be_learnt_from(planes: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_contrast(planes)
    assert_one_sentence(error)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "float16", "float64", "int32"])
def test_any_real_contrast_passes(dtype: str) -> None:
    planes = np.zeros((2, 10, 4000, 1), dtype)
    planes[1, 0, 0, 0] = 1
    check_contrast(planes)
