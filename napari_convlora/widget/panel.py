"""The dock widget: lays out its parts, and what each button does."""

# No `from __future__ import annotations` here: napari reads the viewer's annotation at run time.
from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import QEvent, Qt
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import QApplication, QFrame, QScrollArea, QShortcut, QVBoxLayout, QWidget

from napari_convlora.config import ClassInfo
from napari_convlora.labels.importing import Meaning
from napari_convlora.widget import dialogs
from napari_convlora.widget.docking import Docking
from napari_convlora.widget.engine.exporting import write_adapter, write_masks
from napari_convlora.widget.form import Unfolding, leave_keys_to_canvas, read_points_and_commas
from napari_convlora.widget.layers import copies
from napari_convlora.widget.wiring.class_edits import ClassEdits
from napari_convlora.widget.wiring.parts import BRUSH_KEY, PanelParts
from napari_convlora.widget.wiring.reactions import Reactions

if TYPE_CHECKING:
    import napari.layers

    from napari_convlora.session.session import Session


class ConvLoRAWidget(QWidget):
    """Paint, adapt, correct, adapt again, export.

    A viewer has one panel: where there is one already, this is that one. When its dock is closed it
    ends what runs, with what it has learnt, and its process, and rests in the window until it is
    opened again or the window is closed.

    Parameters
    ----------
    napari_viewer
        The viewer it works on.
    session
        The engine's state; made when first needed if None.

    Attributes
    ----------
    workflow, images, source, settings, table, run_bar, plot, output, prompts, reviewed, review
    instances, keeper, history, offer, project, rounds, automatic, memory
        The parts, each of which works without the others.
    """

    def __new__(cls, napari_viewer: "napari.viewer.Viewer", session: "Session | None" = None):
        """Return the panel of the viewer if it has one."""
        # Two panels would each take what the other writes for corrections. napari offers no other
        # way to bring a widget back: it wants a class, and makes one of it.
        panels = (widget for widget in QApplication.allWidgets() if type(widget) is cls)
        mine = (panel for panel in panels if panel.serves(napari_viewer))
        return next(mine, None) or super().__new__(cls)

    def __init__(self, napari_viewer: "napari.viewer.Viewer", session: "Session | None" = None):
        if self.__dict__.get("_ready"):
            return
        super().__init__()
        self._viewer = napari_viewer
        self._parts = parts = PanelParts(napari_viewer, session, self)
        self.workflow, self.images, self.source = parts.workflow, parts.images, parts.source
        self.settings, self.table, self.run_bar = parts.settings, parts.table, parts.run_bar
        self.plot, self.output, self.prompts = parts.plot, parts.output, parts.prompts
        self.reviewed, self.review, self.instances = parts.reviewed, parts.review, parts.instances
        self.keeper, self.history, self.offer = parts.keeper, parts.history, parts.offer
        self.project, self.rounds = parts.project, parts.rounds
        self.automatic, self.memory = parts.automatic, parts.memory
        self._edits = ClassEdits(parts)
        _lay_out(self, parts)
        self._reactions = Reactions(parts, self._edits, self)
        _connect_buttons(self, parts)
        self.images.show_classes(self.table.classes)
        # Captures what can do without Qt, as this widget is half gone when `destroyed` comes.
        flow, prompts, keeper, automatic = self.workflow, self.prompts, self.keeper, self.automatic
        self.destroyed.connect(lambda *_: flow.close())
        self.destroyed.connect(lambda *_: prompts.close_down())
        self.destroyed.connect(lambda *_: keeper.close())
        self.destroyed.connect(lambda *_: automatic.let_go())
        docking = Docking(self)
        docking.closed.connect(self._rest)
        docking.opened.connect(self._wake)
        parts.follow_theme()
        self._reactions.on_image()
        self._reactions.refresh()
        self._ready = True

    @property
    def status(self) -> str:
        """The sentence in the status line."""
        return self.run_bar.status.sentence

    @property
    def running(self) -> bool:
        """Whether a round or a prediction runs."""
        return self.workflow.running

    @property
    def session(self) -> "Session | None":
        """The engine's state; None before it was first needed."""
        return self.workflow.runner.session

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The class table."""
        return self.table.classes

    def serves(self, viewer: "napari.viewer.Viewer") -> bool:
        """Whether it works on `viewer`, and was not ended."""
        if not self.__dict__.get("_ready"):  # it could not be built
            return False
        ours, theirs = (getattr(v, "__wrapped__", v) for v in (self._viewer, viewer))
        return ours is theirs and not self.keeper.closed and not self.workflow.runner.closed

    def changeEvent(self, event: QEvent | None) -> None:
        """Follow napari's theme."""
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.StyleChange:
            self._parts.follow_theme()

    def reset_choices(self, event: object = None) -> None:
        """Follow the viewer; napari calls this when layers come, go or are renamed."""
        self._reactions.refresh()
        self.images.look_for_layers()
        self._reactions.refresh()

    def start_annotating(self) -> "napari.layers.Labels | None":
        """Create the annotations layer of the chosen image and take up the brush."""
        return self._parts.attempt(lambda: self.images.start_annotating(self.table.current or 1))

    def use_annotations(
        self, layer: "napari.layers.Labels | None", meaning: Meaning | None = None
    ) -> None:
        """Use a Labels layer of the user's own as annotations, or a new one.

        Parameters
        ----------
        layer
            The layer; None for a new one.
        meaning
            What its values stand for; None: they are class ids, and 0 is unlabelled.
        """
        self._reactions.use_annotations(layer, meaning)

    def adapt(self) -> None:
        """Start a round."""
        self.automatic.adapt()

    def stop(self) -> None:
        """Stop what runs and keep what was learnt."""
        self.workflow.stop()

    def pause(self) -> None:
        """Let the round wait."""
        self.workflow.pause(True)

    def resume(self) -> None:
        """Let the round go on."""
        self.workflow.pause(False)

    def predict(self) -> None:
        """Predict the chosen image."""
        self._parts.attempt(lambda: self.workflow.predict(self._parts.recipe()))

    def load_adapter(self, path: str | Path) -> None:
        """Install the adapter in a file and predict with it."""
        self._parts.attempt(lambda: self.workflow.load_adapter(Path(path), self._parts.recipe()))

    def export_adapter(self, path: str | Path) -> None:
        """Write the adapter."""
        self._parts.attempt(
            lambda: self.workflow.said.emit(write_adapter(self.session, Path(path)))
        )

    def export_masks(self, path: str | Path) -> None:
        """Write the prediction with the annotations on top."""
        said = self.workflow.said
        self._parts.attempt(lambda: said.emit(write_masks(self.images, Path(path))))

    def remove_class(self, class_id: int) -> None:
        """Remove a class; Ctrl-Z on the annotations brings its painted pixels and row back."""
        self._edits.remove(class_id)

    def merge_class(self, class_id: int, into: int) -> None:
        """Merge a class into another; Ctrl-Z on the annotations brings strokes and row back."""
        self._edits.merge(class_id, into)

    def load_classes(self, path: str | Path) -> None:
        """Take over a class table; classes that it lacks are kept if an image uses them."""
        self._edits.load(Path(path))

    def save_classes(self, path: str | Path) -> None:
        """Write the class table."""
        self._edits.save(Path(path))

    def _rest(self) -> None:
        self.prompts.rest()
        self.review.rest()
        self.workflow.rest()
        self.keeper.save()

    def _wake(self) -> None:
        if self.workflow.resting:
            self.show()
            self.review.wake()
            self.workflow.wake()


