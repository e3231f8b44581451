"""Click or box: SAM fills the current class with the object that is meant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Labels
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QCheckBox, QPushButton, QVBoxLayout, QWidget

from napari_convlora.errors import ConvLoRAError
from napari_convlora.prediction.prompts import Box, Click, Prompt
from napari_convlora.session import jobs, prompt_jobs
from napari_convlora.widget.engine.runner import Runner
from napari_convlora.widget.form import words
from napari_convlora.widget.tools.prompt_marks import PromptMarks
from napari_convlora.widget.tools.prompt_queue import PromptQueue
from napari_convlora.widget.tools.prompted_object import PromptedObject

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.session.session import Session
    from napari_convlora.widget.layers.image_layers import ImageLayers
    from napari_convlora.widget.layers.open_images import OpenImages

_HELP = (
    "Drag a box around an object, or click on it. More clicks add to it; right-click (or "
    "Alt-click) takes away. Enter: next object. Esc: cancel. Hold Space to move the view."
)
_LOOKS = "SAM looks; the first time in a part of the image takes seconds…"
_DRAG_PX = 5


class PromptTool(QWidget):
    """The button that takes up the tool, and what it says.

    Parameters
    ----------
    viewer, images
        What it works on.
    recipe
        Returns the chosen backbone and device.
    session
        Share the backbone of this one, in a thread; if None, prompts are answered in a process of
        their own.
    """

    def __init__(
        self,
        viewer: Viewer,
        images: OpenImages,
        recipe: Callable[[], jobs.RoundSettings],
        session: Session | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._viewer, self._images, self._recipe, self._session = viewer, images, recipe, session
        # Not the session of a round, so that prompts are answered while one runs.
        self.runner = Runner(None if session is None else _session())
        self.queue = PromptQueue(
            self.runner, lambda question: prompt_jobs.prompt(question, recipe(), session)
        )
        self.queue.on_asked = lambda: self.words.setText(_LOOKS)
        self.queue.on_answer = self._on_answer
        self.queue.on_error = self._on_error
        self._record: ImageLayers | None = None
        self._layer: Labels | None = None
        self._marks: PromptMarks | None = None
        self._object: PromptedObject | None = None
        self._painting = False
        self.button = QPushButton("SAM click / box")
        self.button.setCheckable(True)
        self.button.setToolTip("Let SAM find objects for the selected class, unadapted.")
        self.over = QCheckBox("Paint over other classes")
        self.over.setToolTip("Otherwise only pixels that are not labelled yet are filled.")
        self.words = words(_HELP)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for part in (self.button, self.over, self.words):
            layout.addWidget(part)
        self.button.toggled.connect(self._on_toggled)

    @property
    def active(self) -> bool:
        """Whether clicks and boxes go to SAM."""
        return self._layer is not None

    def leave(self, event: Any = None) -> None:
        """Put the tool down; the object is kept."""
        self.button.setChecked(False)

    def add_box(self, plane: int, box: Box) -> None:
        """Begin an object with a box around it."""
        self.finish()
        self._begin(plane, Prompt(box=box))

    def add_click(self, plane: int, click: Click) -> None:
        """Say more about the object, or begin one."""
        thing = self._object
        if thing is not None and (
            thing.plane != plane or thing.class_id != self._class_id or thing.undone
        ):
            self.finish()
            thing = None
        try:
            if thing is None:
                self._begin(plane, Prompt((click,)))
            else:
                thing.prompt = Prompt((*thing.prompt.clicks, click), thing.prompt.box)
                self._ask(thing)
        except ConvLoRAError as error:
            self.words.setText(str(error))

    def finish(self, layer: Any = None) -> None:
        """Keep the object; the next prompt begins another."""
        self._object = None
        self._show_marks()

    def cancel(self, layer: Any = None) -> None:
        """Give up the object and restore what was there."""
        thing = self._object
        if thing is not None:
            thing.take_back()
            self.queue.waiting = [other for other in self.queue.waiting if other is not thing]
            self.words.setText("Cancelled. " + _HELP)
        self.finish()

    def rest(self) -> None:
        """Put the tool down and end its process."""
        self.leave()
        self.queue.waiting.clear()
        self.runner.rest()

    def close_down(self) -> None:
        """Let go of the viewer; makes no use of Qt, which may have deleted the widget."""
        self._put_down()
        self.runner.close()

    @property
    def _class_id(self) -> int:
        return 0 if self._layer is None else int(self._layer.selected_label)

    def _on_toggled(self, on: bool) -> None:
        self.words.setText(_HELP)
        if not on:
            self._put_down()
            return
        try:
            self._take_up()
        except ConvLoRAError as error:
            self.button.setChecked(False)
            self.words.setText(str(error))

    def _take_up(self) -> None:
        record = self._images.need()
        record.check_in_view()
        if not record.annotating:
            self._images.start_annotating()
        assert record.annotations is not None
        self._record, layer = record, record.annotations
        self._marks = PromptMarks(record)
        layer.visible = True
        self._viewer.layers.selection.active = layer
        layer.mode = "pan_zoom"
        layer.mouse_pan = False  # or a box would move the view
        layer.cursor = "crosshair"
        layer.mouse_drag_callbacks.append(self._on_mouse)
        for key, action in self._keys().items():
            layer.bind_key(key, action, overwrite=True)
        self._layer = layer
        self.runner.prepare(prompt_jobs.prepare_prompts(self._recipe(), self._session))
        layer.events.mode.connect(self.leave)
        layer.events.paint.connect(self._on_paint)
        self._viewer.layers.selection.events.active.connect(self._on_active)
        self._images.changed.connect(self._look_at_active)

    def _put_down(self) -> None:
        layer, marks = self._layer, self._marks
        if layer is None:
            return
        self._viewer.layers.selection.events.active.disconnect(self._on_active)
        with contextlib.suppress(RuntimeError):  # deleted already
            self._images.changed.disconnect(self._look_at_active)
        layer.events.mode.disconnect(self.leave)
        layer.events.paint.disconnect(self._on_paint)
        for key in self._keys():
            layer.bind_key(key, None)
        layer.mouse_drag_callbacks.remove(self._on_mouse)
        layer.mouse_pan = layer.mode == "pan_zoom"
        if layer.mode == "pan_zoom":
            layer.cursor = "standard"
        self._marks = None
        self._settle()
        self._layer = self._record = None
        if marks is not None:
            marks.remove()

    def _settle(self) -> None:
        """Leave what is painted as it is: it is no longer the last item of the undo history."""
        self.queue.waiting = [thing for thing in self.queue.waiting if thing.painted is None]
        self.finish()

    def _keys(self) -> dict[str, Callable]:
        return {"Enter": self.finish, "Escape": self.cancel, "Space": self._hold_to_pan}

    def _hold_to_pan(self, layer: Labels) -> Iterator[None]:
        layer.mouse_pan = True
        yield
        layer.mouse_pan = layer.mode == "pan_zoom" and not self.active

    def _on_active(self, event: Any) -> None:
        # A layer that is added is active for a moment, also where it was not the user's wish.
        QTimer.singleShot(0, self._look_at_active)

    def _look_at_active(self) -> None:
        active = self._viewer.layers.selection.active
        if self._layer is not None and (
            active != self._layer or self._images.current is not self._record
        ):
            self.leave()

    def _on_paint(self, event: Any) -> None:
        if not self._painting:
            self._settle()

    def _on_mouse(self, layer: Labels, event: Any) -> Iterator[None]:
        record, marks = self._record, self._marks
        if record is None or marks is None or layer.mouse_pan:
            return
        try:
            record.check_in_view()
        except ConvLoRAError as error:
            self.words.setText(str(error))
            return
        positive = event.button != 2 and "Alt" not in event.modifiers
        start, dragged = np.asarray(event.pos), False
        marks.zoom = event.camera_zoom
        plane, *first = record.locate(event.position)
        yield
        while event.type == "mouse_move":
            dragged = dragged or np.abs(np.asarray(event.pos) - start).max() > _DRAG_PX
            if dragged:
                marks.show(plane, _box(first, record.locate(event.position)[1:]))
            yield
        last = record.locate(event.position)[1:] if dragged else first
        box = _box(first, last).inside(record.planes_shape[1:])
        if box is None:
            self.words.setText("That is outside the image; click on an object in it.")
        elif dragged:
            self.add_box(plane, box)
        else:
            self.add_click(plane, Click(box.top, box.left, positive))

    def _begin(self, plane: int, prompt: Prompt) -> None:
        if self._record is not None and self._class_id:
            self._object = PromptedObject(self._record, plane, self._class_id, prompt)
            self._ask(self._object)

    def _ask(self, thing: PromptedObject) -> None:
        self._show_marks()
        self.queue.ask(thing)

    def _on_answer(self, thing: PromptedObject, mask: np.ndarray) -> None:
        self._painting = True
        try:
            if not thing.undone:
                count = thing.show(mask, self.over.isChecked())
                self.words.setText(_said(count, bool(mask.any())))
        except ConvLoRAError as error:
            self.words.setText(str(error))
        finally:
            self._painting = False

    def _on_error(self, thing: PromptedObject, error: Exception) -> None:
        self.words.setText(str(error))
        if thing is self._object:
            self.finish()

    def _show_marks(self) -> None:
        """Show the prompts of the object."""
        marks, thing = self._marks, self._object
        if marks is not None and thing is not None:
            marks.show(thing.plane, thing.prompt.box, thing.prompt.clicks)
        elif marks is not None:
            marks.show()


def _session() -> Session:
    # It imports torch, as whoever has a session did.
    from napari_convlora.session.session import Session

    return Session()


def _box(one: Sequence[float], other: Sequence[float]) -> Box:
    """Return the box with these corners."""
    (top, bottom), (left, right) = (sorted(pair) for pair in zip(one, other, strict=True))
    return Box(top, left, bottom, right)


def _said(count: int, found: bool) -> str:
    if not found:
        return "SAM finds nothing there; drag a box around the object."
    if not count:
        return "All of that is painted already; tick 'Paint over other classes' to replace it."
    return f"{count:,} pixels. {_HELP}"
