"""The layers of one image: made, coloured, kept in its place, and what is painted on them.

Everything here runs in the main thread; what travels to the worker is a `Snapshot` of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Layer, Shapes

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.images.regions import Block
from napari_convlora.labels.annotations import protect
from napari_convlora.labels.classes import find_background
from napari_convlora.labels.reviewed import Outlines, fill_outlines
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.class_keys import bind_keys
from napari_convlora.widget.layers.extra_layers import ExtraLayers
from napari_convlora.widget.layers.image_frame import ImageFrame
from napari_convlora.widget.layers.new_layer import (
    PLACEMENT,
    labels_like,
    put_in_place,
    regions_like,
)
from napari_convlora.widget.layers.prediction_layer import PredictionLayer, set_pixels

if TYPE_CHECKING:
    from napari.viewer import Viewer


class ImageLayers(ImageFrame):
    """One image layer, the user's annotations of it, and the prediction of the model.

    Parameters
    ----------
    viewer
        Where new layers go.
    image
        Never written to.
    classes
        The class table, in whose colours new layers appear.
    channel_axis
        Axis of the image that holds channels, if it is not an RGB image.

    Attributes
    ----------
    on_label
        Called with the class that the user chooses on a layer, by key or by hand.
    merged
        For classes that are no longer in the table, the one that has taken their pixels.
    annotations, prediction, reviewed
        Labels layers and the Shapes layer of reviewed regions, or None. Annotations that were
        removed from the viewer are remembered, so that `annotate` can bring them back.
    extra
        Layers that are made from the prediction.
    written
        The prediction layer and what the model wrote into it; None if there is none.
    late
        Parts of a prediction that wait for the end of a stroke.
    adapter
        What wrote the prediction; None if that is not known.
    """

    def __init__(
        self,
        viewer: Viewer,
        image: Image,
        classes: Sequence[ClassInfo],
        channel_axis: int | None = None,
    ) -> None:
        super().__init__(viewer, image, channel_axis)
        self.classes = tuple(classes)
        self.annotations: Labels | None = None
        self.extra = ExtraLayers(self)
        self.adapter: object = None
        self.reviewed: Shapes | None = None
        self.written: PredictionLayer | None = None
        self.late: list[tuple[Block, np.ndarray]] = []
        self.on_label: Callable[[int], None] = lambda class_id: None
        self.merged: Mapping[int, int] = {}
        image.events.name.connect(self._on_renamed)
        for name in PLACEMENT:
            getattr(image.events, name).connect(self._on_moved)

    @property
    def prediction(self) -> Labels | None:
        """The layer that the model writes."""
        return None if self.written is None else self.written.layer

    @property
    def annotating(self) -> bool:
        """Whether the annotations layer is in the viewer."""
        return self.annotations is not None and self.annotations in self.viewer.layers

    @property
    def teaching(self) -> bool:
        """Whether there is a layer from which a round may learn."""
        return self.annotating or bool(self.outlines())

    @property
    def predicted(self) -> bool:
        """Whether a prediction is in the viewer, not just the layer for one."""
        written, layer = self.written, self.prediction
        here = layer is not None and layer in self.viewer.layers and self.fits(layer)
        return here and written is not None and written.begun

    @property
    def left(self) -> np.ndarray | None:
        """What is left (P, H, W) of a prediction that was edited; None if it was not."""
        written = self.written
        return written.left if self.predicted and written and written.edited else None

    @property
    def corrected(self) -> bool:
        """Whether something painted on the prediction is no annotation yet."""
        written = self.written
        return written is not None and written.edited and bool(written.corrected().any())

    def annotate(self) -> Labels:
        """Return the annotations layer, created or brought back if it is not in the viewer."""
        if self.annotations is None:
            self.annotations = self.new_labels("annotations")
            self.annotations.brush_size = max(3, round(min(self.planes_shape[1:]) / 60))
        if self.annotations not in self.viewer.layers:
            self.viewer.add_layer(self.annotations)
        return self.annotations

    def review(self) -> Shapes:
        """Return the layer of reviewed regions, created if there is none."""
        if self.reviewed is None:
            active = self.viewer.layers.selection.active
            self.reviewed = regions_like(self)
            self.viewer.add_layer(self.reviewed)
            self.viewer.layers.selection.active = active  # the user may be painting on it
        return self.reviewed

    def outlines(self) -> Outlines:
        """Return the reviewed regions."""
        return () if self.reviewed is None else self.axes.outlines(self.reviewed)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that belong to the image."""
        found = self.annotations, self.prediction, self.reviewed
        return tuple(layer for layer in found if layer is not None)

    def show_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Give both layers the colours and names of `classes`."""
        self.classes = tuple(classes)
        for role in ("annotations", "prediction"):
            layer = getattr(self, role)
            if layer is not None:
                self._follow(layer)
                layer.colormap = class_colours.colormap(classes)
                layer.features = class_colours.features(classes)
                layer.metadata.update(class_colours.metadata(classes, role, self.image.name))

    def _on_renamed(self, event: Any) -> None:
        self.show_classes(self.classes)  # the layers' metadata tell whose they are
        self.extra.follow_name()
        if self.reviewed is not None:
            self.reviewed.metadata[class_colours.KEY]["image"] = self.image.name

    def _on_moved(self, event: Any) -> None:
        for layer in (*self.layers, *self.extra.companions, *self.shapes):
            put_in_place(self, layer)

    def let_go_of_image(self) -> None:
        """Follow the image no more."""
        self.image.events.name.disconnect(self._on_renamed)
        for name in PLACEMENT:
            getattr(self.image.events, name).disconnect(self._on_moved)

    def painted(self) -> np.ndarray:
        """Annotations as a view (P, H, W); all 0 if there is no layer in the viewer."""
        if self.annotations is None or not self.annotating:
            return np.zeros(self.planes_shape, np.int32)
        if not self.fits(self.annotations):
            raise InputError(
                f"'{self.annotations.name}' no longer has the size of '{self.image.name}'; "
                "choose other annotations."
            )
        return self.annotations.data.reshape(self.planes_shape)

    def predicted_view(self) -> np.ndarray:
        """Prediction (P, H, W) as a view, with the corrections made on it."""
        if not self.predicted:
            raise InputError(
                f"There is no prediction of '{self.image.name}' yet; press Adapt or Predict first."
            )
        return self.written.view

    def predicted_labels(self) -> np.ndarray:
        """Prediction (P, H, W) with corrections and annotations on top."""
        return protect(self.predicted_view(), self.annotated(np.s_[:]))

    def collect_corrections(self) -> int:
        """Turn edits of the prediction into annotations; returns how many pixels changed.

        They are one item of the annotations' undo history, whereas those of the prediction are
        forgotten: undoing there would look like a correction back to what the model said.
        """
        written = self.written
        if written is None or not written.edited or not self.fits(written.layer):
            return 0
        at, values = written.corrections(self.painted())
        if len(at):
            set_pixels(self.annotate(), at, values)
        written.settle()
        return len(at)

    def let_go(self, layer: Image | Labels | Shapes) -> None:
        """Take note that the user removed `layer`; corrections are kept as annotations."""
        if layer is self.reviewed:
            self.reviewed = None
        elif layer is not self.annotations:
            self.collect_corrections()
        if self.written is not None and layer is self.written.layer:
            self.written.let_go()
            self.written = None

    def annotated(self, part: slice) -> np.ndarray:
        """Return annotations of some planes, the background of reviewed regions included."""
        outlines = [(plane - (part.start or 0), v) for plane, v in self.outlines()]
        return fill_outlines(self.painted()[part], outlines, find_background(self.classes))

    def new_labels(self, role: str) -> Labels:
        """Return an empty layer in the place and the colours of the image; it is in no viewer."""
        layer = labels_like(self, role, self.classes)
        self._follow(layer)
        return layer

    def _follow(self, layer: Labels) -> None:
        bind_keys(layer, self.classes)
        layer.events.selected_label.connect(self._on_label)

    def _on_label(self, event: Any) -> None:
        self.on_label(event.source.selected_label)
