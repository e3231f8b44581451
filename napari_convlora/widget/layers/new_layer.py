"""New Labels and Shapes layers that lie exactly on an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from napari.layers import Image, Labels, Layer, Shapes

from napari_convlora.config import ClassInfo
from napari_convlora.images.planes import Planes
from napari_convlora.images.regions import is_large
from napari_convlora.project import ImageEntry
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.image_frame import ImageFrame

PLACEMENT = ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels")
"""Attributes of a layer that say where it lies; napari has an event for each."""

_WORDS = ("units", "axis_labels")
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
    place, channel_axis = _place_of(frame.image), frame.channel_axis
    if channel_axis is not None:
        # One label voxel spans all channels, so it shows whichever channel is looked at.
        n = frame.pixels.shape[channel_axis]
        axis = (place["rotate"] @ place["shear"])[:, channel_axis]
        place["translate"] += axis * place["scale"][channel_axis] * (n - 1) / 2
        place["scale"][channel_axis] *= n
    return place | {name: tuple(place[name]) for name in _WORDS}


def put_in_place(frame: ImageFrame, layer: Layer) -> None:
    """Put a layer that there is already exactly on an image.

    As `ImageFrame.fits` allows, either may lack axes of length 1; those of the layer stay.
    """
    its, mine = _shared_axes(frame, layer)
    now = _place_of(layer)
    for name, place in placement(frame).items():
        new, old = now[name].copy(), now[name]
        if name == "affine":  # whose last row and column belong to no axis
            to, of = ([*(axis - 1 for axis in axes), -1] for axes in (mine, its))
        else:
            to, of = mine, its
        of_image = np.asarray(place, old.dtype)
        new[np.ix_(*[to] * new.ndim)] = of_image[np.ix_(*[of] * new.ndim)]
        if not np.array_equal(new, old):  # napari draws a layer anew for every one
            setattr(layer, name, tuple(new) if name in _WORDS else new)


def _place_of(layer: Layer) -> dict[str, np.ndarray]:
    """Return where a layer lies, as copies."""
    place = {n: np.array(getattr(layer, n), object if n in _WORDS else float) for n in PLACEMENT}
    if place["shear"].ndim == 1:  # napari leaves the ones and zeros out
        shear, triangle = np.eye(layer.ndim), np.triu_indices(layer.ndim, 1)
        shear[triangle], place["shear"] = place["shear"], shear
    return place


def _shared_axes(frame: ImageFrame, layer: Layer) -> tuple[list[int], list[int]]:
    """Return axes of an image, counted from the last, and which of a layer's are the same."""
    shape = frame.shape
    sizes = shape[-layer.ndim :] if isinstance(layer, Shapes) else layer.data.shape
    its, mine = [], []
    i = j = -1
    while -i <= len(shape) and -j <= len(sizes):
        same = shape[i] == sizes[j]
        if same:
            its.append(i)
            mine.append(j)
        i, j = i - (same or shape[i] == 1), j - (same or shape[i] != 1)
    return its, mine


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


def shapes_like(frame: ImageFrame, name: str, **style: Any) -> Shapes:
    """Return an empty Shapes layer in the place of an image; unless styled, of outlines."""
    style = {"face_color": "transparent", "edge_width": 1} | style
    layer = Shapes(ndim=len(frame.shape), name=name, **style, **placement(frame))
    frame.shapes.add(layer)
    return layer


def regions_like(frame: ImageFrame) -> Shapes:
    """Return an empty layer of reviewed regions in the place of an image."""
    layer = shapes_like(frame, frame.free_name("reviewed"))
    layer.current_edge_color = _REVIEWED
    layer.current_edge_width = max(1, round(min(frame.planes_shape[1:]) / 200))
    layer.metadata = {class_colours.KEY: {"role": "reviewed", "image": frame.image.name}}
    return layer
