from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.errors import InputError
from napari_convlora.images.normalise import Normalizer, to_rgb
from napari_convlora.images.resample import auto_pixel_scale, crop, resize
from napari_convlora.images.tiles import blend_window, tile_starts
from napari_convlora.training.views import View, draw_view


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, bool])
def test_normaliser_maps_every_dtype_to_the_unit_range(dtype: type) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2 if dtype is bool else 200, (1, 20, 30, 2)).astype(dtype)
    normalised = Normalizer.fit([image])(image)
    assert normalised.dtype == np.float32
    assert normalised.shape == image.shape
    assert normalised.min() == 0
    assert normalised.max() == pytest.approx(1, abs=1e-6)


def test_normaliser_treats_channels_apart_and_keeps_order() -> None:
    image = np.random.default_rng(0).random((1, 50, 50, 2)) * [1, 1000] + [5, -300]
    normaliser = Normalizer.fit([image])
    normalised = normaliser(image)
    for channel in range(2):
        assert np.ptp(normalised[..., channel]) == pytest.approx(1, abs=1e-5)
        order = np.argsort(image[..., channel].ravel())
        assert (np.diff(normalised[..., channel].ravel()[order]) >= 0).all()
    assert normaliser.low[0] == pytest.approx(5, abs=0.1)
    assert normaliser.low[1] == pytest.approx(-300, abs=10)


def test_normaliser_clips_outliers_and_other_images() -> None:
    image = np.random.default_rng(0).random((1, 100, 100, 1)).astype(np.float32)
    image[0, 0, 0] = 1e6
    normaliser = Normalizer.fit([image])
    assert normaliser.high[0] < 2, "one hot pixel must not squeeze the rest"
    other = normaliser(np.array([[[[-50.0], [50.0]]]]))
    assert other.ravel().tolist() == [0, 1]


