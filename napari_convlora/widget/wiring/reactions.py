"""What the panel does when one of its parts, or the viewer, has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtCore import QObject

from napari_convlora.events import Step
from napari_convlora.labels.classes import default_classes, find_background
from napari_convlora.labels.importing import Meaning
from napari_convlora.project import Manifest
from napari_convlora.widget import adopt_dialog
from napari_convlora.widget.layers import adoption, learnable
from napari_convlora.widget.layers.label_counts import LabelCounts
from napari_convlora.widget.sections.reviewed import reviewed_text
from napari_convlora.widget.wiring.class_edits import ClassEdits
from napari_convlora.widget.wiring.parts import PanelParts

if TYPE_CHECKING:
    from napari.layers import Labels
    from qtpy.QtWidgets import QWidget


class Reactions(QObject):
    """What each part does to the others.

    Parameters
    ----------
    parts, edits
        The parts, and what changes of the class table do.
    panel
        Where questions are asked.
    """

    def __init__(self, parts: PanelParts, edits: ClassEdits, panel: QWidget) -> None:
        super().__init__(panel)
        self._parts, self._edits, self._panel = parts, edits, panel
        self._counts = LabelCounts()
        self._news = ""
        self._connect_work()
        self._connect_choices()

    def _connect_work(self) -> None:
        parts, flow, say = self._parts, self._parts.workflow, self._parts.status.say
        flow.changed.connect(self.refresh)
        flow.said.connect(say)
        flow.failed.connect(parts.complain)
        flow.found.connect(self._edits.take_up)
        flow.ready.connect(parts.source.set_backbones)
        flow.started.connect(self._on_started)
        flow.stepped.connect(self._on_steps)
        flow.scored.connect(lambda s: parts.plot.add(scores=[(s.step, s.score)]))
        flow.tiled.connect(parts.run_bar.show_tiles)
        parts.images.counted.connect(self._on_counted)
        parts.images.class_chosen.connect(parts.table.select)
        parts.keeper.opened.connect(parts.source.choose)
        parts.keeper.loaded.connect(self._on_project)
        for part in (parts.keeper, parts.history):
            part.said.connect(say)
        parts.automatic.said.connect(parts.status.add)
        for section in (parts.keeper, parts.offer, parts.project, parts.rounds):
            section.failed.connect(lambda sentence: parts.complain(sentence, False))
        parts.reviewed.said.connect(lambda sentence: flow.failed.emit(sentence, False))

    def _connect_choices(self) -> None:
        parts, table, keeper = self._parts, self._parts.table, self._parts.keeper
        parts.source.image_chosen.connect(self.on_image)
        parts.source.annotations_chosen.connect(self._on_annotations)
        table.changed.connect(self.on_classes)
        table.selected.connect(parts.images.select_class)
        table.refused.connect(parts.status.say)
        for widget in (*parts.settings.widgets, parts.source.backbone_combo):
            widget.changed.connect(keeper.touch)
        for signal in (parts.rounds.go_on.toggled, parts.automatic.toggled, table.changed):
            signal.connect(keeper.touch)

    def on_image(self) -> None:
        """Work on the image that is chosen."""
        parts, self._news = self._parts, ""
        parts.images.choose(parts.source.image, parts.source.channel_axis)
        if not parts.workflow.running:  # or it says why that ends
            self.suggest()

    def use_annotations(self, layer: Labels | None, meaning: Meaning | None) -> None:
        """Use a Labels layer of the user's own as annotations, or a new one."""
        parts = self._parts
        kept = () if meaning is None else self._edits.relied()
        plan = parts.attempt(lambda: parts.images.use_annotations(layer, meaning, kept))
        if plan is None:
            return
        parts.table.set_classes(kept)
        parts.table.ensure(plan.classes)
        if plan.background is not None and find_background(parts.table.classes) is None:
            parts.table.mark_background(plan.background)
        self.on_classes()
        if plan.changes and layer is not None:
            copy = parts.images.need().annotations
            assert copy is not None
            self._news = (
                f"'{layer.name}' stays as it is, hidden: '{copy.name}' is a copy that uses the "
                "classes of the table."
            )
        if not parts.workflow.running:
            self.suggest()

    def _on_annotations(self, layer: Labels | None) -> None:
        """Use the layer that was chosen; what was not made here needs an answer first."""
        known = layer is None or not adopt_dialog.is_strange(layer)
        if layer is None or (
            known and not adoption.contradicts(layer, self._parts.images.relied())
        ):
            self.use_annotations(layer, None)
        elif meaning := adopt_dialog.ask(self._panel, layer, self._edits.relied()):
            self.use_annotations(layer, meaning)
        self.refresh()  # the combo goes back where nothing came of it

    def suggest(self) -> None:
        """Say what to do next."""
        sentence = f"{self._news} {learnable.next_step(self._parts.images)}".strip()
        self._parts.status.say(sentence, hint=True)

    def on_classes(self) -> None:
        """Show the classes of the table on the images."""
        parts, table, status = self._parts, self._parts.table, self._parts.status
        self._edits.untouched = False
        known = {info.id for info in parts.images.classes} | {
            *learnable.learnable_pixels(parts.images)
        }
        parts.images.show_classes(table.classes)
        parts.images.select_class(table.select(parts.images.class_id))
        self.refresh()
        # A new class without labels is worth a word after a round, too; what went wrong stays.
        new = any(info.id not in known for info in table.classes)
        worth = new and not parts.workflow.running and not status.wrong
        if worth or (status.hinting and not status.added):
            self.suggest()

    def _on_project(self, manifest: Manifest) -> None:
        """Show classes and settings of a project that was opened."""
        parts = self._parts
        parts.source.choose_backbone(manifest.settings.backbone)
        parts.settings.show(manifest.settings.model, manifest.settings.train)
        parts.rounds.go_on.setChecked(manifest.settings.train.start == "installed")
        parts.automatic.restart(manifest.automatic)
        if manifest.classes:
            parts.table.set_classes(manifest.classes)
            self.on_classes()

    def _on_counted(self, counts: LabelCounts) -> None:
        parts, status = self._parts, self._parts.status
        parts.table.ensure(default_classes(counts.pixels))
        before, self._counts = self._counts, counts
        parts.table.set_counts(counts.pixels, counts.strokes)
        marked = find_background(parts.table.classes) is not None
        parts.reviewed_title.set_title(reviewed_text(counts, marked))
        # Counting lags behind: what a failed round said meanwhile stays, until it is remedied.
        news = status.hinting or len(before.pixels) < 2 <= len(counts.pixels)
        early = not parts.workflow.has_adapter or (status.hinting and not status.added)
        if counts != before and news and early and not parts.workflow.running:
            self.suggest()

    def _on_started(self, total_steps: int, held_out: bool, nbytes: int) -> None:
        self._news = ""
        self._parts.plot.restart(total_steps, held_out)
        self._parts.plot.show()
        self._parts.run_bar.restart()

    def _on_steps(self, steps: list[Step]) -> None:
        self._parts.plot.add(losses=[(s.step, s.loss) for s in steps])
        self._parts.run_bar.show_steps(steps)

    def refresh(self) -> None:
        """Derive what is enabled from the state, in this one place."""
        parts, flow = self._parts, self._parts.workflow
        record = parts.images.current
        annotating = record is not None and record.annotating
        parts.annotate.setEnabled(record is not None and not annotating)
        parts.annotate.setVisible(not annotating)
        parts.output.show_state(
            image=record is not None,
            adapter=flow.has_adapter,
            predicted=record is not None and record.predicted,
            idle=not flow.running,
        )
        parts.run_bar.show_state(flow.phase, paused=flow.paused, can_adapt=annotating)
        parts.source.refresh(record.annotations if record is not None else None)
