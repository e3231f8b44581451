"""The rounds of the project behind a viewer: written when they end, installed when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QObject, Signal

from napari_convlora.config import listed
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.evaluation.gate import Correction, decide
from napari_convlora.files.atomic import check_space, data_folder, rescued
from napari_convlora.project import Project, RoundRecord, Settings
from napari_convlora.project.layout import ADAPTER
from napari_convlora.project.round_store import NotInstalledError
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.session.snapshot import Snapshot
from napari_convlora.widget.autosave.image_work import Home, ImageWork
from napari_convlora.widget.autosave.project_keeper import ProjectKeeper
from napari_convlora.widget.engine.workflow import Workflow
from napari_convlora.widget.layers.image_layers import ImageLayers

if TYPE_CHECKING:
    from napari_convlora.events import Failed, Finished
    from napari_convlora.model.adapter import Adapter


class RoundHistory(QObject):
    """Rounds, from the newest back to those of earlier sessions.

    Parameters
    ----------
    keeper, workflow
        Where rounds are written, and where they come from.
    recipe
        Returns what the user has chosen.

    Attributes
    ----------
    records, curve
        The rounds, and by number what later corrections say of each.

    Signals
    -------
    changed
        There is another round, or another one is installed.
    said
        What has happened, in one sentence.
    """

    changed = Signal()
    said = Signal(str)
    _counted = Signal(object, object)  # from the writer's thread

    def __init__(
        self,
        keeper: ProjectKeeper,
        workflow: Workflow,
        recipe: Callable[[], RoundSettings],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self.records: list[RoundRecord] = []
        self.curve: dict[int, Correction] = {}
        self._keeper, self._workflow, self._recipe = keeper, workflow, recipe
        self._foreign = False
        self._start: tuple[int | None, Adapter | None] = None, None  # of the round that runs
        self._events: list[Any] = []
        self._layers: Mapping[tuple[str, int | None], ImageWork] = {}  # as the round began
        self._counted.connect(self._on_counted)
        keeper.wrote.connect(self._on_wrote)
        keeper.switched.connect(self._on_switched)
        workflow.begun.connect(self._on_begun)
        workflow.started.connect(self._on_started)
        workflow.stepped.connect(self._events.extend)
        workflow.scored.connect(self._events.append)
        workflow.learnt.connect(self._on_learnt)
        workflow.predicted.connect(self._on_predicted)
        workflow.loaded.connect(self._on_loaded)

    @property
    def installed(self) -> int | None:
        """Number of the round that predicts; None if there is none, or an adapter from a file."""
        project = self._keeper.project
        return None if project is None or self._foreign else project.manifest.installed

    def learnt_from(self, record: RoundRecord) -> str:
        """Say from which images, and how many pixels of each class, a round has learnt."""
        images = {entry.stem: entry.name for entry in self._keeper.entries}
        classes = {info.id: info.name for info in self._keeper.classes}
        pixels = ", ".join(f"{classes.get(i, i)} {n:,} px" for i, n in record.pixels.items())
        return f"Learnt from {listed([images.get(s, s) for s in record.images])}: {pixels}."

    def install(self, number: int) -> None:
        """Roll back or forward: let a round's adapter predict from now on."""
        project = self._keeper.need_project()
        if self._workflow.running:
            raise InputError("A round is running; wait for it or press Stop, then install.")
        self._keeper.writer.flush()
        project.install(number)
        self._install_adapter(number, show=True)
        self.changed.emit()

    def export_recipe(self, number: int, path: Path) -> None:
        """Write what repeats a round without the window."""
        self._keeper.writer.flush()
        self._keeper.need_project().rounds.export_recipe(number, path)
        self.said.emit(
            f"Repeat round {number} with: napari-convlora adapt --recipe {path.name} "
            "--out adapter.safetensors"
        )

    def _on_begun(self) -> None:
        self._layers = self._keeper.autosave.layers

    def _on_started(self, total_steps: int, held_out: bool, nbytes: int) -> None:
        self._events.clear()
        project = self._keeper.project
        try:
            check_space(data_folder() if project is None else project.folder, nbytes)
        except InputError as error:
            self._keeper.failed.emit(f"{str(error)[:-1]}: until then the round is in memory only.")
        session = self._workflow.runner.session
        self._start = self.installed, None if session is None else session.installed

    def _on_learnt(
        self, message: Finished | Failed, snapshots: list[Snapshot], used: RoundSettings
    ) -> None:
        layers, self._layers = self._layers, {}
        homes: list[Home] = []
        for snapshot in snapshots:
            kept = None
            if not snapshot.stem:
                kept = layers.get((snapshot.name, snapshot.channel_axis))
                self._keeper.autosave.enlist(kept)
            homes.append(Home(snapshot.stem or None) if kept is None else kept.home)
        self._keeper.save()
        try:
            project = self._keeper.need_project()
        except ConvLoRAError as error:
            self._keeper.failed.emit(
                f"{str(error)[:-1]}: the round is in memory only; press Export adapter to keep it."
            )
            return
        settings = Settings(used.backbone, used.model, used.train)
        history, adapter, start = list(self._events), message.adapter, self._start
        writer = self._keeper.writer
        assert adapter is not None
        if decide(adapter.summary).better:
            self._foreign = False

        def write() -> None:
            annotations = {}
            for snapshot, home in zip(snapshots, homes, strict=True):
                if home.stem is not None:
                    annotations[home.stem] = snapshot.annotations, snapshot.reviewed
            try:
                project.rounds.add(adapter, annotations, settings, history, start)
            except NotInstalledError:  # it is where it belongs
                raise
            except (ConvLoRAError, OSError) as error:
                if writer.last_try.is_set():  # there is no later try
                    raise rescued(error, Path(ADAPTER), adapter.save) from error
                raise

        writer.put(write, keep=True)
        self._count_corrections()

    def _on_predicted(self, record: ImageLayers, labels: np.ndarray) -> None:
        kept, project = self._keeper.autosave.find(record), self._keeper.project
        if kept is None or project is None or self._foreign:
            return
        home, writer = kept.home, self._keeper.writer

        def write() -> None:
            number = project.manifest.installed  # a round that has just ended is written by now
            late = writer.waiting  # or it waits for room, and this is not its number
            if home.stem is not None and number is not None and not late:
                project.rounds.keep_prediction(number, home.stem, labels)

        writer.put(write)
        writer.put(self._keeper.autosave.wrote.emit)

    def _count_corrections(self) -> None:
        project, tell = self._keeper.need_project(), self._counted.emit

        def count() -> None:
            numbers = [record.number for record in project.rounds.records()]
            tell(project, {n: project.rounds.corrections(n) for n in numbers})

        self._keeper.writer.put(count)
        self._keeper.writer.put(self._keeper.autosave.wrote.emit)

    def _on_counted(self, project: Project, curve: dict[int, Correction]) -> None:
        if project is self._keeper.project:
            self.curve = curve
            self.changed.emit()

    def _install_adapter(self, number: int, *, show: bool) -> None:
        project = self._keeper.need_project()
        try:
            labels = [(entry.name, array) for entry, array in project.rounds.labels(number)]
            if not project.manifest.classes:
                self._workflow.found.emit(project.rounds.recipe(number).classes)
            path = project.rounds.file(number, ADAPTER)
            self._workflow.load_adapter(path, self._recipe(), labels, show=show, ours=True)
        except ConvLoRAError as error:
            self._keeper.failed.emit(str(error))

    def _on_loaded(self, ours: bool) -> None:
        self._foreign = not ours
        self.changed.emit()

    def _on_wrote(self) -> None:
        project = self._keeper.project
        self.records = [] if project is None else project.rounds.records()
        self.changed.emit()

    def _on_switched(self) -> None:
        self.curve, self._foreign = {}, False
        self._on_wrote()
        session, number = self._workflow.runner.session, self.installed
        n_rounds = 0 if session is None else len(session.rounds)
        self._workflow.earlier = max((r.number for r in self.records), default=0) - n_rounds
        if session is not None:  # nor may another project's adapter stay where this one's is lost
            session.uninstall()
            self._workflow.changed.emit()
        if number is not None:
            self._install_adapter(number, show=False)
        self._count_corrections()
