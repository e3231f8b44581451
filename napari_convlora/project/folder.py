"""A project on disk: plain files, each replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from filelock import BaseFileLock

from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write, make_folder
from napari_convlora.images.planes import Planes
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.project import lock
from napari_convlora.project.image_entry import ImageEntry, Viewpoint, entry_of_file, new_stem
from napari_convlora.project.label_files import keep_version
from napari_convlora.project.labelled_folder import LabelledFolder
from napari_convlora.project.labelled_images import labelled_images
from napari_convlora.project.layout import (
    ANNOTATIONS,
    IMAGES,
    MANIFEST,
    PREDICTIONS,
    ROUNDS,
    check_plain,
    inside,
)
from napari_convlora.project.lost_labels import with_first_counts
from napari_convlora.project.manifest import Manifest
from napari_convlora.project.round_store import Rounds

logger = logging.getLogger(__name__)

_PARTS = ANNOTATIONS, PREDICTIONS, IMAGES, ROUNDS


class Project(LabelledFolder):
    """A folder that holds annotations, rounds, settings and references to images.

    Use `create` or `open`, and `close` in the end. Methods may be called from any thread, one at a
    time.

    Attributes
    ----------
    folder
        Where it is.
    manifest
        What ``project.json`` holds; replaced as a whole, never changed.
    rounds
        The history.
    lock
        Held while something is written.
    """

    def __init__(self, folder: Path, manifest: Manifest, claim: BaseFileLock) -> None:
        super().__init__(folder, manifest)
        self._claim = claim
        self.rounds = Rounds(self)

    @classmethod
    def create(cls, folder: Path, manifest: Manifest | None = None) -> Project:
        """Make a project in a new or empty folder.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written.
        """
        folder = Path(folder).absolute()
        make_folder(folder)
        if any(folder.iterdir()):
            raise InputError(f"'{folder}' is not empty; choose or make an empty folder.")
        project = cls(folder, manifest or Manifest(), lock.claim(folder))
        try:
            project.manifest.write(project.own(MANIFEST))
        except InputError:
            project._unmake()
            raise
        return project

    @classmethod
    def open(cls, folder: Path, *, anyway: bool = False) -> Project:
        """Open the project in a folder.

        Parameters
        ----------
        folder
            Of the project.
        anyway
            Whether to open it although it is open elsewhere.

        Raises
        ------
        LockedError
            It is open elsewhere.
        InputError
            There is none, or it is damaged or of a newer format.
        """
        folder = Path(folder).absolute()
        path, *_ = (inside(folder, part) for part in (MANIFEST, *_PARTS))
        if not path.is_file():
            raise InputError(f"'{folder}' is no project: it has no {MANIFEST}; choose another.")
        Manifest.read(path)  # of what cannot be read nothing is claimed
        claim = lock.claim(folder, anyway=anyway)
        project = cls(folder, Manifest.read(path), claim)  # which may just have been written
        images = []
        for entry in project.manifest.images:
            try:
                images.append(with_first_counts(entry, folder))
            except InputError as error:  # it opens all the same
                logger.warning("'%s' counts as not annotated: %s", entry.name, error)
                images.append(entry)
        project.manifest = replace(project.manifest, images=tuple(images))
        return project

    def close(self) -> None:
        """Leave the folder to others."""
        lock.release(self.folder, self._claim)

    def _unmake(self) -> None:
        """Leave the folder empty, as what could not be written as a whole is no project."""
        for part in _PARTS:
            shutil.rmtree(self.folder / part, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / MANIFEST).unlink()
        lock.withdraw(self.folder, self._claim)

    def save_as(self, folder: Path) -> Project:
        """Copy everything into a new or empty folder, and return the project there.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written, or there are links to be copied.
        """
        with self.lock:
            for part in _PARTS:
                check_plain(self.folder / part)
            there = Project.create(folder)
            try:
                for part in _PARTS:
                    if (self.folder / part).is_dir():
                        # What has become a link meanwhile stays one.
                        shutil.copytree(self.folder / part, there.folder / part, symlinks=True)
                images = tuple(
                    e if _is_copied(e) else e.rebased(self.folder, there.folder)
                    for e in self.manifest.images
                )
                there.update(lambda m: replace(self.manifest, images=images))
            except InputError:
                there._unmake()
                raise
            except OSError as error:
                there._unmake()
                raise InputError(
                    f"'{folder}' cannot be written ({error.strerror or 'some files failed'}); "
                    "choose another folder."
                ) from error
            return there

    def add(self, entry: ImageEntry, pixels: Planes | None = None) -> ImageEntry:
        """Add an image and return its entry, with a stem of its own.

        Parameters
        ----------
        entry
            Its `absolute` says where the file is; "" if it has none.
        pixels : (P, H, W, C)
            Of the layer. They are copied into the project if there is no file, or if that reads
            differently, as nothing else could bring them back. What is not in memory is too large
            for that: it then has no place until it is located.

        Raises
        ------
        InputError
            The file is gone and there are no pixels, or nothing can be written.
        """
        with self.lock:
            taken = {known.stem for known in self.manifest.images} | {*self.manifest.removed}
            name = entry.name.replace("\0", "")  # which no text of a project may hold
            name = _unlike(name, {known.name for known in self.manifest.images})
            entry = replace(entry, name=name, stem=new_stem(name, taken))
            known = pixels is None or entry.holds(pixels)
            if known:
                entry = entry.moved(Path(entry.absolute), self.folder)
            elif isinstance(pixels, np.ndarray):
                path = self.own(IMAGES, f"{entry.stem}.npy")
                make_folder(path.parent)
                _write_pixels(path, entry.as_layer(pixels))
                entry = entry.moved(path, self.folder)
            else:
                entry = replace(entry, path="", absolute="")
            self.update(lambda m: replace(m, images=(*m.images, entry)))
            return entry

    def add_file(self, path: Path) -> ImageEntry:
        """Add an image file, to be annotated later.

        Raises
        ------
        InputError
            It cannot be read.
        """
        return self.add(entry_of_file(path))

    def remove(self, stem: str) -> None:
        """Take an image off the list; what was painted last becomes its newest older version.

        Its file, its rounds and a copy of its pixels, which rounds are repeated with, stay.

        Raises
        ------
        InputError
            There is no such image, or nothing can be written.
        """
        with self.lock:
            gone = self.entry(stem)
            self.update(
                lambda m: replace(
                    m,
                    images=tuple(e for e in m.images if e != gone),
                    current=None if m.current == stem else m.current,
                    removed=(*m.removed, stem),
                )
            )
            for suffix in (".tif", ".json"):
                path = self.own(ANNOTATIONS, f"{stem}{suffix}")
                keep_version(path, least=0)
                path.unlink(missing_ok=True)
            self.own(PREDICTIONS, f"{stem}.tif").unlink(missing_ok=True)

    def locate(self, stem: str, path: Path) -> None:
        """Take note that an image is at `path` now.

        Raises
        ------
        InputError
            It cannot be read there, or has another size than when it was annotated.
        """
        entry = self.entry(stem).moved(path, self.folder)
        entry.read(self.folder)  # a large one is opened, no more
        self._replace_entry(entry)

    def keep_view(self, stem: str, view: Viewpoint) -> None:
        """Take note how an image was last looked at."""
        with self.lock:
            self._replace_entry(replace(self.entry(stem), view=view))

    def keep_place(self, stem: str, scale: tuple[float, ...], translate: tuple[float, ...]) -> None:
        """Take note where the layer of an image lies."""
        with self.lock:
            entry = replace(self.entry(stem), scale=scale, translate=translate)
            if entry != self.entry(stem):
                self._replace_entry(entry)

    def labelled(
        self, *, without_missing: bool = False
    ) -> tuple[tuple[str, ...], list[LabelledImage]]:
        """Return what a round learns from; see `labelled`."""
        return labelled_images(self, without_missing=without_missing)


def _is_copied(entry: ImageEntry) -> bool:
    """Whether the project has a copy of an image's pixels."""
    folder, *below = PurePosixPath(entry.path).parts or ("",)
    return folder == IMAGES and ".." not in below


def _write_pixels(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, pixels, allow_pickle=False)


def _unlike(name: str, taken: Collection[str]) -> str:
    """Return a name that no other image has: files in different folders may be called the same."""
    names = itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2)))
    return next(n for n in names if n not in taken)
