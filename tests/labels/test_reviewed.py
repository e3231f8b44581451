"""Reviewed regions: which pixels lie inside, and what they count as."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.errors import InputError
from napari_convlora.labels.reviewed import fill_outlines, fill_reviewed, inside_outlines

few = settings(max_examples=50, deadline=None)


@few
@given(
    st.lists(st.tuples(*[st.integers(-72, 160)] * 2), min_size=3, max_size=6),
    st.integers(0, 1),
)
def test_an_outline_changes_its_own_plane_and_nothing_beyond_itself(
    corners: list[tuple[float, float]], plane: int
) -> None:
    vertices = np.array(corners) / 8
    inside = inside_outlines((2, 9, 11), [(plane, vertices)])
    assert not inside[1 - plane].any()
    rows, columns = np.nonzero(inside[plane])
    assert (rows >= vertices[:, 0].min()).all()
    assert (columns <= vertices[:, 1].max()).all()


def test_a_region_larger_than_the_plane_holds_all_of_it() -> None:
    square = np.array([[-0.5, -0.5], [-0.5, 10.5], [8.5, 10.5], [8.5, -0.5]])
    assert inside_outlines((1, 9, 11), [(0, square)]).all()
    inside = inside_outlines((1, 9, 11), [(0, square / 2 + 0.1)])[0]
    assert inside.sum() == 5 * 6
    assert inside[:5, :6].all()


def test_filling_outlines_changes_unlabelled_pixels_of_their_plane_only() -> None:
    annotations = np.array([[[0, 2], [3, 0]], [[0, 0], [0, 0]]])
    whole = np.array([[-0.5, -0.5], [-0.5, 1.5], [1.5, 1.5], [1.5, -0.5]])
    filled = fill_outlines(annotations, [(0, whole), (-1, whole), (2, whole)], 4)
    np.testing.assert_array_equal(filled, [[[4, 2], [3, 4]], [[0, 0], [0, 0]]])
    assert fill_outlines(annotations, [(0, whole)], None) is annotations


def test_regions_without_a_background_class_name_the_remedy() -> None:
    nothing = np.zeros((1, 2, 2), int)
    square = np.array([[0, 0], [0, 1], [1, 1]])
    assert fill_reviewed(nothing, (), None, "cells") is nothing
    with pytest.raises(InputError, match=r"'cells' has reviewed regions.*mark one"):
        fill_reviewed(nothing, [(0, square)], None, "cells")
