"""Rounds that begin by themselves once the user has paused painting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from napari.layers.base import ActionType
from qtpy.QtCore import Qt, QTimer, Signal
from qtpy.QtWidgets import QApplication, QCheckBox, QWidget

from napari_convlora.evaluation.gate import gained
from napari_convlora.events import Failed, Finished
from napari_convlora.widget.engine.workflow import Workflow
from napari_convlora.widget.layers import learnable
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.label_counts import LabelCounts

PAUSE_MS = 3000
"""How long nothing is painted before a round begins."""

_ON = "Rounds begin by themselves, a few seconds after your last stroke."
_OFF = "Rounds begin when you press Adapt."
_LATER = "What you paint now is learnt in the round after this one."
_PAUSED = "Automatic rounds are paused: {}; press Adapt to go on."
_ENDED = "the last round ended without a result"
_STOPPED = "the last round was stopped"
_NO_GAIN = "the last round brought no gain"


class AutoAdapt(QCheckBox):
    """A switch that starts a round whenever annotations have changed, until one gains nothing.

    No round begins while another job runs, a mouse button is held, a polygon is being drawn or the
    panel is put away; what is painted meanwhile is learnt in the next one.

    Parameters
    ----------
    workflow
        Whose images are watched and whose rounds are judged.
    start
        Starts a round.

    Attributes
    ----------
    paused
        Why no round begins although the switch is on; "" if they do.

    Signals
    -------
    said
        What to add to the status, in one sentence.
    """

    said = Signal(str)

    def __init__(
        self, workflow: Workflow, start: Callable[[], object], parent: QWidget | None = None
    ) -> None:
        super().__init__("Adapt automatically when strokes change", parent)
        self.setToolTip("A round begins a few seconds after your last stroke, if none runs.")
        self.paused = ""
        self._workflow, self._images, self._start = workflow, workflow.images, start
        self._changed = False  # since the last round began
        self._painted = False  # since annotations were last counted
        self._counts: WeakKeyDictionary[ImageLayers, LabelCounts] = WeakKeyDictionary()
        self._drawing = False  # whether a polygon is begun and not finished
        self._ours = False  # whether the round that runs began by itself
        self._verdict = ""
        self._before: Mapping[str, Any] | None = None
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.setInterval(PAUSE_MS)
        self._soon.timeout.connect(self._on_pause)
        self.toggled.connect(self._on_toggled)
        self._images.changed.connect(self._follow)
        self._images.counted.connect(self._on_counted)
        workflow.interrupted.connect(self._on_interrupted)
        workflow.changed.connect(self._on_workflow)
        workflow.learnt.connect(self._on_learnt)

    @property
    def unattended(self) -> bool:
        """Whether the round that runs began by itself, so that there is nobody to be asked."""
        return self._ours

    def adapt(self) -> None:
        """Start a round because the user asks for it; what was paused goes on."""
        self.paused, self._ours = "", False
        self._soon.stop()
        self._start()
        self._changed = False  # taking up corrections has changed the annotations just now

    def restart(self, on: bool) -> None:
        """Begin anew with another project."""
        self.paused, self._before, self._changed = "", None, False
        self.setChecked(on)

    def let_go(self) -> None:
        """Watch nothing any more."""
        for layer_event in self._events():
            layer_event.disconnect(self._on_stroke)

    def _events(self) -> Iterator[Any]:
        for record in self._images.records:
            for layer in (record.annotations, record.prediction):
                if layer is not None:
                    yield layer.events.paint
            if record.reviewed is not None:
                yield record.reviewed.events.data

    def _follow(self) -> None:
        for event in self._events():  # connecting twice is connecting once
            event.connect(self._on_stroke)

    def _on_stroke(self, event: Any) -> None:
        if all(event.source is not record.prediction for record in self._images.records):
            # What is painted on a prediction is looked for later.
            self._changed = self._painted = True
        self._drawing = getattr(event, "action", None) == ActionType.ADDING
        self._wait()

    def _on_counted(self, counts: LabelCounts) -> None:
        """Take note of undo and redo, which do not say "paint" but change what is counted."""
        record = self._images.current
        if record is None or not record.annotating:
            return
        before, self._counts[record] = self._counts.get(record), counts
        painted, self._painted = self._painted, False
        if not painted and before not in (None, counts) and counts.pixels:
            self._changed = True
            self._wait()

    def _wait(self) -> None:
        if self.isChecked():
            self._soon.start()
            if self._workflow.running:
                self.said.emit(_LATER)

    def _on_toggled(self, on: bool) -> None:
        self.paused = ""
        self.said.emit(_ON if on else _OFF)
        if on and self._changed:
            self._soon.start()

    def _on_pause(self) -> None:
        """Begin a round if something has changed and nothing is in its way."""
        changed = self._changed or any(record.corrected for record in self._images.records)
        if not changed or not self.isChecked() or self._workflow.running or self._workflow.resting:
            return
        if self._drawing or QApplication.mouseButtons() != Qt.MouseButton.NoButton:
            self._soon.start()
        elif self.paused:
            self.said.emit(_PAUSED.format(self.paused))
        elif self._workflow.has_adapter or len(learnable.learnable_pixels(self._images)) > 1:
            self.adapt()
            self._ours, self._verdict = True, _ENDED
            self._on_workflow()  # it may not even have begun

    def _on_learnt(self, message: Finished | Failed, *_: Any) -> None:
        if isinstance(message, Failed):
            return
        summary = message.adapter.summary
        self._verdict = "" if gained(summary, self._before) else _NO_GAIN
        if message.reason == "stopped":
            self._verdict = _STOPPED
        self._before = summary

    def _on_interrupted(self) -> None:
        self._ours = False  # a round that ends because of that says nothing

    def _on_workflow(self) -> None:
        if self._workflow.running or self._workflow.resting:
            return
        if self._ours:
            self._ours, self.paused = False, self._verdict
            if self.paused:
                self.said.emit(_PAUSED.format(self.paused))
        if self.isChecked() and self._changed and not self.paused and not self._soon.isActive():
            self._soon.start()
