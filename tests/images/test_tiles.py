"""Tiles: a blend is the same for every window and for single pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.images import tiles as tiles_module
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.resample import resize
from napari_convlora.images.tiles import Tile, blend, corners, sample, tile_pixels


def random_tiles(height: int, width: int, side: int, seed: int, grid: int = 8) -> list[Tile]:
    generator = torch.Generator().manual_seed(seed)
    everywhere = slice(0, height), slice(0, width)
    return [
        Tile(*corner, side, torch.rand(3, grid, grid, generator=generator))
        for corner in corners((height, width), side, *everywhere)
    ]


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    side=st.integers(4, 64),
    seed=st.integers(0, 99),
)
def test_a_window_and_single_pixels_are_those_of_the_whole(
    size: tuple[int, int], side: int, seed: int
) -> None:
    tiles = random_tiles(*size, side, seed)
    whole = blend(tiles, slice(0, size[0]), slice(0, size[1]))
    assert whole.shape == (3, *size)
    assert ((whole >= 0) & (whole <= 1)).all()
    rng = np.random.default_rng(seed)
    top, left = (int(rng.integers(n)) for n in size)
    rows, columns = slice(top, size[0]), slice(left, size[1])
    here = set(corners(size, side, rows, columns))
    near = [tile for tile in tiles if (tile.top, tile.left) in here]
    assert np.array_equal(blend(near, rows, columns), whole[:, rows, columns])
    at = rng.integers(size, size=(20, 2)).T
    np.testing.assert_allclose(sample(tiles, *at), whole[:, at[0], at[1]].T, atol=1e-5)


@pytest.mark.parametrize("side", [300, 64, 1000])
def test_a_tile_is_enlarged_as_torch_would(side: int) -> None:
    values = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = resize(values, side).numpy()
    rows, columns = slice(side // 3, side // 2), slice(0, side)
    part = tiles_module._enlarged(values.numpy(), side, rows, columns)
    np.testing.assert_allclose(part, whole[:, rows, columns], atol=1e-5)


def test_the_model_sees_a_tile_beyond_the_border_mirrored() -> None:
    plane = np.arange(36, dtype=np.float32).reshape(6, 6, 1)
    seen = tile_pixels(plane, (-1, -1), 8, 8, Normalizer((0.0,), (35.0,)))
    assert seen.shape == (3, 8, 8)
    np.testing.assert_allclose(seen[0], np.pad(plane[..., 0], 1, mode="symmetric") / 35)
