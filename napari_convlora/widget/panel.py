"""The dock widget: lays out its parts and wires them to the workflow."""

# No `from __future__ import annotations` here: napari reads the viewer's annotation at run time.
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from napari.utils.notifications import show_error, show_warning
from napari.utils.theme import get_theme
from qtpy.QtCore import QEvent, Qt
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import (
    QApplication,
    QFrame,
    QPushButton,
    QScrollArea,
    QShortcut,
    QVBoxLayout,
    QWidget,
)

from napari_convlora.config import ClassInfo
from napari_convlora.errors import ConvLoRAError
from napari_convlora.labels.classes import (
    default_classes,
    find_background,
    read_classes,
    write_classes,
)
from napari_convlora.labels.importing import Meaning
from napari_convlora.project import Manifest
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.widget import adopt_dialog, dialogs
from napari_convlora.widget.autosave.project_keeper import ProjectKeeper
from napari_convlora.widget.autosave.round_history import RoundHistory
from napari_convlora.widget.docking import Docking
from napari_convlora.widget.engine.workflow import Workflow
from napari_convlora.widget.form import Unfolding, leave_keys_to_canvas, read_points_and_commas
from napari_convlora.widget.layers import adoption, copies, learnable
from napari_convlora.widget.layers.label_counts import LabelCounts
from napari_convlora.widget.sections.auto_adapt import AutoAdapt
from napari_convlora.widget.sections.class_table import ClassTable
from napari_convlora.widget.sections.instances import InstancesSection
from napari_convlora.widget.sections.memory import MemorySection
from napari_convlora.widget.sections.output_bar import OutputBar
from napari_convlora.widget.sections.plot import TrainingPlot
from napari_convlora.widget.sections.project import ProjectSection, RecoveryOffer
from napari_convlora.widget.sections.review import ReviewSection
from napari_convlora.widget.sections.reviewed import ReviewedForm, reviewed_text
from napari_convlora.widget.sections.rounds import RoundsSection
from napari_convlora.widget.sections.run_bar import RunBar
from napari_convlora.widget.sections.settings import SettingsForm
from napari_convlora.widget.sections.source_form import SourceForm
from napari_convlora.widget.tools.prompt_tool import PromptTool

if TYPE_CHECKING:
    import napari.layers

    from napari_convlora.session.session import Session

