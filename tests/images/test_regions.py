"""Blocks cover an image once, and those that are looked at come first."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from napari_convlora.images.regions import BLOCK, Block, is_large, plan_blocks

extents = st.integers(1, 6 * BLOCK)


@given(st.integers(1, 3), extents, extents)
def test_blocks_cover_every_pixel_once(n_planes: int, height: int, width: int) -> None:
    covered = np.zeros((n_planes, -(-height // 64), -(-width // 64)), int)
    pixels = 0
    for block in plan_blocks((n_planes, height, width)):
        assert (block.top % BLOCK, block.left % BLOCK) == (0, 0)
        assert block.rows.stop <= height
        assert block.columns.stop <= width
        pixels += block.height * block.width
        covered[
            block.plane,
            block.top // 64 : -(-block.rows.stop // 64),
            block.left // 64 : -(-block.columns.stop // 64),
        ] += 1
    assert pixels == n_planes * height * width
    assert (covered == 1).all()


def test_neighbours_follow_one_another() -> None:
    """Else tiles that they share would be forgotten in between."""
    blocks = plan_blocks((1, 20480, 20480))
    steps = [math.dist((a.top, a.left), (b.top, b.left)) for a, b in itertools.pairwise(blocks)]
    assert np.mean(steps) < 2 * BLOCK


def test_what_is_seen_comes_first() -> None:
    seen = Block(1, 3000, 2100, 900, 700)
    blocks = plan_blocks((2, 8000, 8000), seen)
    assert set(blocks) == set(plan_blocks((2, 8000, 8000)))
    assert (blocks[0].plane, blocks[0].top, blocks[0].left) == (1, 3072, 2048)
    touched = [
        b
        for b in blocks
        if b.plane == 1
        and b.top < 3900
        and b.rows.stop > 3000
        and b.left < 2800
        and b.columns.stop > 2100
    ]
    assert touched == blocks[: len(touched)]
    later = plan_blocks((6, 600, 600), Block(3, 0, 0, 9, 9))
    assert [b.plane for b in later[::4]] == [3, 2, 4, 1, 5, 0]


def test_a_stack_is_large_as_a_whole() -> None:
    assert not is_large((1, 8192, 8192, 3))
    assert is_large((2, 8192, 8192, 1))
