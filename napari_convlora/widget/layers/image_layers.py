"""The only file that reads or writes the user's layers.

Everything here runs in the main thread; what travels to the worker is a `Snapshot` of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Layer, Shapes

from napari_convlora.config import UNLABELLED, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.images.regions import Block
from napari_convlora.labels import importing
from napari_convlora.labels.annotations import known_only, protect
from napari_convlora.labels.classes import find_background
from napari_convlora.labels.reviewed import Outlines, fill_outlines
from napari_convlora.session.snapshot import Snapshot
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
from napari_convlora.widget.layers.prediction_layer import PredictionLayer

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.prediction.prompts import Window


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
    derived
        Layers that are made from the prediction.
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
        self.derived = ExtraLayers(self)
        self.adapter: object = None
        self.reviewed: Shapes | None = None
        self._written: PredictionLayer | None = None
        self._late: list[tuple[Block, np.ndarray]] = []
        self.on_label: Callable[[int], None] = lambda class_id: None
        self.merged: Mapping[int, int] = {}
        image.events.name.connect(self._on_renamed)
        for name in PLACEMENT:
            getattr(image.events, name).connect(self._on_moved)

    @property
    def prediction(self) -> Labels | None:
        """The layer that the model writes."""
        return None if self._written is None else self._written.layer

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
        written, layer = self._written, self.prediction
        here = layer is not None and layer in self.viewer.layers and self.fits(layer)
        return here and written is not None and written.begun

    @property
    def left(self) -> np.ndarray | None:
        """What is left (P, H, W) of a prediction that was edited; None if it was not."""
        written = self._written
        return written.left if self.predicted and written and written.edited else None

    @property
    def corrected(self) -> bool:
        """Whether something painted on the prediction is no annotation yet."""
        written = self._written
        return written is not None and written.edited and bool(written.corrected().any())

    def annotate(self) -> Labels:
        """Return the annotations layer, created or brought back if it is not in the viewer."""
        if self.annotations is None:
            self.annotations = self._new("annotations")
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

    def adopt(self, layer: Labels) -> None:
        """Use the user's own `layer` as annotations; its pixels stay as they are."""
        self.check_fits(layer)
        self._disown()
        self.annotations = layer
        self.show_classes(self.classes)

    def adopt_copy(self, layer: Labels, plan: importing.ImportPlan) -> None:
        """Use a copy of the user's own `layer` as annotations, its values replaced by class ids."""
        self.check_fits(layer)
        copy = self._new("annotations")
        importing.apply_import(plan, layer.data, copy.data)
        self.viewer.add_layer(copy)
        layer.visible = False
        self.adopt(copy)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that belong to the image."""
        found = self.annotations, self.prediction, self.reviewed
        return tuple(layer for layer in found if layer is not None)

    def part_with_annotations(self) -> None:
        """Leave the annotations layer to the user; the next one will be new."""
        self.collect_corrections()
        self._disown()
        self.annotations = None

    def _disown(self) -> None:
        """Have a later panel not find the annotations; their classes stay known."""
        if self.annotations is not None:
            self.annotations.metadata.get(class_colours.KEY, {}).pop("image", None)

    def find_layers(
        self, taken: Collection[int] = (), strange: Callable[[Labels], bool] = lambda layer: False
    ) -> bool:
        """Take up layers that an earlier session or the sample data made; True if there were.

        Those whose `id` is `taken` are another image's, and those that are `strange` are left to
        the user to choose.
        """
        before = self.annotations, self.prediction, self.reviewed
        for layer in self.viewer.layers:
            known = layer.metadata.get(class_colours.KEY, {})
            if known.get("image") != self.image.name or id(layer) in taken:
                continue
            if isinstance(layer, Shapes) and known.get("role") == "reviewed":
                self.reviewed = self.reviewed or layer
            if not isinstance(layer, Labels) or not self.fits(layer):
                continue
            if known.get("role") == "annotations" and self.annotations is None:
                self.annotations = None if strange(layer) else layer
            elif (
                known.get("role") == "prediction" and self.prediction is None and not strange(layer)
            ):
                self._written = PredictionLayer(layer, self.planes_shape)
        return before != (self.annotations, self.prediction, self.reviewed)

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
        self.derived.follow_name()
        if self.reviewed is not None:
            self.reviewed.metadata[class_colours.KEY]["image"] = self.image.name

    def _on_moved(self, event: Any) -> None:
        for layer in (*self.layers, *self.derived.companions, *self.shapes):
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
        return self._model.view

    def predicted_labels(self) -> np.ndarray:
        """Prediction (P, H, W) with corrections and annotations on top."""
        return protect(self.predicted_view(), self._annotated(np.s_[:]))

    def snapshot(self) -> Snapshot:
        """Return a copy that includes the corrections made on the prediction."""
        self.collect_corrections()
        return self.snapshot_of(self.painted().copy())

    def snapshot_of(self, painted: np.ndarray) -> Snapshot:
        """Return the image with other annotations (P, H, W)."""
        return Snapshot(
            self.image.name,
            self.pixels,
            self.image.rgb,
            self.channel_axis,
            painted,
            self.seen(self.prediction, self.annotations),
            self.outlines(),
            find_background(self.classes),
        )

    def paint(self, plane: int, window: Window, mask: np.ndarray, class_id: int, over: bool) -> Any:
        """Paint a mask into the annotations as one item of their undo history.

        Parameters
        ----------
        plane, window, mask, class_id
            Where, which pixels (H, W) of the window, and what.
        over
            Whether pixels of other classes are painted over.

        Returns
        -------
        tuple of (N,) int
            Plane, row and column of the pixels that changed.
        """
        if not self.annotating:
            raise InputError(f"'{self.image.name}' has no annotations layer; start annotating.")
        before = self.painted()[plane][window.region]
        rows, columns = np.nonzero(mask & (before != class_id) & (over | (before == 0)))
        at = (np.full(len(rows), plane), rows + window.top, columns + window.left)
        if len(rows):
            flat = np.ravel_multi_index(at, self.painted().shape)
            self._set(self.annotate(), flat, np.full(len(rows), class_id))
        return at

    def work(self) -> np.ndarray | None:
        """Copy (P, H, W) of everything painted; None where there is no layer to paint on.

        Unlike `painted`, it holds annotations that were removed from the viewer, and corrections
        that are not annotations yet. No layer changes.
        """
        base = None
        if self.annotations is not None and self.fits(self.annotations):
            base = self.annotations.data.reshape(self.planes_shape)
        written = self._written
        if written is not None and written.edited and self.fits(written.layer):
            base = np.zeros(self.planes_shape, np.int32) if base is None else base
            return np.where(written.corrected(), written.view, base)
        return None if base is None else base.copy()

    def collect_corrections(self) -> int:
        """Turn edits of the prediction into annotations; returns how many pixels changed.

        They are one item of the annotations' undo history, whereas those of the prediction are
        forgotten: undoing there would look like a correction back to what the model said.
        """
        written = self._written
        if written is None or not written.edited or not self.fits(written.layer):
            return 0
        at, values = written.corrections(self.painted())
        if len(at):
            self._set(self.annotate(), at, values)
        written.settle()
        return len(at)

    def labelled(self, part: Any = np.s_[:]) -> np.ndarray:
        """Whether pixels (an index into (P, H, W)) are painted, on either layer."""
        painted = self.painted()[part] != UNLABELLED
        if self.predicted:
            painted |= self._model.corrected(part)
        return painted

    def accept(self, mask: np.ndarray, first: int = 0) -> int:
        """Annotate predicted pixels with their predicted class; returns how many.

        One item of the annotations' undo history; annotated pixels stay as they are.

        Parameters
        ----------
        mask : (p, H, W) bool
            Pixels of the planes from `first` on.
        first
            Plane at which `mask` begins.
        """
        part = np.s_[first : first + len(mask)]
        predicted = self.predicted_view()[part]
        free = self.painted()[part] == UNLABELLED
        at = np.flatnonzero(mask & free & (predicted != UNLABELLED))
        if len(at):
            values = predicted.ravel()[at]
            self._set(self.annotate(), at + first * predicted[0].size, values)
        return len(at)

    def reject(self, mask: np.ndarray, first: int = 0) -> int:
        """Clear predicted pixels until the next prediction; returns how many.

        One item of its undo history. What is painted or reviewed stays; cleared pixels say nothing.
        """
        part = np.s_[first : first + len(mask)]
        predicted = self.predicted_view()[part]
        own = self._model.corrected(part) | (self._annotated(part) != UNLABELLED)
        at = np.flatnonzero(mask & (predicted != UNLABELLED) & ~own)
        if len(at):
            self._set(self._model.layer, at + first * predicted[0].size, np.zeros_like(at))
        return len(at)

    def let_go(self, layer: Image | Labels | Shapes) -> None:
        """Take note that the user removed `layer`; corrections are kept as annotations."""
        if layer is self.reviewed:
            self.reviewed = None
        elif layer is not self.annotations:
            self.collect_corrections()
        if self._written is not None and layer is self._written.layer:
            self._written.let_go()
            self._written = None

    def relabel(self, class_id: int, to: int = 0) -> int:
        """Give a class's pixels to another, or erase them; returns annotated pixels.

        One item of the annotations' undo history; the prediction follows as if the model had
        written it, as undoing there would look like a correction.
        """
        self.collect_corrections()
        at = np.flatnonzero(self.painted() == class_id)
        if len(at):
            self._set(self.annotate(), at, np.full_like(at, to))
        if self.predicted:
            view = self._model.view
            self._model.write([(np.s_[:], np.where(view == class_id, to, view))])
        return len(at)

    def prepare_prediction(self) -> None:
        """Have the prediction layer in the viewer, empty where it is new.

        napari takes up to a third of a second to add a layer: better spent when a button is
        pressed than in the middle of a round.
        """
        if self.prediction is None or not self.fits(self.prediction):
            self._written = PredictionLayer(self._new("prediction"), self.planes_shape)
        layers = self.viewer.layers
        if self.prediction not in layers:
            below = layers.index(self.annotations) if self.annotating else len(layers)
            active = layers.selection.active
            layers.insert(below, self.prediction)
            layers.selection.active = active  # the user may be painting on another layer

    def withdraw_prediction(self) -> None:
        """Take the prediction layer out of the viewer again if nothing was written or painted."""
        written, layers = self._written, self.viewer.layers
        if written is None or written.begun or written.edited or written.layer not in layers:
            return
        if not written.stroke.active:
            layers.remove(written.layer)
        elif not written.stroke.waiting:  # for what was predicted
            written.stroke.afterwards(self.withdraw_prediction)

    def show(self, labels: np.ndarray, plane: int | None = None) -> bool:
        """Write class ids (P, H, W), or (H, W) of one plane, into the prediction layer.

        Annotations stay on top, and edits of the prediction become annotations first. While the
        user is in the middle of a stroke on the prediction a preview is left out (returns False)
        and a whole prediction waits for the end of the stroke.
        """
        if self._written is not None and self._written.stroke.active:
            if plane is None:
                self._written.stroke.afterwards(lambda: self.show(labels))
            return False
        self.prepare_prediction()
        self.collect_corrections()
        part = np.s_[:] if plane is None else np.s_[plane : plane + 1]
        painted = self._annotated(part)
        shown = protect(self._of_today(labels).reshape(painted.shape), painted)
        self._model.write([(part, shown)])
        return True

    def show_parts(self, parts: Sequence[tuple[Block, np.ndarray]]) -> None:
        """Write class ids (h, w) of parts of the image into the prediction layer, as `show`."""
        self._late.extend(parts)
        if self._written is not None and self._written.stroke.active:
            self._written.stroke.afterwards(lambda: self.show_parts(()))
            return
        self.prepare_prediction()
        self.collect_corrections()
        late, self._late = self._late, []
        painted = {b.plane: self._annotated(np.s_[b.plane : b.plane + 1])[0] for b, _ in late}
        self._model.write(
            (b.index, protect(self._of_today(labels), painted[b.plane][b.index[1:]]))
            for b, labels in late
        )

    def _of_today(self, labels: np.ndarray) -> np.ndarray:
        """Return class ids that a model learnt in those of the class table."""
        return known_only(labels, self.classes, self.merged)

    def _annotated(self, part: slice) -> np.ndarray:
        """Return annotations of some planes, the background of reviewed regions included."""
        outlines = [(plane - (part.start or 0), v) for plane, v in self.outlines()]
        return fill_outlines(self.painted()[part], outlines, find_background(self.classes))

    def _new(self, role: str) -> Labels:
        layer = labels_like(self, role, self.classes)
        self._follow(layer)
        return layer

    def _follow(self, layer: Labels) -> None:
        bind_keys(layer, self.classes)
        layer.events.selected_label.connect(self._on_label)

    def _on_label(self, event: Any) -> None:
        self.on_label(event.source.selected_label)

    @property
    def _model(self) -> PredictionLayer:
        assert self._written is not None
        return self._written

    def _set(self, layer: Labels, flat: np.ndarray, values: np.ndarray) -> None:
        """Set pixels, by their index into the flattened image, as one item of the undo history."""
        where = np.unravel_index(flat, layer.data.shape)
        layer.data_setitem(where, values.astype(layer.data.dtype))