_BRUSH_KEY = "Ctrl+B"


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
        self.workflow = Workflow(napari_viewer, session, self)
        self.images = self.workflow.images
        self.source = SourceForm(napari_viewer, self._fits, self)
        self.settings = SettingsForm()
        self.table = ClassTable(default_classes(2))
        self.run_bar = RunBar()
        self.prompts = PromptTool(napari_viewer, self.images, self._recipe, session, self)
        self.plot, self.output = TrainingPlot(), OutputBar()
        self.plot.hide()  # until there is something to plot
        flow, table = self.workflow, self.table
        self.review = ReviewSection(napari_viewer, flow, lambda: table.current, self._recipe)
        self.instances = InstancesSection(flow, lambda: table.current)
        self.reviewed = ReviewedForm(self.images, self)
        self._reviewed = Unfolding("Reviewed regions", self.reviewed)
        self.keeper = ProjectKeeper(self.workflow, self._recipe, self)
        self.history = RoundHistory(self.keeper, self.workflow, self._recipe, self)
        self.offer, self.project = RecoveryOffer(self.keeper), ProjectSection(self.keeper)
        self.rounds = RoundsSection(self.history)
        self.automatic = AutoAdapt(self.workflow, self._start_round, self.rounds)
        self.rounds.layout().addWidget(self.automatic)
        self.keeper.automatic = self.automatic.isChecked
        self.keeper.go_on_without = self._may_go_on_without
        self.review.walk.following = self.project.following
        self.review.step = lambda: self.keeper.step(1)
        self.memory = MemorySection(self.workflow)
        self._untouched = True
        self._counts = LabelCounts()
        self._hint = self._news = ""
        self._say = self.run_bar.status.say
        self._annotate = QPushButton("Start annotating")
        self._annotate.setToolTip(f"Take up the brush ({_BRUSH_KEY}), on a layer of its own.")
        self._lay_out()
        self._wire()
        self.images.show_classes(self.table.classes)
        # Captures what can do without Qt, as this widget is half gone when `destroyed` comes.
        workflow, prompts, keeper, automatic = flow, self.prompts, self.keeper, self.automatic
        self.images.elsewhere = lambda: keeper.others
        self.images.relied = self._kept
        self.destroyed.connect(lambda *_: workflow.close())
        self.destroyed.connect(lambda *_: prompts.close_down())
        self.destroyed.connect(lambda *_: keeper.close())
        self.destroyed.connect(lambda *_: automatic.let_go())
        docking = Docking(self)
        docking.closed.connect(self._rest)
        docking.opened.connect(self._wake)
        self._follow_theme()
        self._on_image()
        self._refresh()
        self._ready = True

    @property
    def status(self) -> str:
        """The sentence in the status line."""
        return self.run_bar.status.text()

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
            self._follow_theme()

    def reset_choices(self, event: object = None) -> None:
        """Follow the viewer; napari calls this when layers come, go or are renamed."""
        self._refresh()
        self.images.look_for_layers()
        self._refresh()

    def start_annotating(self) -> "napari.layers.Labels | None":
        """Create the annotations layer of the chosen image and take up the brush."""
        return self._try(lambda: self.images.start_annotating(self.table.current or 1))

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
        kept = () if meaning is None else self._kept()
        plan = self._try(lambda: self.images.use_annotations(layer, meaning, kept))
        if plan is None:
            return
        self.table.set_classes(kept)
        self.table.ensure(plan.classes)
        if plan.background is not None and find_background(self.classes) is None:
            self.table.mark_background(plan.background)
        self._on_classes()
        if plan.changes:
            copy = self.images.current.annotations.name
            self._news = (
                f"'{layer.name}' stays as it is, hidden: '{copy}' is a copy that uses the classes "
                "of the table."
            )
        if not self.running:
            self._suggest()

    def adapt(self) -> None:
        """Start a round."""
        self.automatic.adapt()

    def _start_round(self) -> None:
        recipe = self._recipe()
        self.plot.restart(recipe.train.max_steps, held_out=False)
        self._try(lambda: self.workflow.adapt(recipe))

    def _may_go_on_without(self, lost: str) -> bool:
        return not self.automatic.unattended and dialogs.may_go_on_without(self, lost)

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
        self._try(lambda: self.workflow.predict(self._recipe()))

    def load_adapter(self, path: str | Path) -> None:
        """Install the adapter in a file and predict with it."""
        self._try(lambda: self.workflow.load_adapter(Path(path), self._recipe()))

    def export_adapter(self, path: str | Path) -> None:
        """Write the adapter."""
        self._try(lambda: self.workflow.export_adapter(Path(path)))

    def export_masks(self, path: str | Path) -> None:
        """Write the prediction with the annotations on top."""
        self._try(lambda: self.workflow.export_masks(Path(path)))

    def remove_class(self, class_id: int) -> None:
        """Remove a class; Ctrl-Z on the annotations brings its painted pixels and row back."""
        self._try(lambda: self.images.erase_class(class_id))
        self.table.remove(class_id)

    def merge_class(self, class_id: int, into: int) -> None:
        """Merge a class into another; Ctrl-Z on the annotations brings strokes and row back."""
        self._try(lambda: self.images.merge_class(class_id, into))
        self.table.select(into)
        self.table.remove(class_id)

    def load_classes(self, path: str | Path) -> None:
        """Take over a class table; classes that it lacks are kept if an image uses them."""
        self._try(lambda: self.table.replace_with(read_classes(path), self._used()))

    def save_classes(self, path: str | Path) -> None:
        """Write the class table."""
        self._try(lambda: write_classes(path, self.classes))

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

    def _follow_theme(self) -> None:
        # The palette has no colour that stands out in both of napari's themes.
        for plot in (self.plot, self.rounds.plot):
            plot.set_accent(get_theme(self._viewer.theme).current.as_hex())

    def _lay_out(self) -> None:
        inside = QWidget()
        column = QVBoxLayout(inside)
        column.setSpacing(6)
        for part in (
            self.offer,
            self.source.native,
            Unfolding("Advanced", self.settings.native),
            self.settings.native,
            self._annotate,
            self.table,
            self.run_bar,
            self.plot,
            self.output,
            Unfolding("Project", self.project),
            self.project,
            Unfolding("Rounds", self.rounds),
            self.rounds,
            Unfolding("SAM prompts", self.prompts),
            self.prompts,
            self._reviewed,
            self.reviewed,
            Unfolding("Review", self.review),
            self.review,
            Unfolding("Instances", self.instances),
            self.instances,
            Unfolding("Memory", self.memory),
            self.memory,
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
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        outer.addWidget(scroll)
        self.setMinimumWidth(365)

    def _wire(self) -> None:
        flow, table, bar = self.workflow, self.table, self.run_bar
        self.source.image_chosen.connect(self._on_image)
        self.source.annotations_chosen.connect(self._on_annotations)
        self.source.file_asked.connect(
            lambda said: dialogs.with_checkpoint(
                self, lambda path: self.source.choose_backbone(f"{said}{path}")
            )
        )
        self._annotate.clicked.connect(self.start_annotating)
        QShortcut(QKeySequence(_BRUSH_KEY), self).activated.connect(self.start_annotating)
        self.project.step_by_keys(self)
        self.reviewed.said.connect(lambda sentence: flow.failed.emit(sentence, False))
        table.changed.connect(self._on_classes)
        table.selected.connect(self.images.select_class)
        table.removal_asked.connect(self._on_removal)
        table.refused.connect(self._say)
        table.merge_asked.connect(self._on_merging)
        table.load_asked.connect(lambda: dialogs.with_classes(self, self.load_classes))
        table.save_asked.connect(lambda: dialogs.with_new_classes(self, self.save_classes))
        self.images.class_chosen.connect(table.select)
        bar.adapt_pressed.connect(self.adapt)
        bar.stop_pressed.connect(self.stop)
        bar.pause_pressed.connect(flow.pause)
        flow.changed.connect(self._refresh)
        flow.said.connect(self._say)
        flow.failed.connect(self._complain)
        self.images.counted.connect(self._on_counted)
        flow.found.connect(self._on_found)
        flow.ready.connect(self.source.set_backbones)
        flow.started.connect(self._on_started)
        flow.stepped.connect(self._on_steps)
        flow.scored.connect(lambda s: self.plot.add(scores=[(s.step, s.score)]))
        flow.tiled.connect(bar.show_tiles)
        for widget in (*self.settings.widgets, self.source.backbone_combo):
            widget.changed.connect(self.keeper.touch)
        for signal in (self.rounds.go_on.toggled, self.automatic.toggled, table.changed):
            signal.connect(self.keeper.touch)
        self.keeper.opened.connect(self.source.choose)
        self.keeper.loaded.connect(self._on_project)
        self.keeper.said.connect(self._say)
        self.history.said.connect(self._say)
        self.automatic.said.connect(
            lambda s: self._say(self.status if s in self.status else f"{self.status} {s}")
        )
        for part in (self.keeper, self.offer, self.project, self.rounds):
            part.failed.connect(lambda sentence: self._complain(sentence, False))
        output = self.output
        output.predict.clicked.connect(self.predict)
        output.masks.clicked.connect(lambda: dialogs.with_masks(self, self.export_masks))
        output.save.clicked.connect(lambda: dialogs.with_new_adapter(self, self.export_adapter))
        output.load.clicked.connect(lambda: dialogs.with_adapter(self, self.load_adapter))

    def _recipe(self) -> RoundSettings:
        train = replace(self.settings.train_config(), start=self.rounds.start)
        uncertain = self.review.keep_uncertainty.isChecked()
        return RoundSettings(self.source.backbone, self.settings.model_config(), train, uncertain)

    def _fits(self, layer: "napari.layers.Labels") -> bool:
        record = self.images.current
        return record is not None and record.fits(layer)

    def _try(self, action):
        try:
            return action()
        except ConvLoRAError as error:
            self._complain(str(error), False)

    def _complain(self, sentence: str, ours: bool) -> None:
        (show_error if ours else show_warning)(sentence)
        self._say(sentence, wrong=True)

    def _on_image(self) -> None:
        self._news = ""
        self.images.choose(self.source.image, self.source.channel_axis)
        if not self.running:  # or it says why that ends
            self._suggest()

    def _on_annotations(self, layer: "napari.layers.Labels | None") -> None:
        """Use the layer that was chosen; what was not made here needs an answer first."""
        known = layer is None or not adopt_dialog.is_strange(layer)
        if layer is None or (known and not adoption.contradicts(layer, self.images.relied())):
            self.use_annotations(layer)
        elif meaning := adopt_dialog.ask(self, layer, self._kept()):
            self.use_annotations(layer, meaning)
        self._refresh()  # the combo goes back where nothing came of it

    def _used(self) -> set[int]:
        used = copies.used_classes(self.images.records)
        return used.union(*(e.counts for e in self.keeper.stored))

    def _kept(self) -> tuple[ClassInfo, ...]:
        """Return the classes that somebody relies on: of the table at the start, those in use."""
        if self.workflow.has_adapter or not self._untouched:
            return self.classes
        used = self._used()
        return tuple(info for info in self.classes if info.id in used)

    def _suggest(self) -> None:
        self._hint = f"{self._news} {learnable.next_step(self.images)}".strip()
        self._say(self._hint)

    def _on_classes(self) -> None:
        self._untouched = False
        known = {info.id for info in self.images.classes}
        known |= {*learnable.learnable_pixels(self.images)}
        self.images.show_classes(self.table.classes)
        self.images.select_class(self.table.select(self.images.class_id))
        self._refresh()
        # A new class without labels is worth a word after a round, too; what went wrong stays.
        new = any(info.id not in known for info in self.classes)
        worth = new and not self.running and not self.run_bar.status.wrong
        if worth or (self._hint and self.status == self._hint):
            self._suggest()

    def _on_project(self, manifest: Manifest) -> None:
        """Show classes and settings of a project that was opened."""
        self.source.choose_backbone(manifest.settings.backbone)
        self.settings.show(manifest.settings.model, manifest.settings.train)
        self.rounds.go_on.setChecked(manifest.settings.train.start == "installed")
        self.automatic.restart(manifest.automatic)
        if manifest.classes:
            self.table.set_classes(manifest.classes)
            self._on_classes()

    def _on_found(self, classes: tuple[ClassInfo, ...]) -> None:
        """Take up classes that come with a layer or an adapter."""
        if self._untouched and classes:
            self.table.set_classes(())
        self.table.ensure(classes)

    def _on_removal(self, class_id: int) -> None:
        painted = copies.painted_with(self.images.records, class_id) + self._stored(class_id)
        if dialogs.may_remove(self, self.table.name(class_id), painted):
            self.remove_class(class_id)

    def _on_merging(self, class_id: int, into: int) -> None:
        names = self.table.name(class_id), self.table.name(into)
        if dialogs.may_merge(self, *names, self._stored(class_id)):
            self.merge_class(class_id, into)

    def _stored(self, class_id: int) -> int:
        """Return how many pixels of images that are not open are annotated with a class."""
        return sum(entry.counts.get(class_id, 0) for entry in self.keeper.stored)

    def _on_counted(self, counts: LabelCounts) -> None:
        self.table.ensure(default_classes(counts.pixels))
        before, self._counts = self._counts, counts
        self.table.set_counts(counts.pixels, counts.strokes)
        self._reviewed.set_title(reviewed_text(counts, find_background(self.classes) is not None))
        # Counting lags behind: what a failed round said meanwhile stays, until it is remedied.
        news = self.status.startswith(self._hint) or len(before.pixels) < 2 <= len(counts.pixels)
        early = not self.workflow.has_adapter or self.status == self._hint
        if counts != before and news and early and not self.running:
            self._suggest()

    def _on_started(self, total_steps: int, held_out: bool, nbytes: int) -> None:
        self._news = ""
        self.plot.restart(total_steps, held_out)
        self.plot.show()
        self.run_bar.restart()

    def _on_steps(self, steps: list) -> None:
        self.plot.add(losses=[(s.step, s.loss) for s in steps])
        self.run_bar.show_steps(steps)

    def _refresh(self) -> None:
        """Derive what is enabled from the state, in this one place."""
        flow = self.workflow
        record = self.images.current
        annotating = record is not None and record.annotating
        self._annotate.setEnabled(record is not None and not annotating)
        self._annotate.setVisible(not annotating)
        self.output.show_state(
            image=record is not None,
            adapter=flow.has_adapter,
            predicted=record is not None and record.predicted,
            idle=not flow.running,
        )
        self.run_bar.show_state(flow.phase, paused=flow.paused, can_adapt=annotating)
        self.source.refresh(record.annotations if record is not None else None)
