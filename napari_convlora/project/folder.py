"""A project on disk: plain files, each replaced as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from napari_convlora.annotations import LabelledImage
from napari_convlora.config import InputError
from napari_convlora.export import write_history
from napari_convlora.files import make_folder, read_image, read_labels
from napari_convlora.project import owner
from napari_convlora.project.labels import read_newest, replace_labels, write_labels
from napari_convlora.project.manifest import ImageEntry, Manifest, Settings, new_stem
from napari_convlora.project.recipe import Recipe
from napari_convlora.project.rounds import (
    ADAPTER,
    HISTORY,
    RECIPE,
    START,
    RoundRecord,
    numbers,
    read_record,
    write_record,
)
from napari_convlora.rounds import Correction, correction, decide

if TYPE_CHECKING:
    from napari_convlora.adapter_file import Adapter
    from napari_convlora.events import Event

MANIFEST = "project.json"
_ANNOTATIONS, _PREDICTIONS, _IMAGES, _ROUNDS = "annotations", "predictions", "images", "rounds"


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
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._lock = threading.RLock()

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
        owner.claim(folder)
        project = cls(folder, manifest or Manifest())
        project.manifest.write(folder / MANIFEST)
        return project

    @classmethod
    def open(cls, folder: Path) -> Project:
        """Open the project in a folder.

        Raises
        ------
        InputError
            There is none, it is damaged or of a newer format, or open in another process.
        """
        folder = Path(folder).absolute()
        if not (folder / MANIFEST).is_file():
            raise InputError(f"'{folder}' is no project: it has no {MANIFEST}; choose another.")
        manifest = Manifest.read(folder / MANIFEST)
        owner.claim(folder)
        return cls(folder, manifest)

    def close(self) -> None:
        """Leave the folder to others."""
        owner.release(self.folder)

    def save_as(self, folder: Path) -> Project:
        """Copy everything into a new or empty folder, and return the project there.

        Raises
        ------
        InputError
            The folder holds something, or cannot be written.
        """
        with self._lock:
            there = Project.create(folder)
            try:
                for part in (_ANNOTATIONS, _PREDICTIONS, _IMAGES, _ROUNDS):
                    if (self.folder / part).is_dir():
                        shutil.copytree(self.folder / part, there.folder / part)
            except OSError as error:
                raise InputError(
                    f"'{folder}' cannot be written ({error.strerror}); choose another folder."
                ) from error
            images = tuple(
                e if e.path.startswith(f"{_IMAGES}/") else e.rebased(self.folder, there.folder)
                for e in self.manifest.images
            )
            there.update(lambda m: replace(self.manifest, images=images))
            return there

    def update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest by what `change` makes of it, and write it if it differs."""
        with self._lock:
            manifest = change(self.manifest)
            if manifest != self.manifest:
                manifest.write(self._own(MANIFEST))
                self.manifest = manifest

    def entry(self, stem: str) -> ImageEntry:
        """Return an image by the name of its files."""
        for entry in self.manifest.images:
            if entry.stem == stem:
                return entry
        raise InputError(f"There is no image '{stem}' in this project; choose one from its list.")

    def add(self, entry: ImageEntry, pixels: np.ndarray | None = None) -> ImageEntry:
        """Add an image and return its entry, with a stem of its own.

        Parameters
        ----------
        entry
            Its `absolute` says where the file is; "" if it has none.
        pixels : (P, H, W, C)
            Of the layer. They are copied into the project if there is no file, or if that reads
            differently, as nothing else could bring them back.

        Raises
        ------
        InputError
            The file is gone and there are no pixels, or nothing can be written.
        """
        with self._lock:
            taken = {known.stem for known in self.manifest.images}
            entry = replace(entry, stem=new_stem(entry.name, taken))
            if pixels is not None and not self._reads_back(entry, pixels):
                path = self._own(_IMAGES, f"{entry.stem}.npy")
                make_folder(path.parent)
                _write_pixels(path, entry.as_layer(pixels))
            else:
                path = Path(entry.absolute)
            entry = entry.moved(path, self.folder)
            self.update(lambda m: replace(m, images=(*m.images, entry)))
            return entry

    def add_file(self, path: Path) -> ImageEntry:
        """Add an image file, to be annotated later.

        Raises
        ------
        InputError
            It cannot be read.
        """
        planes = read_image(path)
        depth, height, width, channels = planes.shape
        leading = () if depth == 1 else (depth,)
        rgb = channels == 3 and planes.dtype == np.uint8
        if channels == 1:
            shape: tuple[int, ...] = (*leading, height, width)
        else:
            shape = (*leading, height, width, 3) if rgb else (*leading, channels, height, width)
        return self.add(
            ImageEntry(
                stem="",
                name=path.stem,
                path="",
                absolute=str(path.absolute()),
                shape=planes.shape,
                layer_shape=shape,
                rgb=rgb,
                channel_axis=None if rgb or channels == 1 else len(leading),
                dtype=str(planes.dtype),
            )
        )

    def locate(self, stem: str, path: Path) -> None:
        """Take note that an image is at `path` now.

        Raises
        ------
        InputError
            It cannot be read there, or has another size than when it was annotated.
        """
        entry = self.entry(stem).moved(path, self.folder)
        entry.read(self.folder)
        self._replace_entry(entry)

    def annotations(self, stem: str) -> tuple[np.ndarray | None, str]:
        """Return annotations (P, H, W) int32, None if there are none, and what is odd about them.

        Raises
        ------
        InputError
            Neither they nor an older version can be read.
        """
        path = self._own(_ANNOTATIONS, f"{stem}.tif")
        labels, source = read_newest(path, self.entry(stem).shape[:3])
        if labels is None or source == path:
            return labels, ""
        return labels, f"'{path.name}' is damaged; an older version, {source.name}, was opened."

    def keep_annotations(self, stem: str, labels: np.ndarray) -> None:
        """Write annotations (P, H, W), keep an older version, and count the pixels.

        Raises
        ------
        InputError
            They cannot be written.
        """
        with self._lock:
            path = self._own(_ANNOTATIONS, f"{stem}.tif")
            make_folder(path.parent)
            replace_labels(path, labels)
            ids, counts = np.unique(labels[labels > 0], return_counts=True)
            found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
            self._replace_entry(replace(self.entry(stem), counts=found))

    def prediction(self, stem: str) -> np.ndarray | None:
        """Return the model's last prediction (P, H, W) int32 of an image; None if there is none."""
        path = self._own(_PREDICTIONS, f"{stem}.tif")
        return read_labels(path, self.entry(stem).shape[:3]) if path.is_file() else None

    def keep_prediction(self, stem: str, labels: np.ndarray) -> None:
        """Write what the model predicted (P, H, W)."""
        with self._lock:
            path = self._own(_PREDICTIONS, f"{stem}.tif")
            make_folder(path.parent)
            write_labels(path, labels)

    def predicted(self, stem: str) -> bool:
        """Whether there is a prediction of an image."""
        return (self.folder / _PREDICTIONS / f"{stem}.tif").is_file()

    def labelled(self) -> tuple[tuple[str, ...], list[LabelledImage]]:
        """Return stems and contents of the annotated images with as many channels as the first.

        Raises
        ------
        InputError
            No image is annotated, or one cannot be read.
        """
        annotated = [e for e in self.manifest.images if e.counts]
        if not annotated:
            raise InputError(
                f"Nothing is annotated in '{self.folder}' yet; paint strokes in its images first."
            )
        stems, images = [], []
        for entry in annotated:
            if entry.shape[3] == annotated[0].shape[3]:
                labels, _ = self.annotations(entry.stem)
                assert labels is not None
                stems.append(entry.stem)
                images.append(LabelledImage(entry.read(self.folder), labels, name=entry.name))
        return tuple(stems), images

    def rounds(self) -> list[RoundRecord]:
        """Return the history, oldest first; rounds whose record is damaged are left out."""
        found = []
        for number in numbers(self.folder / _ROUNDS):
            try:
                found.append(read_record(self.round_folder(number)))
            except InputError:  # one damaged record must not close the whole project
                continue
        return found

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / _ROUNDS / f"{number:03d}"

    def adapter(self, number: int) -> Adapter:
        """Return the adapter of a round.

        Raises
        ------
        AdapterError
            It is absent or damaged.
        """
        from napari_convlora.adapter_file import Adapter

        return Adapter.load(self.round_folder(number) / ADAPTER)

    def install(self, number: int) -> None:
        """Make a round the one that predicts."""
        self.update(lambda m: replace(m, installed=number))

    def add_round(
        self,
        adapter: Adapter,
        labels: Mapping[str, np.ndarray],
        settings: Settings,
        events: Iterable[Event] = (),
    ) -> RoundRecord:
        """Write a finished round and install it if it is better than the installed one.

        Parameters
        ----------
        adapter
            What it learnt, with its summary.
        labels
            Annotations (P, H, W) it learnt from, by stem, in order.
        settings
            It was run with.
        events
            Of the round, for the history of losses and scores.
        """
        summary = adapter.summary
        verdict = decide(summary)
        installed = self.manifest.installed
        warm = summary.get("start") == "installed"
        with self._lock:
            number = max(numbers(self.folder / _ROUNDS), default=0) + 1
            record = RoundRecord(
                number=number,
                score=summary.get("score"),
                held_out=bool(summary.get("held_out")),
                seconds=float(summary.get("seconds", 0)),
                steps=int(summary.get("steps", 0)),
                ended_by=str(summary.get("ended_by", "")),
                pixels={int(i): n for i, n in summary.get("labelled_pixels", {}).items() if n},
                images=tuple(labels),
                started_from=f"round {installed}" if warm else "base",
                better=verdict.better,
                reason=verdict.reason,
            )
            # Written aside and renamed, so that there never is half a round.
            aside = self._own(_ROUNDS, f".new-{number:03d}")
            shutil.rmtree(aside, ignore_errors=True)
            recipe = Recipe(
                classes=adapter.classes,
                settings=settings,
                images=tuple(self.entry(s).rebased(self.folder, aside) for s in labels),
                start=START if warm else None,
                stop_after=record.steps if record.ended_by == "stopped" else None,
                threads=int(summary.get("threads", 1)),
            )
            make_folder(aside / recipe.labels)
            for stem, array in labels.items():
                write_labels(aside / recipe.labels / f"{stem}.tif", array)
            adapter.save(aside / ADAPTER)
            write_history(aside / HISTORY, events)
            if warm and installed is not None:
                shutil.copyfile(self.round_folder(installed) / ADAPTER, aside / START)
            final = self.round_folder(number)
            recipe.write(aside / RECIPE)
            write_record(aside, record)
            os.replace(aside, final)
            if verdict.better:
                self.install(number)
            return record

    def recipe(self, number: int) -> Recipe:
        """Return what repeats a round."""
        return Recipe.read(self.round_folder(number) / RECIPE)

    def export_recipe(self, number: int, path: Path) -> None:
        """Write what repeats a round to `path`, with its annotations in a folder beside it.

        Raises
        ------
        InputError
            The round's files cannot be read, or nothing can be written there.
        """
        recipe, source = self.recipe(number), self.round_folder(number)
        beside = path.parent / f"{path.stem}_annotations"
        make_folder(beside)
        for entry, labels in self.round_labels(number):
            write_labels(beside / f"{entry.stem}.tif", labels)
        if recipe.start is not None:
            start = f"{path.stem}_{START}"
            shutil.copyfile(source / recipe.start, path.parent / start)
            recipe = replace(recipe, start=start)
        images = tuple(e.rebased(source, path.parent) for e in recipe.images)
        replace(recipe, images=images, labels=beside.name).write(path)

    def round_labels(self, number: int) -> list[tuple[ImageEntry, np.ndarray]]:
        """Return the images a round learnt from, in order, with annotations (P, H, W) int32."""
        recipe, folder = self.recipe(number), self.round_folder(number)
        return [
            (entry, read_labels(folder / recipe.labels / f"{entry.stem}.tif", entry.shape[:3]))
            for entry in recipe.images
        ]

    def keep_round_prediction(self, number: int, stem: str, labels: np.ndarray) -> None:
        """Write what a round's model predicted (P, H, W), for its correction score."""
        with self._lock:
            path = self._own(_ROUNDS, f"{number:03d}", _PREDICTIONS, f"{stem}.tif")
            make_folder(path.parent)
            write_labels(path, labels)

    def corrections(self, number: int) -> Correction:
        """Score a round's predictions against what was painted since it was made."""
        folder = self.round_folder(number)
        predicted: list[np.ndarray] = []
        before: list[np.ndarray] = []
        now: list[np.ndarray] = []
        for path in sorted((folder / _PREDICTIONS).glob("*.tif")):
            shape = self.entry(path.stem).shape[:3]
            today, _ = self.annotations(path.stem)
            if today is not None:
                learnt = folder / _ANNOTATIONS / path.name
                old = read_labels(learnt, shape) if learnt.is_file() else np.zeros_like(today)
                for parts, array in (
                    (predicted, read_labels(path, shape)),
                    (before, old),
                    (now, today),
                ):
                    parts.append(array.ravel())
        if not now:
            return Correction(0, float("nan"), float("nan"))
        return correction(*map(np.concatenate, (predicted, before, now)))

    def _replace_entry(self, entry: ImageEntry) -> None:
        self.update(
            lambda m: replace(
                m, images=tuple(entry if e.stem == entry.stem else e for e in m.images)
            )
        )

    def _own(self, *parts: str) -> Path:
        """Return a path to write to, which a link in a stranger's project must not lead away."""
        path = self.folder.joinpath(*parts)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(
                f"'{path}' is a link that leads out of the project; remove it and save again."
            )
        return path

    def _reads_back(self, entry: ImageEntry, pixels: np.ndarray) -> bool:
        try:
            return bool(entry.absolute) and np.array_equal(
                entry.moved(Path(entry.absolute), self.folder).read(self.folder), pixels
            )
        except InputError:
            return False


def _write_pixels(path: Path, pixels: np.ndarray) -> None:
    from napari_convlora.files import atomic_write

    with atomic_write(path) as file:
        np.save(file, pixels, allow_pickle=False)
