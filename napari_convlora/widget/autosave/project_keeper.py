"""The project behind a viewer: a named one, or one set aside for recovery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qtpy.QtCore import QObject, Signal

from napari_convlora.config import ClassInfo, listed
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.project import ImageEntry, Manifest, Project, Settings, recovery
from napari_convlora.session.jobs import RoundSettings
from napari_convlora.widget.autosave.image_list import ImageList
from napari_convlora.widget.autosave.saving import Autosave
from napari_convlora.widget.engine.workflow import Workflow


class ProjectKeeper(QObject):
    """Begins, opens and closes the project behind a viewer.

    Parameters
    ----------
    workflow
        Whose images and rounds are kept.
    recipe
        Returns what the user has chosen.

    Attributes
    ----------
    autosave, list
        What has work written, and the images of the project.
    automatic
        Returns whether rounds begin by themselves.
    closed
        Whether everything is written and the folder is let go of.
    writer
        Writes in the background, in order.

    Signals
    -------
    changed
        Images, rounds or the project itself have changed.
    opened
        An image layer to work on from now on, and its channel axis.
    loaded
        The `Manifest` of a project that was opened: its classes and settings are to be shown.
    wrote
        The writer has come this far.
    switched
        Another project is open.
    said
        What has happened, in one sentence.
    failed
        What went wrong, in one sentence.
    """

    changed = Signal()
    opened = Signal(object, object)
    loaded = Signal(object)
    said = Signal(str)
    failed = Signal(str)
    wrote = Signal()
    switched = Signal()

    def __init__(
        self, workflow: Workflow, recipe: Callable[[], RoundSettings], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._workflow, self._images, self._recipe = workflow, workflow.images, recipe
        self.automatic: Callable[[], bool] = lambda: False
        self.closed = False
        self.autosave = Autosave(self._images, self._manifest, self)
        self.list = ImageList(self.autosave, workflow, self)
        self.writer = self.autosave.writer
        for part in (self.autosave, self.list):
            part.changed.connect(self.changed)
            part.failed.connect(self.failed)
        self.list.opened.connect(self.opened)
        self.list.said.connect(self.said)
        self.autosave.wrote.connect(self.wrote)

    @property
    def project(self) -> Project | None:
        """Where everything goes; None before there is anything."""
        return self.autosave.project

    @property
    def named(self) -> bool:
        """Whether the user has given it a folder."""
        return self.list.named

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """The images of the project."""
        return self.list.entries

    @property
    def stored(self) -> list[ImageEntry]:
        """The images of the project that are not open."""
        return self.list.stored

    @property
    def removed(self) -> set[str]:
        """Stems of images that the user took out of the viewer; none in a named project."""
        return self.list.removed

    @property
    def others(self) -> list[ImageEntry]:
        """The images but the current one from which a round may learn."""
        return self.list.others

    @property
    def current(self) -> str | None:
        """Stem of the image that is worked on."""
        return self.list.current

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The class table."""
        return self._images.classes

    def create(self, folder: Path) -> None:
        """Save everything so far as a project in a new or empty folder, and go on there.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written.
        """
        self.autosave.settle(rounds=True)
        removed = self.removed
        gone = [f"'{entry.name}'" for entry in self.entries if entry.stem in removed]
        if self.project is None:
            self.autosave.project = Project.create(folder, self._manifest())
        else:
            before, self.autosave.project = self.project, self.project.save_as(folder)
            before.close()
            if not self.named:
                recovery.discard(before.folder)
        self.list.named = True
        sentence = f"The project is in {folder}; it saves itself from now on."
        if gone:
            sentence += f" Also on its list, but taken out of the viewer: {listed(gone)}."
        self.said.emit(sentence)
        for entry in self.entries:
            if entry.homeless:
                self.failed.emit(entry.homeless)
        self.changed.emit()

    def open(self, folder: Path, *, named: bool = True, anyway: bool = False) -> None:
        """Close the project there is, if any, and open the one in `folder` where it was left.

        Raises
        ------
        LockedError
            It is open elsewhere, and not to be opened `anyway`.
        InputError
            There is none, or it cannot be read.
        """
        if self._workflow.running:
            raise InputError("A round is running; press Stop first, then open the project.")
        if self.project is not None and self.project.folder.resolve() == Path(folder).resolve():
            self.said.emit("This project is open already; it saves itself.")
            return
        self.autosave.settle(rounds=True)
        project = Project.open(folder, anyway=anyway)
        self._leave_project()
        self.autosave.project, self.list.named = project, named
        self._images.merged.clear()
        self._images.merged.update(project.manifest.merged)
        self.loaded.emit(project.manifest)
        self.changed.emit()
        stems = [e.stem for e in project.manifest.images]
        if stems:
            current = project.manifest.current
            try:
                self.show_image(current if current in stems else stems[0])
            except ConvLoRAError as error:  # the list shows the others
                self.failed.emit(str(error))
        self.switched.emit()

    def close(self) -> None:
        """Write what is left and let go of the folder; unsaved work is kept for the next start."""
        if not self.closed:
            self.autosave.close()
            self._release()
            self.closed = True

    def save(self) -> None:
        """Hand everything that is not on disk yet to the writer; returns at once."""
        self.autosave.save()

    def touch(self, *_: object) -> None:
        """Save within seconds, as something has changed."""
        self.autosave.touch()

    def need_project(self) -> Project:
        """Return the project; one is set aside if the user has none."""
        return self.autosave.need_project()

    def add_files(self, paths: list[Path]) -> None:
        """Add image files to the list, in the background."""
        self.list.add_files(paths)

    def locate(self, stem: str, path: Path) -> None:
        """Take note where an image is now, and open it."""
        self.list.locate(stem, path)

    def remove(self, stem: str) -> None:
        """Take an image with its strokes off the list, and its layers out of the viewer."""
        self.list.remove(stem)

    def neighbour(self, by: int) -> ImageEntry | None:
        """Return the image `by` places further down the list, if there is any; the ends stay."""
        return self.list.neighbour(by)

    def step(self, by: int) -> None:
        """Go to the image `by` places further down the list."""
        self.list.step(by)

    def show_image(self, stem: str) -> None:
        """Open an image of the list with its annotations and prediction; close the one before."""
        self.list.show_image(stem)

    def _manifest(self) -> Manifest:
        """Return classes and settings as they are chosen now."""
        chosen = self._recipe()
        settings = Settings(chosen.backbone, chosen.model, chosen.train)
        merged = dict(self._images.merged)
        return Manifest(self._images.classes, settings, automatic=self.automatic(), merged=merged)

    def _leave_project(self) -> None:
        for kept in [k for k in self.autosave.works if k.stem is not None]:
            self.list.close_layers(kept)
        self.writer.flush()
        if not self.named and any(e.annotated for e in self.entries):
            self.said.emit("What was painted before is kept aside, and offered at the next start.")
        self.autosave.works.clear()
        self._release()
        self.autosave.project = None

    def _release(self) -> None:
        if self.project is not None:
            self.project.close()
            if not self.named and not any(e.annotated for e in self.entries):
                recovery.discard(self.project.folder)