def test_images_of_another_scale_get_a_remark() -> None:
    image = np.random.default_rng(0).integers(2, 71, (1, 60, 60, 3)).astype(np.uint8)
    normaliser = Normalizer.fit([image])
    assert normaliser.remark(image) == ""
    assert normaliser.remark(image // 2 + 20) == ""
    for other in (image.astype(np.uint16) * 257, image / 255.0, image > 30):
        assert "lie outside of what the adapter learnt from (2 to 70)" in normaliser.remark(other)


def test_values_beyond_float32_are_clipped_like_others() -> None:
    normaliser = Normalizer((0.0,), (1.0,))
    with np.errstate(all="raise"):
        assert normaliser(np.array([[-1e300], [0.25], [1e300]])).ravel().tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("value", [0, 7, 65535, 1e9, -1e9])
def test_constant_channel_is_finite(value: float) -> None:
    image = np.random.default_rng(0).random((1, 8, 8, 2))
    image[..., 1] = value
    normalised = Normalizer.fit([image])(image)
    assert np.isfinite(normalised).all()
    assert (normalised[..., 1] == 0).all()


def test_normaliser_covers_all_images_and_planes() -> None:
    dark, bright = np.zeros((2, 8, 8, 1)), np.zeros((3, 8, 8, 1))
    bright[2] = 10
    normaliser = Normalizer.fit([dark, bright])
    assert normaliser.low == (0,)
    assert normaliser.high == (10,)


def test_other_channel_count_is_refused() -> None:
    grey, colour = np.random.random((1, 8, 8, 1)), np.random.random((1, 8, 8, 3))
    with pytest.raises(InputError, match="3 channels where 1 are expected"):
        Normalizer.fit([grey])(colour)
    with pytest.raises(InputError, match="3 channels where 1"):
        Normalizer.fit([grey, colour])


@pytest.mark.parametrize(("channels", "kept"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_three_channels_for_the_backbone(channels: int, kept: list[int]) -> None:
    image = np.random.default_rng(0).random((4, 5, channels))
    np.testing.assert_array_equal(to_rgb(image), image[..., kept])


def test_two_channels_become_three() -> None:
    image = np.random.default_rng(0).random((4, 5, 2))
    rgb = to_rgb(image)
    np.testing.assert_array_equal(rgb[..., :2], image)
    np.testing.assert_allclose(rgb[..., 2], image.mean(-1))


@settings(deadline=None, max_examples=80)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    size=st.integers(1, 30),
    data=st.data(),
)
def test_crop_reads_inside_and_mirrors_or_fills_outside(
    height: int, width: int, size: int, data: st.DataObject
) -> None:
    top = data.draw(st.integers(1 - size, height - 1))
    left = data.draw(st.integers(1 - size, width - 1))
    array = np.arange(1, height * width + 1).reshape(height, width)
    mirrored, filled = crop(array, top, left, size), crop(array, top, left, size, fill=-1)
    assert mirrored.shape == filled.shape == (size, size)
    for i in range(size):
        for j in range(size):
            y, x = top + i, left + j
            if 0 <= y < height and 0 <= x < width:
                assert mirrored[i, j] == filled[i, j] == array[y, x]
            else:
                assert filled[i, j] == -1
    assert set(np.unique(mirrored)) <= set(np.unique(filled))


def test_crop_mirrors_at_the_border() -> None:
    array = np.arange(16).reshape(4, 4)
    assert crop(array, -2, 0, 4)[:, 0].tolist() == [4, 0, 0, 4]
    assert crop(array, 0, 2, 4)[0].tolist() == [2, 3, 3, 2]


def blocks(rng: np.random.Generator, side: int = 64, block: int = 8) -> np.ndarray:
    """Random black and white squares, none the same when turned."""
    return np.kron(rng.integers(0, 2, (side // block, side // block)), np.ones((block, block), int))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    top=st.integers(-20, 50),
    left=st.integers(-20, 50),
    size=st.sampled_from([32, 24, 48]),
    turns=st.integers(0, 3),
    flip=st.booleans(),
)
def test_image_and_labels_of_a_view_stay_in_register(
    seed: int, top: int, left: int, size: int, turns: int, flip: bool
) -> None:
    truth = blocks(np.random.default_rng(seed))
    view = View(0, 0, top, left, size, turns, flip, gain=1.1, offset=-0.05)
    image = view.image_tensor(truth[..., None].astype(np.float32), 32)
    labels = view.label_tensor(truth, 32)
    assert image.shape == (3, 32, 32)
    assert labels.shape == (32, 32)
    inside = labels != -1
    agreement = ((image[0] > 0.5).long() == labels)[inside].float()
    assert agreement.mean() > (0.999 if size == 32 else 0.85) or not len(agreement)


def test_register_would_be_lost_by_a_wrong_turn() -> None:
    truth = blocks(np.random.default_rng(0))
    image = View(0, 0, 0, 0, 32, 1, True).image_tensor(truth[..., None].astype(np.float32), 32)
    labels = View(0, 0, 0, 0, 32, 2, True).label_tensor(truth, 32)
    assert ((image[0] > 0.5).long() == labels).float().mean() < 0.8


def test_outside_of_the_image_is_unlabelled() -> None:
    labels = View(0, 0, -16, 0, 32).label_tensor(np.ones((32, 32), np.int16), 32)
    assert (labels[:16] == -1).all()
    assert (labels[16:] == 1).all()


def test_intensity_augmentation_leaves_labels_alone() -> None:
    plane = np.random.default_rng(0).random((32, 32, 1)).astype(np.float32)
    plain = View(0, 0, 0, 0, 32).image_tensor(plane, 32)
    changed = View(0, 0, 0, 0, 32, gain=0.9, offset=0.05).image_tensor(plane, 32)
    torch.testing.assert_close(changed, 0.9 * plain + 0.05)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 9999),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    side=st.integers(1, 80),
)
def test_drawn_views_hold_a_label(seed: int, height: int, width: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    plane, row, column = map(int, rng.integers((2, height, width)))
    view = draw_view(3, (plane, row, column), (height, width), side, rng)
    assert (view.image, view.plane) == (3, plane)
    assert 0 <= row - view.top < view.size or view.size >= height
    target = np.full((height, width), -1, np.int16)
    target[row, column] = 1
    assert (crop(target, view.top, view.left, view.size, fill=-1) == 1).any()


def test_resize_keeps_values_and_orientation() -> None:
    ramp = torch.linspace(0, 1, 64).expand(2, 48, 64)
    for size in [(48, 64), (24, 32), (96, 128)]:
        out = resize(ramp, size)
        assert out.shape == (2, *size)
        assert (out[0, 0].diff() >= -1e-6).all()
        assert out.mean() == pytest.approx(0.5, abs=1e-3)


def test_shrinking_does_not_alias() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    assert resize(stripes, 16).std() < 0.05


TILE = 256


@pytest.mark.parametrize(
    "shape", [(35, 50), (256, 256), (300, 300), (10, 4000), (5000, 5000), (1, 1), (700, 700)]
)
def test_pixel_scale_gives_a_sensible_number_of_tiles(shape: tuple[int, int]) -> None:
    scale = auto_pixel_scale([shape], TILE)
    side = max(1, round(TILE / scale))
    tiles = [len(tile_starts(extent, side, 0.25)) for extent in shape]
    assert 0 < scale <= 4
    if max(shape) <= 4 * TILE:
        assert tiles == [1, 1], "the whole image is one tile"
        assert scale == pytest.approx(min(4, TILE / max(shape)), rel=1e-6)
    if shape == (10, 4000):
        assert scale > 0.5, "a thin strip is not reduced to nothing"
    if shape == (5000, 5000):
        assert scale == 0.25, "small objects stay visible, and a tile stays small in memory"
    assert np.prod(tiles) <= max(32, 1.5 * np.prod(shape) / (0.75 * side) ** 2)


def test_pixel_scale_depends_on_the_typical_image() -> None:
    shapes = [(256, 256)] * 5 + [(9000, 9000)]
    assert auto_pixel_scale(shapes, TILE) == auto_pixel_scale(shapes[:1], TILE)


@settings(deadline=None)
@given(
    extent=st.integers(1, 5000),
    tile=st.integers(8, 400),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)
def test_tiles_cover_the_extent_with_overlap(extent: int, tile: int, overlap: float) -> None:
    starts = tile_starts(extent, tile, overlap)
    if tile >= extent:
        (start,) = starts
        assert start <= 0
        assert start + tile >= extent
        assert abs((start + tile - extent) - -start) <= 1, "centred"
        return
    assert starts[0] == 0
    assert starts[-1] == extent - tile
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert steps.max() <= tile * (1 - overlap) + 1
    assert len(starts) == 1 + int(np.ceil((extent - tile) / (tile * (1 - overlap)))), "fewest"


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_blend_window_is_positive_symmetric_and_low_at_the_edge(size: int) -> None:
    window = blend_window(size, slice(None), slice(None))
    assert window.shape == (size, size)
    assert window.dtype == np.float32
    assert (window > 0).all()
    np.testing.assert_allclose(window, window[::-1, ::-1], rtol=1e-4)
    np.testing.assert_allclose(window, window.T, rtol=1e-5)
    if size >= 64:
        assert window[0].max() < 0.01 * window.max()
