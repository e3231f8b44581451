"""How planes, rows and columns lie in an image layer, and which layers fit it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from napari.layers import Image, Labels, Shapes

from napari_convlora.errors import InputError
from napari_convlora.images.regions import Block
from napari_convlora.widget.layers.plane_axes import PlaneAxes

if TYPE_CHECKING:
    from napari.viewer import Viewer


class ImageFrame:
    """Size and axes of an image layer in its viewer, as they are at the moment.

    Parameters
    ----------
    viewer
        That shows the image.
    image
        Never written to.
    channel_axis
        Axis of the image that holds channels, if it is not an RGB image.

    Attributes
    ----------
    shapes
        Shapes layers that were put on the image, for as long as there is any use for them.
    """

    def __init__(self, viewer: Viewer, image: Image, channel_axis: int | None = None) -> None:
        self.viewer, self.image = viewer, image
        self.shapes: WeakSet[Shapes] = WeakSet()
        self.channel_axis = None if image.rgb else channel_axis

    @property
    def pixels(self) -> Any:
        """Pixels of the image, at full resolution if it is multiscale."""
        return self.image.data[0] if self.image.multiscale else self.image.data

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a Labels layer of this image; the channel axis has length 1."""
        shape = list(self.pixels.shape[:-1] if self.image.rgb else self.pixels.shape)
        if self.channel_axis is not None:
            shape[self.channel_axis] = 1
        return tuple(shape)

    @property
    def planes_shape(self) -> tuple[int, int, int]:
        """(P, H, W) of the image."""
        shape = [self.shape[axis] for axis in self.axes.planar]
        if len(shape) < 2:
            raise InputError("This layer has no height and width; choose an image.")
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    @property
    def n_channels(self) -> int:
        """Channels that the engine sees."""
        if self.image.rgb:
            return min(3, self.pixels.shape[-1])
        return 1 if self.channel_axis is None else self.pixels.shape[self.channel_axis]

    @property
    def axes(self) -> PlaneAxes:
        """How rows and columns of planes lie in a layer of this image."""
        return PlaneAxes(self.shape, self.channel_axis)

    def plane(self) -> int:
        """Index of the plane that the viewer shows."""
        return self.locate(self.viewer.dims.point)[0]

    def locate(self, world: Sequence[float]) -> tuple[int, float, float]:
        """Return plane, row and column of a point in world coordinates."""
        at = self.image.world_to_data(world)
        rows, columns = self.axes.planar[-2:]
        return self.axes.index(at), float(at[rows]), float(at[columns])

    @property
    def in_view(self) -> bool:
        """Whether the viewer shows a plane of the image as a whole, transposed or not."""
        dims = self.viewer.dims
        first = dims.ndim - len(self.shape)
        plane = [axis + first for axis in self.axes.planar[-2:]]
        return dims.ndisplay == 2 and sorted(dims.displayed) == plane

    def check_in_view(self) -> None:
        """Raise an `InputError` unless the viewer shows a plane of the image as a whole."""
        if self.in_view:
            return
        remedy = "press Ctrl+Y to leave the 3-D view."
        if self.viewer.dims.ndisplay == 2:
            remedy = "press Ctrl+E to roll the axes until its height and width are shown."
        raise InputError(f"This works in a view of one plane of '{self.image.name}'; {remedy}")

    def seen(self, *layers: Labels | None) -> Block:
        """Return the part of the image that the viewer shows, by the first layer it has.

        Layers that leave out an axis of length 1, as `fits` allows, are passed over.
        """
        alike = (
            one
            for one in layers
            if one is not None and one in self.viewer.layers and one.ndim == self.image.ndim
        )
        layer: Any = next(alike, self.image)
        corners = layer.corner_pixels
        if layer.multiscale:  # what napari has loaded, which may be more than it shows
            corners = corners * layer.downsample_factors[layer.data_level]
        corners = corners[:, self.axes.planar[-2:]].round().astype(int)
        (top, left), (bottom, right) = corners.tolist()
        return Block(self.plane(), top, left, bottom - top + 1, right - left + 1)

    def fits(self, layer: Labels) -> bool:
        """Whether `layer` can hold annotations of this image: its size, in memory, integers."""
        data = layer.data
        if layer.multiscale or not isinstance(data, np.ndarray) or not data.flags.c_contiguous:
            return False
        return [n for n in data.shape if n > 1] == [n for n in self.shape if n > 1]

    def check_fits(self, layer: Labels) -> None:
        """Raise an `InputError` unless `layer` can hold annotations of this image."""
        if not self.fits(layer):
            raise InputError(
                f"'{layer.name}' cannot hold annotations of '{self.image.name}'; choose an "
                "editable Labels layer of the image's own size."
            )

    def free_name(self, role: str) -> str:
        """Return a name for a layer of this image that no other layer has yet."""
        return f"{role} of {self.image.name}" if role in self.viewer.layers else role
