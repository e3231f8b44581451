"""Moves the viewer to a pixel of an image, or back to how the image was looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from napari_convlora.project import Viewpoint

if TYPE_CHECKING:
    from napari_convlora.prediction.uncertain_places import Place
    from napari_convlora.widget.layers.image_layers import ImageLayers


def show_place(record: ImageLayers, place: Place, pixels: int) -> None:
    """Bring `place` to the middle of the canvas, about `pixels` wide or nearer.

    Whoever has zoomed in further keeps that zoom.
    """
    viewer, image = record.viewer, record.image
    at = np.array(image.world_to_data(viewer.dims.point), float)
    axes = [axis for axis in range(len(record.shape)) if axis != record.channel_axis]
    leading = [record.shape[axis] for axis in axes[:-2]]
    planes = np.unravel_index(place.plane, leading) if leading else ()
    at[axes] = (*planes, place.row, place.column)
    world = np.array(image.data_to_world(at))
    beside = at.copy()
    beside[axes[-1]] += 1
    pixel = float(np.linalg.norm(image.data_to_world(beside) - world))
    # The image's axes are the last ones of the viewer's.
    first = viewer.dims.ndim - len(world)
    for axis in viewer.dims.not_displayed:
        if axis >= first:
            viewer.dims.set_point(axis, world[axis - first])
    camera = viewer.scene.camera
    shown = [world[axis - first] if axis >= first else 0.0 for axis in viewer.dims.displayed]
    camera.center = tuple([0.0, *shown][-3:])
    camera.zoom = max(camera.zoom, min(viewer.canvas.size) / (pixels * pixel))


def view_of(record: ImageLayers) -> Viewpoint | None:
    """Return how an image is looked at; None if it is not in the viewer."""
    viewer, image = record.viewer, record.image
    camera = viewer.scene.camera
    limits = tuple(map(float, image.contrast_limits))
    point, center = (tuple(map(float, at)) for at in (viewer.dims.point, camera.center))
    view = Viewpoint(point, center, float(camera.zoom), limits)
    return view if image in viewer.layers and view.sane else None


def show_view(record: ImageLayers, view: Viewpoint) -> None:
    """Look at an image as before."""
    viewer, camera = record.viewer, record.viewer.scene.camera
    record.image.contrast_limits = view.contrast
    if len(view.point) == viewer.dims.ndim:
        viewer.dims.set_point(range(viewer.dims.ndim), view.point)
    camera.center, camera.zoom = view.center, view.zoom
