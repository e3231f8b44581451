"""The parts of the panel, each given what it needs of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from napari.utils.notifications import show_error, show_warning
from napari.utils.theme import get_theme
from qtpy.QtWidgets import QPushButton, QWidget

from napari_convlora.errors import ConvLoRAError
from napari_convlora.labels.classes import default_classes
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.widget import dialogs
from napari_convlora.widget.autosave.project_keeper import ProjectKeeper
from napari_convlora.widget.autosave.round_history import RoundHistory
from napari_convlora.widget.engine.workflow import Workflow
from napari_convlora.widget.form import Unfolding
from napari_convlora.widget.sections.auto_adapt import AutoAdapt
from napari_convlora.widget.sections.class_table import ClassTable
from napari_convlora.widget.sections.instances import InstancesSection
from napari_convlora.widget.sections.memory import MemorySection
from napari_convlora.widget.sections.output_bar import OutputBar
from napari_convlora.widget.sections.plot import TrainingPlot
from napari_convlora.widget.sections.project import ProjectSection, RecoveryOffer
from napari_convlora.widget.sections.review import ReviewSection
from napari_convlora.widget.sections.reviewed import ReviewedForm
from napari_convlora.widget.sections.rounds import RoundsSection
from napari_convlora.widget.sections.run_bar import RunBar
from napari_convlora.widget.sections.settings import SettingsForm
from napari_convlora.widget.sections.source_form import SourceForm
from napari_convlora.widget.tools.prompt_tool import PromptTool

if TYPE_CHECKING:
    from napari.layers import Labels
    from napari.viewer import Viewer

    from napari_convlora.session.session import Session

BRUSH_KEY = "Ctrl+B"
Result = TypeVar("Result")


class PanelParts:
    """Everything in a panel.

    Parameters
    ----------
    viewer
        The viewer it works on.
    session
        The engine's state; made when first needed if None.
    panel
        Where questions are asked; it owns what is not shown.

    Attributes
    ----------
    annotate, reviewed_title
        The button that takes up the brush, and the one that unfolds `reviewed`.
    """

    def __init__(self, viewer: Viewer, session: Session | None, panel: QWidget) -> None:
        self.viewer, self._panel = viewer, panel
        self.workflow = flow = Workflow(viewer, session, panel)
        self.images = flow.images
        self.source = SourceForm(viewer, self._fits, panel)
        self.settings = SettingsForm()
        self.table = table = ClassTable(default_classes(2))
        self.run_bar = RunBar()
        self.status = self.run_bar.status
        self.prompts = PromptTool(viewer, self.images, self.recipe, session, panel)
        self.plot, self.output = TrainingPlot(), OutputBar()
        self.plot.hide()  # until there is something to plot
        self.review = ReviewSection(viewer, flow, lambda: table.current, self.recipe)
        self.instances = InstancesSection(flow, lambda: table.current)
        self.reviewed = ReviewedForm(self.images, panel)
        self.reviewed_title = Unfolding("Reviewed regions", self.reviewed)
        self.keeper = ProjectKeeper(flow, self.recipe, panel)
        self.history = RoundHistory(self.keeper, flow, self.recipe, panel)
        self.offer, self.project = RecoveryOffer(self.keeper), ProjectSection(self.keeper)
        self.rounds = RoundsSection(self.history)
        self.automatic = AutoAdapt(flow, self._start_round, self.rounds)
        self.rounds.layout().addWidget(self.automatic)
        self.keeper.automatic = self.automatic.isChecked
        flow.go_on_without = self._may_go_on_without
        self.review.walk.following = self.project.following
        self.review.step = lambda: self.keeper.step(1)
        self.memory = MemorySection(flow)
        self.annotate = QPushButton("Start annotating")
        self.annotate.setToolTip(f"Take up the brush ({BRUSH_KEY}), on a layer of its own.")
        keeper = self.keeper
        self.images.elsewhere = lambda: keeper.others

    def recipe(self) -> RoundSettings:
        """Return what the user has chosen."""
        train = replace(self.settings.train_config(), start=self.rounds.start)
        uncertain = self.review.keep_uncertainty.isChecked()
        return RoundSettings(self.source.backbone, self.settings.model_config(), train, uncertain)

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """Do something and say what goes wrong, if anything does."""
        try:
            return action()
        except ConvLoRAError as error:
            self.complain(str(error), False)
            return None

    def complain(self, sentence: str, ours: bool) -> None:
        """Say what went wrong, and whether it is our fault."""
        (show_error if ours else show_warning)(sentence)
        self.status.say(sentence, wrong=True)

    def follow_theme(self) -> None:
        """Draw in a colour that stands out, as the palette has none for both of napari's themes."""
        for plot in (self.plot, self.rounds.plot):
            plot.set_accent(get_theme(self.viewer.theme).current.as_hex())

    def _fits(self, layer: Labels) -> bool:
        record = self.images.current
        return record is not None and record.fits(layer)

    def _start_round(self) -> None:
        recipe = self.recipe()
        self.plot.restart(recipe.train.max_steps, held_out=False)
        self.attempt(lambda: self.workflow.adapt(recipe))

    def _may_go_on_without(self, lost: str) -> bool:
        return not self.automatic.unattended and dialogs.may_go_on_without(self._panel, lost)
