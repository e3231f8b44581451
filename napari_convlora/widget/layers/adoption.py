"""Layers that are there already become an image's: the user's own, or an earlier session's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from napari.layers import Labels, Shapes

from napari_convlora.config import MAX_CLASSES, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels import importing
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.class_colours import colours_of, known_classes
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.prediction_layer import PredictionLayer


def adopt(record: ImageLayers, layer: Labels) -> None:
    """Use the user's own `layer` as annotations; its pixels stay as they are."""
    record.check_fits(layer)
    _disown(record)
    record.annotations = layer
    record.show_classes(record.classes)


def adopt_copy(record: ImageLayers, layer: Labels, plan: importing.ImportPlan) -> None:
    """Use a copy of the user's own `layer` as annotations, its values replaced by class ids.

    Parameters
    ----------
    record
        The image.
    layer
        Stays as it is, hidden.
    plan
        What becomes of its values.
    """
    record.check_fits(layer)
    copy = record.new_labels("annotations")
    importing.apply_import(plan, layer.data, copy.data)
    record.viewer.add_layer(copy)
    layer.visible = False
    adopt(record, copy)


def part_with_annotations(record: ImageLayers) -> None:
    """Leave the annotations layer to the user; the next one will be new."""
    record.collect_corrections()
    _disown(record)
    record.annotations = None


def _disown(record: ImageLayers) -> None:
    """Have a later panel not find the annotations; their classes stay known."""
    if record.annotations is not None:
        record.annotations.metadata.get(class_colours.KEY, {}).pop("image", None)


def find_layers(
    record: ImageLayers,
    taken: Collection[int] = (),
    strange: Callable[[Labels], bool] = lambda layer: False,
) -> bool:
    """Take up layers that an earlier session or the sample data made; True if there were.

    Parameters
    ----------
    record
        The image.
    taken
        The `id` of layers that are another image's.
    strange
        Whether a layer is left to the user to choose.
    """
    before = record.annotations, record.prediction, record.reviewed
    for layer in record.viewer.layers:
        known = layer.metadata.get(class_colours.KEY, {})
        if known.get("image") != record.image.name or id(layer) in taken:
            continue
        if isinstance(layer, Shapes) and known.get("role") == "reviewed":
            record.reviewed = record.reviewed or layer
        if not isinstance(layer, Labels) or not record.fits(layer):
            continue
        if known.get("role") == "annotations" and record.annotations is None:
            record.annotations = None if strange(layer) else layer
        elif known.get("role") == "prediction" and record.prediction is None and not strange(layer):
            record.written = PredictionLayer(layer, record.planes_shape)
    return before != (record.annotations, record.prediction, record.reviewed)


def plan_adoption(
    layer: Labels, meaning: importing.Meaning | None, kept: Sequence[ClassInfo]
) -> importing.ImportPlan | None:
    """Return what becomes of a layer's values; None if they are class ids as they are.

    Parameters
    ----------
    layer
        Of the user's own.
    meaning
        What its values stand for; None: they are class ids, and 0 is unlabelled.
    kept
        Classes that no value may join unless it has the same name.

    Raises
    ------
    InputError
        Its values are no classes, or the meaning cannot be used.
    """
    if meaning is not None:
        values = importing.count_values(layer.data)
        return importing.plan_import(values, meaning, kept, colours_of(layer.colormap))
    if (largest := int(np.max(layer.data, initial=0))) > MAX_CLASSES:
        raise InputError(
            f"'{layer.name}' holds the id {largest}, but classes end at {MAX_CLASSES}; "
            "renumber it, or start annotations of their own."
        )
    return None


def contradicts(layer: Labels, classes: Sequence[ClassInfo]) -> bool:
    """Whether a layer that was made here calls a class otherwise than `classes` do."""
    if class_colours.KEY not in layer.metadata:
        return False
    names = {info.id: info.name for info in classes_of(layer)}
    return any(names.get(info.id, info.name) != info.name for info in classes)


def classes_of(layer: Labels) -> tuple[ClassInfo, ...]:
    """Return the class table that a layer brings along."""
    return known_classes({n: getattr(layer, n) for n in ("metadata", "features", "colormap")})
