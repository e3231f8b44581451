"""New Labels and Shapes layers that lie exactly on an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from napari.layers import Image, Labels, Shapes

from napari_convlora.blocks import is_large
from napari_convlora.config import ClassInfo
from napari_convlora.widget import class_colours

_TRANSFORMS = ("rotate", "shear", "affine", "units", "axis_labels")
_REVIEWED = "#56b4e9"
_OPACITY = {"annotations": 0.7, "prediction": 0.5}


def placement(image: Image, channel_axis: int | None) -> dict[str, Any]:
    """Return keyword arguments that put a layer exactly on `image`.

    Parameters
    ----------
    image
        Whose transforms the layer takes.
    channel_axis
        Axis of `image` that holds channels, if any; in the layer it has length 1.
    """
    scale, translate = image.scale.copy(), image.translate.copy()
    if channel_axis is not None:
        # One label voxel spans all channels, so it shows whichever channel is looked at.
        n = (image.data[0] if image.multiscale else image.data).shape[channel_axis]
        translate[channel_axis] += scale[channel_axis] * (n - 1) / 2
        scale[channel_axis] *= n
    others = {transform: getattr(image, transform) for transform in _TRANSFORMS}
    return {"scale": scale, "translate": translate, **others}


def labels_like(
    image: Image,
    shape: tuple[int, ...],
    channel_axis: int | None,
    role: str,
    name: str,
    classes: Sequence[ClassInfo],
) -> Labels:
    """Return an empty Labels layer in the place of `image` and the colours of `classes`.

    Parameters
    ----------
    image
        Whose transforms the layer takes.
    shape
        Of the layer; the channel axis has length 1.
    channel_axis
        Axis of `image` that holds channels, if any.
    role
        ``annotations`` or ``prediction``.
    name
        Of the layer.
    classes
        The class table.
    """
    return Labels(
        np.zeros(shape, np.uint8 if is_large([math.prod(shape)]) else np.int32),  # ids end at 255
        name=name,
        opacity=_OPACITY[role],
        **placement(image, channel_axis),
        **class_colours.attributes(classes, role, image.name),
    )


def shapes_like(image: Image, ndim: int, channel_axis: int | None, name: str) -> Shapes:
    """Return an empty Shapes layer of outlines in the place of `image`; see `labels_like`."""
    return Shapes(
        ndim=ndim,
        name=name,
        face_color="transparent",
        edge_width=1,
        **placement(image, channel_axis),
    )


def regions_like(image: Image, ndim: int, channel_axis: int | None, name: str) -> Shapes:
    """Return an empty layer of reviewed regions in the place of `image`; see `labels_like`."""
    layer = shapes_like(image, ndim, channel_axis, name)
    layer.current_edge_color = _REVIEWED
    layer.current_edge_width = max(1, round(min(image.extent.data[1][-2:]) / 200))
    layer.metadata = {class_colours.KEY: {"role": "reviewed", "image": image.name}}
    return layer
