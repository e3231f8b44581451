"""What the model looks at for a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_convlora.errors import InputError
from napari_convlora.prediction.prompts import Box, Click, Prompt, Window, choose_window


@st.composite
def prompts_in_planes(draw):
    """Return the shape of a plane, and a box or a click in it."""
    shape = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    rows, columns = (
        sorted(draw(st.tuples(*[st.floats(-0.5, n - 0.5)] * 2))) for n in shape
    )  # fmt: skip
    if draw(st.booleans()):
        return shape, Prompt((Click(rows[0], columns[0]),))
    return shape, Prompt(box=Box(rows[0], columns[0], rows[1], columns[1]))


@given(prompts_in_planes(), st.sampled_from([64, 256, 1024]))
def test_the_window_holds_the_prompt_and_lies_in_the_plane(case, tile):
    shape, prompt = case
    window = choose_window(shape, prompt.bounds, tile)
    assert window.holds(prompt.bounds)
    assert 0 <= window.top <= window.top + window.height <= shape[0]
    assert 0 <= window.left <= window.left + window.width <= shape[1]
    # What is looked at is neither enlarged needlessly nor so large that the prompt gets lost.
    side = max(window.height, window.width)
    extent = 1 + max(
        prompt.bounds.bottom - prompt.bounds.top, prompt.bounds.right - prompt.bounds.left
    )
    assert side == max(shape) or side >= tile
    assert side <= max(2 * tile, 8 * extent)


def test_a_small_plane_is_seen_whole_and_a_click_in_a_large_one_at_native_scale():
    at = Box(100, 100, 100, 100)
    assert choose_window((320, 500), at, 256) == Window(0, 0, 320, 500)
    assert choose_window((4000, 3000), at, 256) == Window(0, 0, 256, 256)


def test_prompts_close_to_each_other_share_a_window():
    places = [Box(r, c, r, c) for r in (1000, 1030) for c in (2000, 2020)]
    assert len({choose_window((4000, 4000), at, 256) for at in places}) == 1


def test_something_must_say_where_the_object_is():
    with pytest.raises(InputError, match="before what is not"):
        Prompt((Click(1, 1, positive=False),))


def test_a_box_is_cut_at_the_border():
    assert Box(-9, 2, 99, 5).inside((10, 10)) == Box(-0.5, 2, 9.5, 5)
    assert Box(20, 2, 30, 5).inside((10, 10)) is None
