"""The only file that reads or writes the user's layers.

Everything here runs in the main thread; what travels to the worker is a `Snapshot` of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Shapes

from napari_convlora.annotations import (
    fill_outlines,
    find_background,
    merge_corrections,
    protect,
)
from napari_convlora.blocks import Block
from napari_convlora.config import UNLABELLED, ClassInfo, InputError
from napari_convlora.widget import class_colours
from napari_convlora.widget.class_keys import bind_keys
from napari_convlora.widget.derived import DerivedLayers
from napari_convlora.widget.jobs import Snapshot
from napari_convlora.widget.new_layer import labels_like, regions_like
from napari_convlora.widget.plane_axes import PlaneAxes
from napari_convlora.widget.strokes import StrokeWatch

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.prompts import Window


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
        self.viewer, self.image, self.classes = viewer, image, tuple(classes)
        self.channel_axis = None if image.rgb else channel_axis
        self.annotations: Labels | None = None
        self.prediction: Labels | None = None
        self.derived = DerivedLayers(self)
        self.adapter: object = None
        self.reviewed: Shapes | None = None
        self._written = np.empty(0, np.uint8)
        self._edited = False
        self._late: list[tuple[Block, np.ndarray]] = []
        self._stroke: StrokeWatch | None = None
        self.on_label: Callable[[int], None] = lambda class_id: None
        self.merged: Mapping[int, int] = {}

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
        return self.locate(self.viewer.dims.point)[0]

    def locate(self, world: Sequence[float]) -> tuple[int, float, float]:
        """Return plane, row and column of a point in world coordinates."""
        at = self.image.world_to_data(world)
        rows, columns = self.axes.planar[-2:]
        return self.axes.index(at), float(at[rows]), float(at[columns])

    @property
    def axes(self) -> PlaneAxes:
        """How rows and columns of planes lie in a layer of this image."""
        return PlaneAxes(self.shape, self.channel_axis)

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

    def review(self) -> Shapes:
        """Return the layer of reviewed regions, created if there is none."""
        if self.reviewed is None:
            where = self.image, len(self.shape), self.channel_axis
            self.reviewed = regions_like(*where, self._free_name("reviewed"))
            self.viewer.add_layer(self.reviewed)
        return self.reviewed

    def outlines(self) -> list[tuple[int, np.ndarray]]:
        """Return plane and vertices (N, 2) in pixels of every reviewed region."""
        return [] if self.reviewed is None else self.axes.outlines(self.reviewed)

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
        before = self.annotations, self.prediction, self.reviewed
        for layer in self.viewer.layers:
            known = layer.metadata.get(class_colours.KEY, {})
            if known.get("image") != self.image.name:
                continue
            if isinstance(layer, Shapes) and known.get("role") == "reviewed":
                self.reviewed = self.reviewed or layer
            if not isinstance(layer, Labels) or not self.fits(layer):
                continue
            if known.get("role") == "annotations" and self.annotations is None:
                self.annotations = layer
            elif known.get("role") == "prediction" and self.prediction is None:
                self._watch(layer)
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
        return self._view()

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
            self.seen(),
            tuple(self.outlines()),
            find_background(self.classes),
        )

    def seen(self) -> Block:
        """Return the part of the image that the viewer shows."""
        ours = (self.prediction, self.annotations)
        layer = next((one for one in ours if one in self.viewer.layers), self.image)
        corners = layer.corner_pixels
        if layer.multiscale:  # what napari has loaded, which may be more than it shows
            corners = corners * layer.downsample_factors[layer.data_level]
        corners = corners[:, self.axes.planar[-2:]].round().astype(int)
        (top, left), (bottom, right) = corners.tolist()
        return Block(self.plane(), top, left, bottom - top + 1, right - left + 1)

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
        if self._edited and self.prediction is not None and self.fits(self.prediction):
            base = np.zeros(self.planes_shape, np.int32) if base is None else base
            return np.where(self._corrected(np.s_[:]), self._view(), base)
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
            at = np.flatnonzero(merged != painted[p])
            found.append((at + p * merged.size, merged.ravel()[at]))
        count = 0
        if found:
            at, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
            self._set(self.annotate(), at, values)
            count = len(values)
        np.copyto(self._written, now, casting="unsafe")
        self._forget_undo()
        return count

    def labelled(self, part: Any = np.s_[:]) -> np.ndarray:
        """Whether pixels (an index into (P, H, W)) are painted, on either layer."""
        painted = self.painted()[part] != UNLABELLED
        if self.predicted:
            painted |= self._corrected(part)
        return painted

    def _corrected(self, part: Any) -> np.ndarray:
        """Whether pixels (an index into (P, H, W)) were painted on the prediction."""
        now = self._view()[part]
        return (now != self._written[part]) & (now != UNLABELLED)

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

        One item of the prediction's undo history. What the user painted, on either layer, stays.
        A cleared pixel is no annotation: it says nothing.
        """
        part = np.s_[first : first + len(mask)]
        predicted = self.predicted_view()[part]
        at = np.flatnonzero(mask & (predicted != UNLABELLED) & ~self.labelled(part))
        if len(at):
            assert self.prediction is not None
            self._set(self.prediction, at + first * predicted[0].size, np.zeros_like(at))
        return len(at)

    def let_go(self, layer: Image | Labels | Shapes) -> None:
        """Take note that the user removed `layer`; corrections are kept as annotations."""
        if layer is self.reviewed:
            self.reviewed = None
        elif layer is not self.annotations:
            self.collect_corrections()
        if layer is self.prediction:
            layer.events.paint.disconnect(self._on_edit)
            if self._stroke is not None:
                self._stroke.end()
            self.prediction = None

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
            view = self._view()
            self._put(np.s_[:], np.where(view == class_id, to, view))
        return len(at)

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
        labels = class_colours.known_only(labels, self.classes, self.merged)
        self._put(part, protect(labels.reshape(self._written[part].shape), self._annotated(part)))
        return True

    def show_parts(self, parts: Sequence[tuple[Block, np.ndarray]]) -> None:
        """Write class ids (h, w) of parts of the image into the prediction layer, as `show`."""
        self._late.extend(parts)
        if self._stroke is not None and self._stroke.active:
            self._stroke.afterwards(lambda: self.show_parts(()))
            return
        self.prepare_prediction()
        self.collect_corrections()
        painted, late, self._late = self._annotated(np.s_[:]), self._late, []
        for block, labels in late:
            at = block.plane, block.rows, block.columns
            self._view()[at] = self._written[at] = protect(labels, painted[at])
        self._forget_undo()
        assert self.prediction is not None
        self.prediction.refresh()

    def _annotated(self, part: slice) -> np.ndarray:
        """Return annotations of some planes, the background of reviewed regions included."""
        outlines = [(plane - (part.start or 0), v) for plane, v in self.outlines()]
        return fill_outlines(self.painted()[part], outlines, find_background(self.classes))

    def _new(self, role: str) -> Labels:
        where = self.image, self.shape, self.channel_axis
        layer = labels_like(*where, role, self._free_name(role), self.classes)
        self._follow(layer)
        return layer

    def _follow(self, layer: Labels) -> None:
        bind_keys(layer, self.classes)
        layer.events.selected_label.connect(self._on_label)

    def _on_label(self, event: Any) -> None:
        self.on_label(event.source.selected_label)

    def _free_name(self, role: str) -> str:
        return f"{role} of {self.image.name}" if role in self.viewer.layers else role

    def _view(self) -> np.ndarray:
        assert self.prediction is not None
        return self.prediction.data.reshape(self.planes_shape)

    def _watch(self, layer: Labels) -> None:
        self.prediction = layer
        self._written = np.zeros(self.planes_shape, np.uint8)
        if self._view().any():  # memory of zeros is not taken before it is written to
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

    def _set(self, layer: Labels, flat: np.ndarray, values: np.ndarray) -> None:
        """Set pixels, by their index into the flattened image, as one item of the undo history."""
        where = np.unravel_index(flat, layer.data.shape)
        layer.data_setitem(where, values.astype(layer.data.dtype))
