"""New Labels and Shapes layers that lie exactly on an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from napari.layers import Image, Labels, Shapes

from napari_convlora.blocks import is_large
from napari_convlora.config import ClassInfo
from napari_convlora.planes import Planes
from napari_convlora.project import ImageEntry
from napari_convlora.widget import class_colours
from napari_convlora.widget.image_frame import ImageFrame

_TRANSFORMS = ("rotate", "shear", "affine", "units", "axis_labels")
_REVIEWED = "#ff2bd6"  # no class is given this colour by itself
_OPACITY = {"annotations": 0.7, "prediction": 0.5}


def image_of(entry: ImageEntry, levels: Sequence[Planes]) -> Image:
    """Return an Image layer of a project's image; what is not in memory stays there.

    Parameters
    ----------
    entry
        What the layer was like.
    levels
        Its pixels (P, H, W, C), and smaller copies of them.
    """
    pixels = [entry.as_layer(level) for level in levels]
    if not isinstance(pixels[0], np.ndarray):
        pixels = [_lazy(array) for array in pixels]
    place = {n: getattr(entry, n) for n in ("scale", "translate") if getattr(entry, n)}
    multiscale = len(pixels) > 1
    data = pixels if multiscale else pixels[0]
    return Image(data, name=entry.name, rgb=entry.rgb, multiscale=multiscale, **place)


def _lazy(array: Any) -> da.Array:
    meta = np.empty((0,) * len(array.shape), array.dtype)
    return da.from_array(array, "auto", name=False, fancy=False, meta=meta)


def placement(frame: ImageFrame) -> dict[str, Any]:
    """Return keyword arguments that put a layer exactly on an image; channels have length 1."""
    image, channel_axis = frame.image, frame.channel_axis
    scale, translate = image.scale.copy(), image.translate.copy()
    if channel_axis is not None:
        # One label voxel spans all channels, so it shows whichever channel is looked at.
        n = frame.pixels.shape[channel_axis]
        translate[channel_axis] += scale[channel_axis] * (n - 1) / 2
        scale[channel_axis] *= n
    others = {transform: getattr(image, transform) for transform in _TRANSFORMS}
    return {"scale": scale, "translate": translate, **others}


def labels_like(frame: ImageFrame, role: str, classes: Sequence[ClassInfo]) -> Labels:
    """Return an empty Labels layer in the place of an image and the colours of `classes`.

    Parameters
    ----------
    frame
        The image.
    role
        ``annotations`` or ``prediction``.
    classes
        The class table.
    """
    shape = frame.shape
    return Labels(
        np.zeros(shape, np.uint8 if is_large([math.prod(shape)]) else np.int32),  # ids end at 255
        name=frame.free_name(role),
        opacity=_OPACITY[role],
        **placement(frame),
        **class_colours.attributes(classes, role, frame.image.name),
    )


def shapes_like(frame: ImageFrame, name: str) -> Shapes:
    """Return an empty Shapes layer of outlines in the place of an image."""
    return Shapes(
        ndim=len(frame.shape),
        name=name,
        face_color="transparent",
        edge_width=1,
        **placement(frame),
    )


def regions_like(frame: ImageFrame) -> Shapes:
    """Return an empty layer of reviewed regions in the place of an image."""
    layer = shapes_like(frame, frame.free_name("reviewed"))
    layer.current_edge_color = _REVIEWED
    layer.current_edge_width = max(1, round(min(frame.planes_shape[1:]) / 200))
    layer.metadata = {class_colours.KEY: {"role": "reviewed", "image": frame.image.name}}
    return layer
