"""The images of a session and which one is current, with their layers and classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Shapes
from qtpy.QtCore import QObject, Signal

from napari_convlora.config import ClassInfo
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.labels import importing
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project import Viewpoint
from napari_convlora.widget.layers.adoption import (
    adopt,
    adopt_copy,
    classes_of,
    contradicts,
    find_layers,
    part_with_annotations,
    plan_adoption,
)
from napari_convlora.widget.layers.brush import Brush
from napari_convlora.widget.layers.camera import show_view
from napari_convlora.widget.layers.edits import accept, relabel
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.label_counts import Counter, LabelCounts
from napari_convlora.widget.layers.region_check import RegionCheck
from napari_convlora.widget.layers.showing import show
from napari_convlora.widget.layers.visibility import Visibility

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.project import ImageEntry


class OpenImages(QObject):
    """Every image that was worked on, each with its own annotations and prediction.

    Signals
    -------
    changed
        Another image is current, or its layers have changed.
    counted
        What is annotated in the current image: `Counts`.
    found
        Classes that a layer brings along.
    class_chosen
        The id of the class that the user chose on a layer.
    leaving
        The `ImageLayers` that are about to be left, or to change under a run, and then why.
    relabelled
        A class whose pixels were given to another in every image, and that other (0: erased).
    failed
        What went wrong, in one sentence.
    """

    changed = Signal()
    relabelled = Signal(int, int)
    counted = Signal(object)
    found = Signal(object)
    class_chosen = Signal(int)
    leaving = Signal(object, str)
    failed = Signal(str)

    def __init__(self, viewer: Viewer, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.viewer = viewer
        self.classes: tuple[ClassInfo, ...] = ()
        self.current: ImageLayers | None = None
        self.counts = LabelCounts()
        self.class_id = 1
        """What the brush paints."""
        self.merged: dict[int, int] = {}
        """For classes that were merged, the one that has taken their pixels."""
        self.elsewhere: Callable[[], Sequence[ImageEntry]] = tuple
        """Returns the images but the current one that a round may learn from."""
        self.relied: Callable[[], Sequence[ClassInfo]] = tuple
        """Returns the classes that somebody relies on."""
        self._records: dict[tuple[Image, int | None], ImageLayers] = {}
        self._counting: ImageLayers | None = None
        self._visibility = Visibility(viewer)
        self._counter = Counter(self._annotated, self)
        self._counter.counted.connect(self._on_counted)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        self._regions = RegionCheck(lambda: self.records, self.failed.emit)
        self._brush = Brush(viewer, lambda: self.records)

    def close(self) -> None:
        """Let go of the viewer; corrections that were not learnt yet become annotations."""
        self._counter.stop()
        self._visibility.close()
        self.viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self._brush.close()
        for record in self._records.values():
            with contextlib.suppress(ConvLoRAError):
                record.collect_corrections()
            record.let_go_of_image()

    @property
    def records(self) -> list[ImageLayers]:
        """All images that were worked on and are still in the viewer."""
        return list(self._records.values())

    def restore(
        self,
        painted: np.ndarray | None,
        predicted: np.ndarray | None,
        regions: Outlines = (),
        view: Viewpoint | None = None,
    ) -> None:
        """Give the current image the annotations, prediction (P, H, W) and regions it once had.

        It is then looked at as it was, if that is known.
        """
        record = self.need()
        if painted is not None and record.annotations is None:
            layer = record.annotate()
            layer.data.reshape(record.planes_shape)[:] = painted
            layer.refresh()
        elif record.annotations is not None:
            record.annotate()
        if regions and record.reviewed is None:
            areas = [record.axes.place(*region) for region in regions]
            record.review().add_polygons(areas)
        self._listen(record)
        if predicted is not None and not record.predicted:
            show(record, predicted)
        if view is not None:
            show_view(record, view)
        self.select_class(self.class_id)
        self._touch()

    def need(self) -> ImageLayers:
        """Return the current image.

        Raises
        ------
        InputError
            There is none.
        """
        if self.current is None:
            raise InputError("No image is chosen; open one, for example from File > Open Sample.")
        return self.current

    def choose(self, image: Image | None, channel_axis: int | None = None) -> None:
        """Work on `image` from now on; others that lie over it are hidden."""
        record = None
        if image is not None:
            key = (image, None if image.rgb else channel_axis)
            if key not in self._records:
                self._records[key] = ImageLayers(self.viewer, image, self.classes, key[1])
                self._records[key].on_label = self._on_label
                self._records[key].merged = self.merged
            record = self._records[key]
        if record is self.current:
            return
        self.leaving.emit(self.current, "")
        self.current = record
        self.look_for_layers()
        if record is not None:
            self._visibility.turn_to(record.image, self.records)
        self.select_class(self.class_id)
        self._touch()

    def look_for_layers(self) -> None:
        """Take up layers of the current image that the sample data or a reader brought."""
        record = self.current
        others = [o for o in self._records.values() if o is not record]
        taken = {id(x) for o in others for x in o.layers}
        relied = cache(self.relied)  # by what there was before any is taken up
        if record is not None and find_layers(record, taken, lambda x: contradicts(x, relied())):
            for layer in (record.annotations, record.prediction):
                if layer is not None:
                    self.found.emit(classes_of(layer))
            record.show_classes(self.classes)
            self._listen(record)
            self._counter.touch()

    def show_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Show `classes` in every layer of ours."""
        self.classes = tuple(classes)
        for record in self._records.values():
            record.show_classes(self.classes)

    def select_class(self, class_id: int) -> None:
        """Paint with this class from now on."""
        self.class_id = class_id
        if self.current is not None:
            for layer in (self.current.annotations, self.current.prediction):
                if layer is not None:
                    layer.selected_label = class_id

    def start_annotating(self, class_id: int = 1) -> Labels:
        """Create the annotations layer, or bring it back, and take up the brush."""
        record = self.need()
        layer = record.annotate()
        self._listen(record)
        self.select_class(class_id)
        layer.mode = "paint"
        self.viewer.layers.selection.active = layer
        self._touch()
        return layer

    def start_reviewing(self) -> Shapes:
        """Return the layer of reviewed regions, created if there is none."""
        record = self.need()
        layer = record.review()
        self._listen(record)
        self._touch()
        return layer

    def use_annotations(
        self,
        layer: Labels | None,
        meaning: importing.Meaning | None = None,
        kept: Sequence[ClassInfo] = (),
    ) -> importing.ImportPlan | None:
        """Take the user's own Labels layer for annotations of the current image; None: a new one.

        Where `meaning` changes a pixel its layer stays as it is, hidden, and a copy is taken.

        Parameters
        ----------
        layer
            The layer.
        meaning
            What its values stand for; None: they are class ids, and 0 is unlabelled.
        kept
            Classes that no value may join unless it has the same name.

        Returns
        -------
        Plan or None
            What became of the values, if a meaning was given; the class table is to take up its
            classes.

        Raises
        ------
        InputError
            It has another size, or cannot be painted on, or its meaning cannot be used.
        """
        record = self.need()
        if layer is record.annotations:
            return None
        if layer is None:
            self.leaving.emit(record, "new annotations were begun")
            part_with_annotations(record)
            self.start_annotating(self.class_id)
            return None
        record.check_fits(layer)
        plan = plan_adoption(layer, meaning, kept)
        self.leaving.emit(record, "other annotations were chosen")
        if plan is None:
            self.found.emit(classes_of(layer))
        if plan is not None and plan.changes:
            adopt_copy(record, layer, plan)
        else:
            adopt(record, layer)
        self._listen(record)
        self.select_class(self.class_id)
        self._touch()
        return plan

    def erase_class(self, class_id: int) -> int:
        """Erase a class from every image; Ctrl-Z on the annotations brings its strokes back."""
        return self._relabel(class_id, 0)

    def merge_class(self, class_id: int, into: int) -> int:
        """Give a class's pixels to another in every image; Ctrl-Z brings its strokes back."""
        self.merged[class_id] = into
        self.merged.pop(into, None)  # it is in use again, so that no chain runs in a circle
        return self._relabel(class_id, into)

    def _relabel(self, class_id: int, to: int) -> int:
        count = sum(relabel(record, class_id, to) for record in self.records)
        self._counter.touch()
        self.relabelled.emit(class_id, to)
        return count

    def accept(self, mask: np.ndarray, first: int) -> int:
        """Annotate predicted pixels of the current image; see `edits.accept`."""
        record = self.need()
        record.collect_corrections()  # an undo item of their own, and not the one that comes last
        count = accept(record, mask, first)
        self._listen(record)
        self._touch()
        return count

    def _on_label(self, class_id: int) -> None:
        self.select_class(class_id)
        self.class_chosen.emit(class_id)

    def _touch(self) -> None:
        self._counter.touch()
        self.changed.emit()

    def _listen(self, record: ImageLayers) -> None:
        layer = record.annotations
        if layer is not None:  # connecting twice is connecting once
            for event in (layer.events.paint, layer.events.set_data, layer.events.data):
                event.connect(self._counter.touch)
        if record.reviewed is not None:
            record.reviewed.events.data.connect(self._counter.touch)
            self._regions.follow(record.reviewed)

    def _annotated(self) -> tuple[np.ndarray, Outlines] | None:
        record = self._counting = self.current
        return None if record is None else (record.painted(), record.outlines())

    def _on_counted(self, counts: LabelCounts) -> None:
        if self._counting is not self.current:  # it was left meanwhile; the other is counted next
            return
        self.counts = counts
        self.counted.emit(counts)
        self.changed.emit()

    def _on_layer_removed(self, event: Any) -> None:
        layer = event.value
        for key, record in list(self._records.items()):
            if layer not in (record.image, record.annotations, record.prediction, record.reviewed):
                continue
            if layer is not record.reviewed:
                self.leaving.emit(record, f"'{layer.name}' was removed")
            try:
                record.let_go(layer)
            except ConvLoRAError as error:
                self.failed.emit(str(error))
            if layer is record.image:
                record.let_go_of_image()
                del self._records[key]
                if record is self.current:
                    self.current = None
        self._touch()
