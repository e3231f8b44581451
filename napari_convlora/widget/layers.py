"""The only file that reads or writes napari layers.

Everything here runs in the main thread; what travels to the worker is a `Snapshot` of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels

from napari_convlora.annotations import merge_corrections, protect
from napari_convlora.config import ClassInfo, InputError
from napari_convlora.widget import class_colours
from napari_convlora.widget.jobs import Snapshot
from napari_convlora.widget.new_layer import labels_like
from napari_convlora.widget.strokes import StrokeWatch

if TYPE_CHECKING:
    from napari.viewer import Viewer


class ImageLayers:
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
    annotations, prediction
        Labels layers, or None. Annotations that were removed from the viewer are remembered, so
        that `annotate` can bring them back.
    """

    def __init__(
        self,
        viewer: Viewer,
        image: Image,
        classes: Sequence[ClassInfo],
        channel_axis: int | None = None,
    ) -> None:
        self.viewer, self.image, self.classes = viewer, image, tuple(classes)
        self.channel_axis = None if image.rgb else channel_axis
        self.annotations: Labels | None = None
        self.prediction: Labels | None = None
        self._written = np.empty(0, np.uint8)
        self._edited = False
        self._stroke: StrokeWatch | None = None

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
        shape = [n for axis, n in enumerate(self.shape) if axis != self.channel_axis]
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
    def annotating(self) -> bool:
        """Whether the annotations layer is in the viewer."""
        return self.annotations is not None and self.annotations in self.viewer.layers

    @property
    def predicted(self) -> bool:
        """Whether the prediction layer is in the viewer."""
        layer = self.prediction
        return layer is not None and layer in self.viewer.layers and self.fits(layer)

    def plane(self) -> int:
        """Index of the plane that the viewer shows."""
        at = np.round(self.image.world_to_data(self.viewer.dims.point))
        leading = [a for a in range(len(self.shape)) if a != self.channel_axis][:-2]
        index = 0
        for axis in leading:
            n = self.shape[axis]
            index = index * n + int(np.clip(at[axis], 0, n - 1))
        return index

    def fits(self, layer: Labels) -> bool:
        """Whether `layer` can hold annotations of this image: its size, in memory, integers."""
        data = layer.data
        if layer.multiscale or not isinstance(data, np.ndarray) or not data.flags.c_contiguous:
            return False
        return [n for n in data.shape if n > 1] == [n for n in self.shape if n > 1]

    def annotate(self) -> Labels:
        """Return the annotations layer, created or brought back if it is not in the viewer."""
        if self.annotations is None:
            self.annotations = self._new("annotations")
        if self.annotations not in self.viewer.layers:
            self.viewer.add_layer(self.annotations)
        return self.annotations

    def adopt(self, layer: Labels) -> None:
        """Use the user's own `layer` as annotations; its pixels stay as they are."""
        self.check_fits(layer)
        self.annotations = layer
        self.show_classes(self.classes)

    def check_fits(self, layer: Labels) -> None:
        """Raise an `InputError` unless `layer` can hold annotations of this image."""
        if not self.fits(layer):
            raise InputError(
                f"'{layer.name}' cannot hold annotations of '{self.image.name}'; choose an "
                "editable Labels layer of the image's own size."
            )

    def find_layers(self) -> bool:
        """Take up layers that an earlier session or the sample data made; True if there were."""
        before = self.annotations, self.prediction
        for layer in self.viewer.layers:
            known = layer.metadata.get(class_colours.KEY, {}) if isinstance(layer, Labels) else {}
            if known.get("image") != self.image.name or not self.fits(layer):
                continue
            if known.get("role") == "annotations" and self.annotations is None:
                self.annotations = layer
            elif known.get("role") == "prediction" and self.prediction is None:
                self._watch(layer)
        return before != (self.annotations, self.prediction)

    def show_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Give both layers the colours and names of `classes`."""
        self.classes = tuple(classes)
        for role in ("annotations", "prediction"):
            layer = getattr(self, role)
            if layer is not None:
                layer.colormap = class_colours.colormap(classes)
                layer.features = class_colours.features(classes)
                layer.metadata.update(class_colours.metadata(classes, role, self.image.name))

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

    def predicted_labels(self) -> np.ndarray:
        """Prediction (P, H, W) with corrections and annotations on top."""
        if not self.predicted:
            raise InputError(
                f"There is no prediction of '{self.image.name}' yet; press Adapt or Predict first."
            )
        return protect(self._view(), self.painted())

    def snapshot(self) -> Snapshot:
        """Return a copy that includes the corrections made on the prediction."""
        self.collect_corrections()
        return self.snapshot_of(self.painted().copy())

    def snapshot_of(self, painted: np.ndarray) -> Snapshot:
        """Return the image with other annotations (P, H, W)."""
        return Snapshot(self.image.name, self.pixels, self.image.rgb, self.channel_axis, painted)

    def work(self) -> np.ndarray | None:
        """Copy (P, H, W) of everything painted; None where there is no layer to paint on.

        Unlike `painted`, it holds annotations that were removed from the viewer, and corrections
        that are not annotations yet. No layer changes.
        """
        base = None
        if self.annotations is not None and self.fits(self.annotations):
            base = self.annotations.data.reshape(self.planes_shape)
        if self._edited and self.prediction is not None and self.fits(self.prediction):
            base = np.zeros(self.planes_shape, np.int32) if base is None else base
            now = self._view()
            return np.where((now != self._written) & (now != 0), now, base)
        return None if base is None else base.copy()

    def fill(self, painted: np.ndarray) -> None:
        """Put annotations (P, H, W) of an earlier session into a layer that is still empty."""
        layer = self.annotate()
        layer.data.reshape(self.planes_shape)[:] = painted
        layer.refresh()

    def collect_corrections(self) -> int:
        """Turn edits of the prediction into annotations; returns how many pixels changed.

        They are one item of the annotations' undo history, whereas those of the prediction are
        forgotten: undoing there would look like a correction back to what the model said.
        """
        if not self._edited or self.prediction is None or not self.fits(self.prediction):
            return 0
        painted, now, before = self.painted(), self._view(), self._written
        found = []
        for p in np.flatnonzero([(n != b).any() for n, b in zip(now, before, strict=True)]):
            part = np.s_[p : p + 1]
            merged = merge_corrections(painted[part], before[part], now[part])[0]
            rows, columns = np.nonzero(merged != painted[p])
            found.append((np.full(len(rows), p), rows, columns, merged[rows, columns]))
        count = 0
        if found:
            self.annotate()
            *at, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
            self._set_annotations(tuple(at), values)
            count = len(values)
        np.copyto(self._written, now, casting="unsafe")
        self._forget_undo()
        return count

    def let_go(self, layer: Image | Labels) -> None:
        """Take note that the user removed `layer`; corrections are kept as annotations."""
        if layer is not self.annotations:
            self.collect_corrections()
        if layer is self.prediction:
            layer.events.paint.disconnect(self._on_edit)
            if self._stroke is not None:
                self._stroke.end()
            self.prediction = None

    def erase(self, class_id: int) -> int:
        """Erase a class from annotations (undoable) and prediction; returns annotated pixels."""
        self.collect_corrections()
        at = np.nonzero(self.painted() == class_id)
        if len(at[0]):
            self._set_annotations(at, np.zeros(len(at[0]), np.int64))
        if self.predicted:
            view = self._view()
            self._put(np.s_[:], np.where(view == class_id, 0, view))
        return len(at[0])

    def prepare_prediction(self) -> None:
        """Have the prediction layer in the viewer, empty where it is new.

        napari takes up to a third of a second to add a layer: better spent when a button is
        pressed than in the middle of a round.
        """
        if self.prediction is None or not self.fits(self.prediction):
            self._watch(self._new("prediction"))
        if not self.predicted:
            layers = self.viewer.layers
            below = layers.index(self.annotations) if self.annotating else len(layers)
            active = layers.selection.active
            layers.insert(below, self.prediction)
            layers.selection.active = active  # the user may be painting on another layer

    def show(self, labels: np.ndarray, plane: int | None = None) -> bool:
        """Write class ids (P, H, W), or (H, W) of one plane, into the prediction layer.

        Annotations stay on top, and edits of the prediction become annotations first. While the
        user is in the middle of a stroke on the prediction a preview is left out (returns False)
        and a whole prediction waits for the end of the stroke.
        """
        if self._stroke is not None and self._stroke.active:
            if plane is None:
                self._stroke.afterwards(lambda: self.show(labels))
            return False
        self.prepare_prediction()
        self.collect_corrections()
        part = np.s_[:] if plane is None else np.s_[plane : plane + 1]
        self._put(part, protect(labels.reshape(self._written[part].shape), self.painted()[part]))
        return True

    def _new(self, role: str) -> Labels:
        taken = any(layer.name == role for layer in self.viewer.layers)
        name = f"{role} of {self.image.name}" if taken else role
        shape, classes = self.shape, self.classes
        return labels_like(self.image, shape, self.channel_axis, role, name, classes)

    def _view(self) -> np.ndarray:
        assert self.prediction is not None
        return self.prediction.data.reshape(self.planes_shape)

    def _watch(self, layer: Labels) -> None:
        self.prediction = layer
        self._written = np.zeros(self.planes_shape, np.uint8)
        np.copyto(self._written, self._view(), casting="unsafe")
        self._stroke = StrokeWatch(layer)
        layer.events.paint.connect(self._on_edit)

    def _on_edit(self, event: Any) -> None:
        # Undo and redo do not say "paint", but neither can come before the first edit.
        self._edited = True

    def _put(self, part: Any, labels: np.ndarray) -> None:
        assert self.prediction is not None
        self._view()[part] = labels
        self._written[part] = labels
        self._forget_undo()
        self.prediction.refresh()

    def _forget_undo(self) -> None:
        layer = self.prediction
        if layer is not None and layer.editable and self._edited:
            # The one public way to drop the undo history; stale items would write old pixels.
            mode = layer.mode
            layer.editable = False
            layer.editable = True
            layer.mode = mode
        self._edited = False

    def _set_annotations(self, at: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        assert self.annotations is not None
        flat = np.ravel_multi_index(at, self.planes_shape)
        where = np.unravel_index(flat, self.annotations.data.shape)
        self.annotations.data_setitem(where, values.astype(self.annotations.data.dtype))