def _lay_out(panel: ConvLoRAWidget, parts: PanelParts) -> None:
    inside = QWidget()
    column = QVBoxLayout(inside)
    column.setSpacing(6)
    for part in (
        parts.offer,
        parts.source.native,
        Unfolding("Advanced", parts.settings.native),
        parts.settings.native,
        parts.annotate,
        parts.table,
        parts.run_bar,
        parts.plot,
        parts.output,
        Unfolding("Project", parts.project),
        parts.project,
        Unfolding("Rounds", parts.rounds),
        parts.rounds,
        Unfolding("SAM prompts", parts.prompts),
        parts.prompts,
        parts.reviewed_title,
        parts.reviewed,
        Unfolding("Review", parts.review),
        parts.review,
        Unfolding("Instances", parts.instances),
        parts.instances,
        Unfolding("Memory", parts.memory),
        parts.memory,
    ):
        column.addWidget(part)
    column.addStretch()
    leave_keys_to_canvas(inside)
    read_points_and_commas(inside)
    scroll = QScrollArea()
    scroll.setWidgetResizable(True)
    scroll.setFrameShape(QFrame.Shape.NoFrame)
    scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    scroll.setWidget(inside)
    outer = QVBoxLayout(panel)
    outer.setContentsMargins(0, 0, 0, 0)
    outer.addWidget(scroll)
    panel.setMinimumWidth(365)


def _connect_buttons(panel: ConvLoRAWidget, parts: PanelParts) -> None:
    table, bar, output = parts.table, parts.run_bar, parts.output
    parts.annotate.clicked.connect(panel.start_annotating)
    QShortcut(QKeySequence(BRUSH_KEY), panel).activated.connect(panel.start_annotating)
    parts.project.step_by_keys(panel)
    parts.source.file_asked.connect(
        lambda said: dialogs.with_checkpoint(
            panel, lambda path: parts.source.choose_backbone(f"{said}{path}")
        )
    )
    table.removal_asked.connect(lambda class_id: _ask_removal(panel, parts, class_id))
    table.merge_asked.connect(lambda one, into: _ask_merging(panel, parts, one, into))
    table.load_asked.connect(lambda: dialogs.with_classes(panel, panel.load_classes))
    table.save_asked.connect(lambda: dialogs.with_new_classes(panel, panel.save_classes))
    bar.adapt_pressed.connect(panel.adapt)
    bar.stop_pressed.connect(panel.stop)
    bar.pause_pressed.connect(parts.workflow.pause)
    output.predict.clicked.connect(panel.predict)
    output.masks.clicked.connect(lambda: dialogs.with_masks(panel, panel.export_masks))
    output.save.clicked.connect(lambda: dialogs.with_new_adapter(panel, panel.export_adapter))
    output.load.clicked.connect(lambda: dialogs.with_adapter(panel, panel.load_adapter))


def _ask_removal(panel: ConvLoRAWidget, parts: PanelParts, class_id: int) -> None:
    painted = copies.painted_with(parts.images.records, class_id) + _stored(parts, class_id)
    if dialogs.may_remove(panel, parts.table.name(class_id), painted):
        panel.remove_class(class_id)


def _ask_merging(panel: ConvLoRAWidget, parts: PanelParts, class_id: int, into: int) -> None:
    names = parts.table.name(class_id), parts.table.name(into)
    if dialogs.may_merge(panel, *names, _stored(parts, class_id)):
        panel.merge_class(class_id, into)


def _stored(parts: PanelParts, class_id: int) -> int:
    """Return how many pixels of images that are not open are annotated with a class."""
    return sum(entry.counts.get(class_id, 0) for entry in parts.keeper.stored)
