"""What the model says of an image is written into its prediction layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from napari_convlora.images.regions import Block
from napari_convlora.labels.annotations import known_only, protect
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.prediction_layer import PredictionLayer


def prepare_prediction(record: ImageLayers) -> None:
    """Have the prediction layer in the viewer, empty where it is new.

    napari takes up to a third of a second to add a layer: better spent when a button is
    pressed than in the middle of a round.
    """
    if record.prediction is None or not record.fits(record.prediction):
        record.written = PredictionLayer(record.new_labels("prediction"), record.planes_shape)
    layers = record.viewer.layers
    if record.prediction not in layers:
        below = layers.index(record.annotations) if record.annotating else len(layers)
        active = layers.selection.active
        layers.insert(below, record.prediction)
        layers.selection.active = active  # the user may be painting on another layer


def withdraw_prediction(record: ImageLayers) -> None:
    """Take the prediction layer out of the viewer again if nothing was written or painted."""
    written, layers = record.written, record.viewer.layers
    if written is None or written.begun or written.edited or written.layer not in layers:
        return
    if not written.stroke.active:
        layers.remove(written.layer)
    elif not written.stroke.waiting:  # for what was predicted
        written.stroke.afterwards(lambda: withdraw_prediction(record))


def show(record: ImageLayers, labels: np.ndarray, plane: int | None = None) -> bool:
    """Write class ids (P, H, W), or (H, W) of one plane, into the prediction layer.

    Annotations stay on top, and edits of the prediction become annotations first. While the
    user is in the middle of a stroke on the prediction a preview is left out (returns False)
    and a whole prediction waits for the end of the stroke.

    Parameters
    ----------
    record
        The image.
    labels
        Ids of classes as the model learnt them.
    plane
        Which plane they are of; None: of all.
    """
    if record.written is not None and record.written.stroke.active:
        if plane is None:
            record.written.stroke.afterwards(lambda: show(record, labels))
        return False
    prepare_prediction(record)
    record.collect_corrections()
    part = np.s_[:] if plane is None else np.s_[plane : plane + 1]
    painted = record.annotated(part)
    shown = protect(_of_today(record, labels).reshape(painted.shape), painted)
    record.written.write([(part, shown)])
    return True


def show_parts(record: ImageLayers, parts: Sequence[tuple[Block, np.ndarray]]) -> None:
    """Write class ids (h, w) of parts of the image into the prediction layer, as `show`."""
    record.late.extend(parts)
    if record.written is not None and record.written.stroke.active:
        record.written.stroke.afterwards(lambda: show_parts(record, ()))
        return
    prepare_prediction(record)
    record.collect_corrections()
    late, record.late = record.late, []
    painted = {b.plane: record.annotated(np.s_[b.plane : b.plane + 1])[0] for b, _ in late}
    record.written.write(
        (b.index, protect(_of_today(record, labels), painted[b.plane][b.index[1:]]))
        for b, labels in late
    )


def _of_today(record: ImageLayers, labels: np.ndarray) -> np.ndarray:
    """Return class ids that a model learnt in those of the class table."""
    return known_only(labels, record.classes, record.merged)


def keep_previous(record: ImageLayers) -> None:
    """Keep the prediction as it is now, to be compared with the next."""
    if record.predicted:
        record.extra.show_previous(record.predicted_labels(), record.classes)
