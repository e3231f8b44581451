"""The images of a session and which one is current, with their layers and classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Layer, Shapes
from qtpy.QtCore import QObject, QTimer, Signal

from napari_convlora.config import MAX_CLASSES, ClassInfo, listed
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.labels import importing
from napari_convlora.labels.classes import find_background
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project import Viewpoint
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.layers.camera import show_view
from napari_convlora.widget.layers.class_colours import colours_of, known_classes
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.label_counts import Counter, LabelCounts
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
        self._active: Layer | None = None
        self._records: dict[tuple[Image, int | None], ImageLayers] = {}
        self._counting: ImageLayers | None = None
        self._visibility = Visibility(viewer)
        self._counter = Counter(self._annotated, self)
        self._counter.counted.connect(self._on_counted)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        viewer.layers.selection.events.active.connect(self._on_active)

    def close(self) -> None:
        """Let go of the viewer; corrections that were not learnt yet become annotations."""
        self._counter.stop()
        self._visibility.close()
        self.viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self.viewer.layers.selection.events.active.disconnect(self._on_active)
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
            record.show(predicted)
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

    def learnable(self) -> list[ImageLayers]:
        """Return the current image and the annotated ones with as many channels."""
        current = self.need()
        return [
            current,
            *(
                other
                for other in self._records.values()
                if other is not current
                and other.teaching
                and other.n_channels == current.n_channels
            ),
        ]

    def next_step(self) -> str:
        """Say what the user should do next, unless there is news."""
        if self.current is None:
            return "Open an image to begin, or try File > Open Sample > Conv-LoRA."
        learnable = self.learnable_pixels()
        enough = len(learnable) >= 2
        if not self.current.annotating:
            each = "" if enough else " of each class in the table"
            return f"Press Start annotating, then paint a few strokes{each}."
        missing = [info.name for info in self.classes if info.id not in learnable]
        if enough:
            others = [f"'{entry.name}'" for entry in self._others()]
            own = [f"'{self.current.image.name}'"] if self.counts.pixels else []
            where = f" of {listed(own + others)}" if others else ""
            but = f"; no labels yet for {listed(missing)}" if missing else ""
            n_pixels = sum(learnable.values())
            return f"Press Adapt to learn from {n_pixels:,} annotated pixels{where}{but}."
        if learnable and missing:
            return f"No labels yet for {listed(missing)}: select a class and paint a stroke."
        return "Select a class in the table and paint a stroke; do so for two classes or more."

    def learnable_pixels(self) -> dict[int, int]:
        """Return annotated pixels per class id that a round would learn from.

        Those that remain unpainted in reviewed regions are background; in other images than the
        current one they are not counted, but their class is known to be there.
        """
        pixels, background = dict(self.counts.pixels), find_background(self.classes)
        regions, remaining = 0, self.counts.remaining
        for entry in self._others():
            regions += entry.regions
            for class_id, n in entry.counts.items():
                pixels[class_id] = pixels.get(class_id, 0) + n
        if background is not None and (regions or remaining):
            pixels[background] = pixels.get(background, 0) + remaining
        return pixels

    def _others(self) -> list[ImageEntry]:
        if self.current is None:
            return []
        n = self.current.n_channels
        return [entry for entry in self.elsewhere() if entry.annotated and entry.shape[3] == n]

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
        if record is not None and record.find_layers(taken, lambda x: _contradicts(x, relied())):
            for layer in (record.annotations, record.prediction):
                self._learn_classes(layer)
            record.show_classes(self.classes)
            self._listen(record)
            self._counter.touch()

    def contradicts(self, layer: Labels) -> bool:
        """Whether a layer that was made here calls a class otherwise than the table does."""
        return _contradicts(layer, self.relied())

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
            record.part_with_annotations()
            self.start_annotating(self.class_id)
            return None
        record.check_fits(layer)
        plan = None
        if meaning is not None:
            values = importing.count_values(layer.data)
            plan = importing.plan_import(values, meaning, kept, colours_of(layer.colormap))
        elif (largest := int(np.max(layer.data, initial=0))) > MAX_CLASSES:
            raise InputError(
                f"'{layer.name}' holds the id {largest}, but classes end at {MAX_CLASSES}; "
                "renumber it, or start annotations of their own."
            )
        self.leaving.emit(record, "other annotations were chosen")
        if plan is None:
            self._learn_classes(layer)
        if plan is not None and plan.changes:
            record.adopt_copy(layer, plan)
        else:
            record.adopt(layer)
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

    def used_classes(self) -> set[int]:
        """Return the ids that occur in any layer of ours."""
        used: set[int] = set()
        for record in self._records.values():
            with contextlib.suppress(InputError):  # its layers have lost their size
                labels = record.predicted_labels() if record.predicted else record.painted()
                used.update(np.unique(labels).tolist())
        return used - {0}

    def _relabel(self, class_id: int, to: int) -> int:
        count = sum(record.relabel(class_id, to) for record in self._records.values())
        self._counter.touch()
        self.relabelled.emit(class_id, to)
        return count

    def painted_with(self, class_id: int) -> int:
        """Return how many pixels of all open images are annotated with a class."""
        work = (record.work() for record in self._records.values())
        return sum(int(np.count_nonzero(w == class_id)) for w in work if w is not None)

    def accept(self, mask: np.ndarray, first: int) -> int:
        """Annotate predicted pixels of the current image; see `ImageLayers.accept`."""
        record = self.need()
        record.collect_corrections()  # an undo item of their own, and not the one that comes last
        count = record.accept(mask, first)
        self._listen(record)
        self._touch()
        return count

    def _on_label(self, class_id: int) -> None:
        self.select_class(class_id)
        self.class_chosen.emit(class_id)

    def _touch(self) -> None:
        self._counter.touch()
        self.changed.emit()

    def _learn_classes(self, layer: Labels | None) -> None:
        if layer is not None:
            self.found.emit(_classes_of(layer))

    def _listen(self, record: ImageLayers) -> None:
        layer = record.annotations
        if layer is not None:  # connecting twice is connecting once
            for event in (layer.events.paint, layer.events.set_data, layer.events.data):
                event.connect(self._counter.touch)
        if record.reviewed is not None:
            record.reviewed.events.data.connect(self._counter.touch)
            record.reviewed.events.data.connect(self._on_region)

    def _on_region(self, event: Any) -> None:
        if event.action == "added":  # drawn to its end, but napari is still busy with it
            QTimer.singleShot(0, self._drop_stray_regions)

    def _drop_stray_regions(self) -> None:
        for record in self.records:
            if record.reviewed is not None and record.axes.drop_stray(record.reviewed):
                self.failed.emit(
                    "A region lies in one plane; press Ctrl+E to roll the axes until height and "
                    f"width of '{record.image.name}' are shown, then draw it."
                )

    def _annotated(self) -> tuple[np.ndarray, Outlines] | None:
        record = self._counting = self.current
        return None if record is None else (record.painted(), record.outlines())

    def _on_counted(self, counts: LabelCounts) -> None:
        if self._counting is not self.current:  # it was left meanwhile; the other is counted next
            return
        self.counts = counts
        self.counted.emit(counts)
        self.changed.emit()

    def _on_active(self, event: Any) -> None:
        """Take up corrections before the annotations are painted on: the latest act is to win.

        The other way the brush goes along, so that a correction needs no more than a class.
        """
        if event.value is None:
            return
        before, self._active = self._active, event.value
        for record in self.records:
            if event.value is record.annotations:
                with contextlib.suppress(ConvLoRAError):  # Adapt says what is wrong
                    record.collect_corrections()
            elif (
                event.value is record.prediction
                and before is record.annotations is not None
                and before.mode == "paint"
            ):
                for what in ("mode", "brush_size", "selected_label"):
                    setattr(event.value, what, getattr(before, what))

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


def _contradicts(layer: Labels, classes: Sequence[ClassInfo]) -> bool:
    if class_colours.KEY not in layer.metadata:
        return False
    names = {info.id: info.name for info in _classes_of(layer)}
    return any(names.get(info.id, info.name) != info.name for info in classes)


def _classes_of(layer: Labels) -> tuple[ClassInfo, ...]:
    return known_classes({n: getattr(layer, n) for n in ("metadata", "features", "colormap")})
