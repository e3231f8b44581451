"""Which planes, rows and columns areas of a Shapes layer mean."""

from __future__ import annotations

import numpy as np
import pytest
from napari.layers import Shapes

from napari_convlora.widget.layers.plane_axes import PlaneAxes


@pytest.mark.parametrize(("shape", "channel_axis"), [((3, 40, 50), None), ((1, 40, 50), 0)])
def test_areas_that_stand_upright_on_the_planes_are_none(shape, channel_axis):
    axes = PlaneAxes(shape, channel_axis)
    layer = Shapes(ndim=3)
    layer.add_rectangles(np.array([[0, 5, 5], [0, 5, 20], [0, 20, 20], [0, 20, 5]]))
    layer.add_rectangles(np.array([[0, 5, 7], [2, 5, 7], [2, 20, 7], [0, 20, 7]]))
    assert axes.stray(layer) == {1}
    ((plane, vertices),) = axes.outlines(layer)
    assert plane == 0
    assert vertices.tolist() == [[5, 5], [5, 20], [20, 20], [20, 5]]
    assert axes.drop_stray(layer)
    assert len(layer.data) == 1
