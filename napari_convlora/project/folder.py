"""A project on disk: plain files, each replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from filelock import BaseFileLock

from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write, make_folder
from napari_convlora.formats.opening import open_image, read_labels
from napari_convlora.images.planes import LazyPlanes, Planes
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project import lock
from napari_convlora.project.image_entry import ImageEntry, Viewpoint, new_stem
from napari_convlora.project.label_files import (
    VERSION_SECONDS,
    keep_version,
    read_current,
    read_newest,
    write_label_file,
    write_regions,
)
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
from napari_convlora.project.lost_labels import (
    lost_files,
    read_painted,
    read_reviewed,
    with_counts,
    with_first_counts,
)
from napari_convlora.project.manifest import Manifest
from napari_convlora.project.round_store import Rounds

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PARTS = ANNOTATIONS, PREDICTIONS, IMAGES, ROUNDS


class Project:
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
        self.folder, self.manifest, self._claim = folder, manifest, claim
        self.lock = threading.RLock()
        self._damaged: set[Path] = set()
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

    def update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest by what `change` makes of it, and write it if it differs."""
        with self.lock:
            manifest = change(self.manifest)
            if manifest != self.manifest:
                manifest.write(self.own(MANIFEST))
                self.manifest = manifest

    def entry(self, stem: str) -> ImageEntry:
        """Return an image by the name of its files."""
        for entry in self.manifest.images:
            if entry.stem == stem:
                return entry
        raise InputError(f"There is no image '{stem}' in this project; choose one from its list.")

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
        planes = open_image(path)
        depth, height, width, channels = planes.shape
        leading = () if depth == 1 else (depth,)
        rgb = channels == 3 and planes.dtype == np.uint8
        if channels == 1:
            shape: tuple[int, ...] = (*leading, height, width)
        else:
            shape = (*leading, height, width, 3) if rgb else (*leading, channels, height, width)
        channel_axis = None if rgb or channels == 1 else len(leading)
        if isinstance(planes, LazyPlanes):  # it is shown as the file holds it
            shape = planes.source.shape
            rgb = rgb and planes.channel == len(shape) - 1
            channel_axis = None if rgb else planes.channel
        return self.add(
            ImageEntry(
                stem="",
                name=path.stem,
                path="",
                absolute=str(path.absolute()),
                shape=planes.shape,
                layer_shape=shape,
                rgb=rgb,
                channel_axis=channel_axis,
                dtype=str(planes.dtype),
            )
        )

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

    def annotations(self, stem: str) -> tuple[np.ndarray | None, str]:
        """Return annotations (P, H, W) int32, None if there are none, and what is odd about them.

        An older version takes the place of what is gone or damaged.

        Raises
        ------
        InputError
            Neither they nor an older version can be read.
        """
        entry = self.entry(stem)
        read = partial(read_painted, entry=entry)
        return self._newest(entry, ".tif", read, expected=entry.annotated)

    def regions(self, stem: str) -> tuple[Outlines, str]:
        """Return the reviewed regions of an image, and what is odd about them.

        Raises
        ------
        InputError
            Neither they nor an older version can be read.
        """
        entry = self.entry(stem)
        read = partial(read_reviewed, entry=entry)
        found, note = self._newest(entry, ".json", read, expected=bool(entry.regions))
        return found or (), note

    def _newest(
        self, entry: ImageEntry, suffix: str, read: Callable[[Path], T | None], *, expected: bool
    ) -> tuple[T | None, str]:
        path = self.own(ANNOTATIONS, f"{entry.stem}{suffix}")
        found, note = read_newest(path, read)
        if note:
            self._damaged.add(path)
        elif found is None and expected:
            note = str(lost_files(entry.name, path))
        return found, note

    def _keep_version(self, path: Path) -> None:
        """Keep an older version now and then, and in any case what is damaged."""
        keep_version(path, least=0 if path in self._damaged else VERSION_SECONDS)
        self._damaged.discard(path)

    def keep_annotations(self, stem: str, labels: np.ndarray, regions: Outlines = ()) -> None:
        """Write annotations (P, H, W) and reviewed regions, keep an older version, and count.

        Raises
        ------
        InputError
            They cannot be written.
        """
        with self.lock:
            path = self.own(ANNOTATIONS, f"{stem}.tif")
            make_folder(path.parent)
            self._keep_version(path)
            write_label_file(path, labels)
            path = self.own(ANNOTATIONS, f"{stem}.json")
            if regions or path.exists():
                self._keep_version(path)
                write_regions(path, regions)
            self._replace_entry(with_counts(self.entry(stem), labels, regions))

    def relabel(self, stem: str, class_id: int, to: int) -> None:
        """Give a class's annotated pixels of an image to another; 0 erases them.

        Raises
        ------
        InputError
            The annotations cannot be read or written.
        """
        with self.lock:
            if class_id in self.entry(stem).counts:
                labels, regions = self.annotated(stem)
                self.keep_annotations(stem, np.where(labels == class_id, to, labels), regions)

    def prediction(self, stem: str) -> np.ndarray | None:
        """Return the model's last prediction (P, H, W) int32 of an image; None if there is none."""
        path = self.own(PREDICTIONS, f"{stem}.tif")
        return read_labels(path, self.entry(stem).shape[:3]) if path.is_file() else None

    def keep_prediction(self, stem: str, labels: np.ndarray) -> None:
        """Write what the model predicted (P, H, W)."""
        with self.lock:
            path = self.own(PREDICTIONS, f"{stem}.tif")
            make_folder(path.parent)
            write_label_file(path, labels)

    def predicted(self, stem: str) -> bool:
        """Whether there is a prediction of an image."""
        return (self.folder / PREDICTIONS / f"{stem}.tif").is_file()  # no more is done with it

    def labelled(
        self, *, without_missing: bool = False
    ) -> tuple[tuple[str, ...], list[LabelledImage]]:
        """Return what a round learns from; see `labelled`."""
        return labelled_images(self, without_missing=without_missing)

    def annotated(self, stem: str) -> tuple[np.ndarray, Outlines]:
        """Return annotations (P, H, W) int32, all 0 if nothing was painted, and reviewed regions.

        Raises
        ------
        LostLabelsError
            One of them is gone or damaged, or holds nothing of what was painted, whether there is
            an older version or not.
        """
        entry = self.entry(stem)
        labels: np.ndarray = np.zeros(entry.shape[:3], np.int32)
        regions: Outlines = ()
        path, other = (self.own(ANNOTATIONS, f"{stem}{suffix}") for suffix in (".tif", ".json"))
        try:
            if entry.annotated or path.exists():
                labels = read_current(path, partial(read_painted, entry=entry))
            path = other
            if entry.regions or path.exists():
                regions = read_current(path, partial(read_reviewed, entry=entry))
        except InputError as error:
            raise lost_files(entry.name, path) from error
        return labels, regions

    def install(self, number: int) -> None:
        """Make a round the one that predicts."""
        self.update(lambda m: replace(m, installed=number))

    def _replace_entry(self, entry: ImageEntry) -> None:
        self.update(
            lambda m: replace(
                m, images=tuple(entry if e.stem == entry.stem else e for e in m.images)
            )
        )

    def own(self, *parts: str) -> Path:
        """Return the path of something of the project; see `inside`."""
        return inside(self.folder, *parts)


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
