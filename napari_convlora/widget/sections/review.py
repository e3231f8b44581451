"""Section of the panel: accept or reject the prediction, look at it next, compare rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QCheckBox, QGridLayout, QLabel, QPushButton, QSlider, QWidget

from napari_convlora.errors import ConvLoRAError
from napari_convlora.widget.layers.extra_layers import NOTHING_PREDICTED
from napari_convlora.widget.sections.accept_reject import AcceptReject
from napari_convlora.widget.sections.uncertain_walk import NEXT_KEY, UncertainWalk
from napari_convlora.widget.tools.region_tool import Kind, RegionTool

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_convlora.session.jobs import RoundSettings
    from napari_convlora.widget.engine.workflow import Workflow

_VERBS = {True: "Accept", False: "Reject"}
_WHAT = {
    True: "Make annotations of it, with its predicted class.",
    False: "Clear it until the next prediction; nothing is learnt from that.",
}
COMPARE_KEY = "H"
_TAKE_KEYS = {True: "A", False: "R"}
_HOW: dict[Kind, tuple[str, str]] = {
    "click": ("By click", "Click on a connected region to {} it"),
    "rectangle": ("By rectangle", "Drag a rectangle around what to {}"),
    "lasso": ("By lasso", "Draw around what to {}"),
}


class ReviewSection(QWidget):
    """Buttons that accept (annotate) or reject (clear) parts of the prediction, Next, Compare.

    Parameters
    ----------
    viewer
        Whose keys and camera it uses.
    workflow
        Images, and the job that finds the uncertainty.
    selected_class
        Returns the id of the class chosen in the table; 0 if there is none.
    recipe
        Returns what the user has chosen for a prediction.

    Attributes
    ----------
    take
        Accepts and rejects.
    walk
        Goes from place to place.
    step
        Opens the next image of the project.
    """

    def __init__(
        self,
        viewer: Viewer,
        workflow: Workflow,
        selected_class: Callable[[], int],
        recipe: Callable[[], RoundSettings],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._viewer, self._flow, self._images = viewer, workflow, workflow.images
        self._selected_class, self._recipe = selected_class, recipe
        self.step: Callable[[], None] = lambda: None
        self._pending: Callable[[], None] | None = None
        self._accepting = True
        self.tool = RegionTool()  # without a parent, so that it can clean up after this
        self.take = AcceptReject(self._images, self.tool, workflow.said.emit)
        self.walk = UncertainWalk(self._images, workflow.said.emit)
        self.tools: dict[tuple[Kind, bool], QPushButton] = {}
        self.empty = QLabel(NOTHING_PREDICTED)
        self.empty.setWordWrap(True)
        self.all_planes = QCheckBox("In all planes")
        self.all_planes.setToolTip("Otherwise only in the plane that is shown.")
        self.confidence = QSlider(Qt.Orientation.Horizontal)
        self.confidence.setRange(0, 100)
        self.confidence.setValue(80)
        self.confidence.setToolTip("By how much the likeliest class must lead the second.")
        self.by_class = {accept: QPushButton(name) for accept, name in _VERBS.items()}
        self.by_confidence = {accept: QPushButton() for accept in (True, False)}
        self.next_button = QPushButton(f"Next ({NEXT_KEY})")
        self.next_button.setToolTip(
            "Go to the most uncertain place that is not painted or reviewed and was not shown yet."
        )
        self.compare_button = QPushButton(f"Previous ({COMPARE_KEY})")
        self.compare_button.setCheckable(True)
        self.compare_button.setToolTip(
            f"Show the prediction before the last round; hold {COMPARE_KEY} for a short look."
        )
        self.keep_uncertainty = QCheckBox("Uncertainty layer after every round")
        self.keep_uncertainty.setToolTip("An image from 0 to 100 %; its eye in the list shows it.")
        self._lay_out()
        self._wire()
        self.wake()
        self._on_confidence()
        self.refresh()

    def refresh(self) -> None:
        """Derive what is enabled from the state."""
        record = self._images.current
        predicted = record is not None and record.predicted
        self.empty.setVisible(not predicted)
        if not predicted:
            self.tool.leave()
        for button in (*self.tools.values(), *self.by_class.values(), *self.by_confidence.values()):
            button.setEnabled(predicted)
        self.all_planes.setVisible(record is not None and predicted and record.planes_shape[0] > 1)
        self.next_button.setEnabled(record is not None and self._flow.has_adapter)
        has_previous = predicted and record is not None and record.extra.previous is not None
        self.compare_button.setEnabled(has_previous)
        if not has_previous or self._flow.phase == "starting":
            self.compare_button.setChecked(False)
        if self._pending is not None and not self._flow.running:
            action, self._pending = self._pending, None
            if record is not None and record.extra.scored:  # or it was stopped
                self._try(action)

    def next_place(self) -> None:
        """Move to the next uncertain place, finding the uncertainty first if it is not known."""
        self._with_uncertainty(self._go_on, some=True)

    def _go_on(self) -> None:
        if not self.walk.at_end():
            self.walk.go_on()
            return
        self.step()
        record, busy = self._images.need(), self._flow.running
        if record.predicted and not busy:
            self.next_place()
            return
        press = "Once nothing runs, press" if busy else "Press"
        self._flow.said.emit(
            f"'{record.image.name}' is open. {press} {NEXT_KEY} to predict it and see its most "
            "uncertain place."
        )

    def _lay_out(self) -> None:
        grid = QGridLayout(self)
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setColumnStretch(0, 1)
        grid.addWidget(self.empty, 0, 0, 1, 3)
        for row, (kind, (title, how)) in enumerate(_HOW.items(), 1):
            grid.addWidget(QLabel(title), row, 0)
            for column, (accept, name) in enumerate(_VERBS.items(), 1):
                button = QPushButton(name)
                button.setCheckable(True)
                tip = f"{how.format(name.lower())}; Esc ends. {_WHAT[accept]}"
                if kind == "click":
                    tip += f" Or press {_TAKE_KEYS[accept]} with the mouse on the region."
                button.setToolTip(tip)
                button.clicked.connect(partial(self._on_tool, kind, accept))
                self.tools[kind, accept] = button
                grid.addWidget(button, row, column)
        row = grid.rowCount()
        grid.addWidget(QLabel("Selected class"), row, 0)
        grid.addWidget(QLabel("By confidence"), row + 1, 0)
        grid.addWidget(self.confidence, row + 1, 1, 1, 2)
        for column, accept in enumerate(_VERBS, 1):
            for down, button in ((0, self.by_class[accept]), (2, self.by_confidence[accept])):
                button.setToolTip(_WHAT[accept])
                grid.addWidget(button, row + down, column)
        row += 3
        grid.addWidget(self.all_planes, row, 0, 1, 3)
        grid.addWidget(self.keep_uncertainty, row + 1, 0, 1, 3)
        below = QGridLayout()
        below.addWidget(self.next_button, 0, 0)
        below.addWidget(self.compare_button, 0, 1)
        grid.addLayout(below, row + 2, 0, 1, 3)

    def _wire(self) -> None:
        self._flow.changed.connect(self.refresh)
        self._images.leaving.connect(self._on_leaving)
        take = self.take
        self.tool.clicked.connect(lambda at: self._try(take.region, self._accepting, at))
        self.tool.drawn.connect(lambda *drawn: self._try(take.drawn, self._accepting, *drawn))
        self.tool.left.connect(self._on_left)
        self.tool.turned.connect(lambda sentence: self._flow.failed.emit(sentence, False))
        self.tool.undo_asked.connect(take.undo)
        self.all_planes.toggled.connect(partial(setattr, take, "all_planes"))
        self.confidence.valueChanged.connect(self._on_confidence)
        self.next_button.clicked.connect(lambda: self._try(self.next_place))
        self.compare_button.toggled.connect(self._compare)
        for accept in _VERBS:
            self.by_class[accept].clicked.connect(partial(self._try, self._on_class, accept))
            self.by_confidence[accept].clicked.connect(
                partial(self._try, self._on_by_confidence, accept)
            )
        self._keys = self._actions()
        self.destroyed.connect(partial(_let_go, self._viewer, self.tool, self._keys.values()))

    def wake(self) -> None:
        """Take up the keys on the canvas."""
        for key, action in self._keys.items():
            self._viewer.bind_key(key, action, overwrite=True)

    def rest(self) -> None:
        """Let go of the keys, and of the region tool."""
        self._pending = None
        self.compare_button.setChecked(False)
        _let_go(self._viewer, self.tool, self._keys.values())

    def _actions(self) -> dict[str, Callable]:
        """Return what the keys do."""
        button = self.compare_button

        def hold(_: Any) -> Iterator[None]:
            shown = button.isChecked()
            button.setChecked(not shown)
            yield
            button.setChecked(shown)

        def go_on(_: Any) -> None:
            self.next_button.click()

        def taking(accept: bool) -> Callable[[Any], None]:
            def take(_: Any) -> None:  # napari wants functions with names, so no `partial`
                self._try(self.take.region_under_mouse, accept, _TAKE_KEYS[accept])

            return take

        taken: dict[str, Callable] = {k: taking(accept) for accept, k in _TAKE_KEYS.items()}
        return {NEXT_KEY: go_on, COMPARE_KEY: hold, **taken}

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except ConvLoRAError as error:
            self._flow.failed.emit(str(error), False)

    def _on_tool(self, kind: Kind, accept: bool, checked: bool) -> None:
        self.tool.leave()
        if checked:
            self._accepting = accept
            self._try(self.tool.start, self._images.need(), kind)
            self.tools[kind, accept].setChecked(self.tool.active)
            if self.tool.active:
                how = _HOW[kind][1].format(_VERBS[accept].lower())
                self._flow.said.emit(f"{how}; Esc or another layer ends this.")

    def _on_left(self) -> None:
        for button in self.tools.values():
            button.setChecked(False)

    def _on_class(self, accept: bool, *_: bool) -> None:
        self.take.of_class(accept, self._selected_class())

    def _on_by_confidence(self, accept: bool, *_: bool) -> None:
        least = self.confidence.value()
        self._with_uncertainty(partial(self.take.by_confidence, accept, least))

    def _on_confidence(self, *_: int) -> None:
        least = self.confidence.value()
        self.by_confidence[True].setText(f"Accept ≥ {least} %")
        self.by_confidence[False].setText(f"Reject < {least} %")

    def _with_uncertainty(self, action: Callable[[], None], *, some: bool = False) -> None:
        """Do `action` once all of the image is scored, or at least some of it."""
        extra = self._images.need().extra
        if extra.uncertainty is not None and (some or extra.scored):
            action()
            return
        self._flow.find_uncertainty(self._recipe())
        self.keep_uncertainty.setChecked(True)
        self._pending = action

    def _compare(self, shown: bool) -> None:
        record = self._images.current
        if record is None:
            return
        previous, prediction = record.extra.previous, record.prediction
        if previous is not None:
            previous.visible = shown
        if prediction is not None:
            prediction.visible = not shown or previous is None

    def _on_leaving(self, *_: Any) -> None:
        self.tool.leave()
        self.compare_button.setChecked(False)
        self._pending = None
        self.walk.leave()


def _let_go(viewer: Viewer, tool: RegionTool, actions: Collection[Callable], *_: Any) -> None:
    tool.leave()
    for key, action in list(viewer.keymap.items()):
        if action in actions:  # another panel may have bound the key meanwhile
            viewer.bind_key(key, None, overwrite=True)
