"""What is counted, and that counting is no burden."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from napari_convlora.widget.layers.label_counts import LabelCounts, count

WHOLE = np.array([[-0.5, -0.5], [-0.5, 6.5], [4.5, 6.5], [4.5, -0.5]])


@given(arrays.arrays(np.int32, (2, 5, 7), elements=st.integers(0, 3)))
def test_strokes_are_connected_groups_of_a_class_in_a_plane(labels):
    counts = count(labels, [(1, WHOLE)])
    everywhere = np.ones((3, 3))
    for i in (1, 2, 3):
        assert counts.pixels.get(i, 0) == (labels == i).sum()
        assert counts.strokes.get(i, 0) == sum(
            ndimage.label(plane == i, everywhere)[1] for plane in labels
        )
    assert counts.regions == 1
    assert counts.remaining == (labels[1] == 0).sum()


def test_ids_that_are_no_class_are_left_out():
    labels = np.array([[[1, 999, -1, 0]]])
    assert count(labels) == LabelCounts({1: 1}, {1: 1})


def test_overlapping_regions_count_a_pixel_once():
    assert count(np.zeros((1, 5, 7), int), [(0, WHOLE), (0, WHOLE)]).remaining == 35
