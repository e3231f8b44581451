"""What a round learns from, as it travels to the process that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from napari_convlora.images.planes import Planes, drop_alpha, lazy_planes, read_pixels, to_planes
from napari_convlora.images.regions import Block, is_large
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.reviewed import Outlines, fill_reviewed
from napari_convlora.project import ImageEntry


@dataclass(frozen=True)
class OnDisk:
    """Pixels of a project's image that is not open; read by whoever opens it."""

    entry: ImageEntry
    folder: Path

    def open(self) -> Any:
        """Return the pixels as a layer would hold them."""
        return self.entry.as_layer(self.entry.read(self.folder))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An image and a copy of its annotations, free to travel to another process.

    Parameters
    ----------
    name
        Of the image layer.
    pixels
        As napari holds them, or `OnDisk`; a lazy array is computed by whoever calls `planes`.
    rgb, channel_axis
        How to read `pixels`; see `to_planes`.
    annotations : (P, H, W) int
    seen
        What the viewer shows; the image is predicted there first.
    reviewed
        Plane and vertices (N, 2) of every reviewed region.
    background_id
        Class of what remains unpainted in them; None if no class is the background.
    stem
        Of an image that only the project holds; "" of one in the viewer.
    """

    name: str
    pixels: Any
    rgb: bool
    channel_axis: int | None
    annotations: np.ndarray
    seen: Block | None = None
    reviewed: Outlines = ()
    background_id: int | None = None
    stem: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """Leave lazy pixels to the process that gets them."""
        return self.__dict__ | {"pixels": portable(self.pixels)}

    def planes(self) -> Planes:
        """Return the pixels as (P, H, W, C); a large lazy array stays lazy."""
        pixels = self.pixels.open() if isinstance(self.pixels, OnDisk) else self.pixels
        how: dict[str, Any] = {"rgb": self.rgb, "channel_axis": self.channel_axis}
        if not isinstance(pixels, np.ndarray):
            lazy = lazy_planes(pixels, **how, alpha=self.rgb, name=f"'{self.name}'")
            if is_large(lazy.shape):
                return lazy
            pixels = read_pixels(pixels, (slice(None),) * len(pixels.shape), lazy.name)
        planes = to_planes(np.asarray(pixels), **how)
        return drop_alpha(planes) if self.rgb else planes

    def labelled(self) -> list[tuple[Block, LabelledImage]]:
        """Return what the engine learns from, and where it lies; see `labelled_parts`.

        Raises
        ------
        InputError
            There are reviewed regions, but no class is the background.
        """
        from napari_convlora.labels.around_labels import labelled_parts

        annotations = fill_reviewed(self.annotations, self.reviewed, self.background_id, self.name)
        return labelled_parts(self.planes(), annotations, self.name)


def portable(pixels: Any) -> Any:
    """Leave a lazy array to the process it is sent to, unless it hangs on an open file."""
    if not isinstance(pixels, np.ndarray):
        try:
            cloudpickle.dumps(pixels)
        except Exception:  # pickle raises whatever the object does
            return read_pixels(pixels, (slice(None),) * len(pixels.shape), "The image")
    return pixels
