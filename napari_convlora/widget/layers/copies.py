"""What is painted on images as a whole: copied for the process and the disk, and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import numpy as np

from napari_convlora.errors import InputError
from napari_convlora.labels.classes import find_background
from napari_convlora.session.snapshot import Snapshot
from napari_convlora.widget.layers.image_layers import ImageLayers


def snapshot(record: ImageLayers) -> Snapshot:
    """Return a copy that includes the corrections made on the prediction."""
    record.collect_corrections()
    return snapshot_of(record, record.painted().copy())


def snapshot_of(record: ImageLayers, painted: np.ndarray) -> Snapshot:
    """Return the image with other annotations (P, H, W)."""
    return Snapshot(
        record.image.name,
        record.pixels,
        record.image.rgb,
        record.channel_axis,
        painted,
        record.seen(record.prediction, record.annotations),
        record.outlines(),
        find_background(record.classes),
    )


def work(record: ImageLayers) -> np.ndarray | None:
    """Copy (P, H, W) of everything painted; None where there is no layer to paint on.

    Unlike `painted`, it holds annotations that were removed from the viewer, and corrections
    that are not annotations yet. No layer changes.
    """
    base = None
    if record.annotations is not None and record.fits(record.annotations):
        base = record.annotations.data.reshape(record.planes_shape)
    written = record.written
    if written is not None and written.edited and record.fits(written.layer):
        base = np.zeros(record.planes_shape, np.int32) if base is None else base
        return np.where(written.corrected(), written.view, base)
    return None if base is None else base.copy()


def painted_with(records: Iterable[ImageLayers], class_id: int) -> int:
    """Return how many pixels of all images are annotated with a class."""
    painted = (work(record) for record in records)
    return sum(int(np.count_nonzero(p == class_id)) for p in painted if p is not None)


def used_classes(records: Iterable[ImageLayers]) -> set[int]:
    """Return the ids that occur in any layer of these images."""
    used: set[int] = set()
    for record in records:
        with contextlib.suppress(InputError):  # its layers have lost their size
            labels = record.predicted_labels() if record.predicted else record.painted()
            used.update(np.unique(labels).tolist())
    return used - {0}
