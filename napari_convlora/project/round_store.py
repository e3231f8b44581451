"""Rounds of a project on disk: record, adapter, annotations and predictions of each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from napari_convlora.errors import InputError
from napari_convlora.evaluation.gate import Correction, correction, decide
from napari_convlora.exports.history_csv import write_history
from napari_convlora.files.atomic import atomic_write, check_no_device, make_folder
from napari_convlora.files.checked_json import build, read_json, write_checked_json
from napari_convlora.formats.opening import read_labels
from napari_convlora.labels.annotations import known_only
from napari_convlora.labels.reviewed import Outlines
from napari_convlora.project.image_entry import ImageEntry
from napari_convlora.project.label_files import write_label_file
from napari_convlora.project.labelled_folder import LabelledFolder
from napari_convlora.project.layout import (
    ADAPTER,
    ANNOTATIONS,
    HISTORY,
    PREDICTIONS,
    RECIPE,
    RECORD,
    ROUNDS,
    START,
    check_plain,
    inside,
)
from napari_convlora.project.manifest import Settings
from napari_convlora.project.recipe import Recipe

if TYPE_CHECKING:
    from napari_convlora.events import Event
    from napari_convlora.model.adapter import Adapter

FORMAT = 1


class NotInstalledError(InputError):
    """A round is in the project, but could not be made the one that predicts."""


@dataclass(frozen=True)
class RoundRecord:
    """One row of the history.

    Parameters
    ----------
    number
        From 1.
    score, held_out
        Mean IoU in [0, 1], on held-out or on training labels; None where nothing was scored.
    seconds, steps, ended_by
        How long it took, and why it ended.
    pixels
        Labelled pixels by class id.
    images
        Stems of the images it learnt from, in order.
    started_from
        ``base``, or the round it went on from.
    better, reason
        What the better-or-keep gate said.
    when
        Seconds since 1970.
    """

    number: int
    score: float | None
    held_out: bool
    seconds: float
    steps: int
    ended_by: str
    pixels: dict[int, int]
    images: tuple[str, ...]
    started_from: str = "base"
    better: bool = True
    reason: str = ""
    when: float = field(default_factory=time.time)


def write_record(folder: Path, record: RoundRecord) -> None:
    """Write the record of a round into its folder."""
    write_checked_json(folder / RECORD, {"format": FORMAT, **asdict(record)})


def read_record(folder: Path) -> RoundRecord:
    """Read the record in a round's folder.

    Raises
    ------
    InputError
        It is absent, damaged or of a newer format.
    """
    path = inside(folder, RECORD)
    data = read_json(path, FORMAT)
    try:
        return build(RoundRecord, data)
    except (TypeError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({error}); restore a copy.") from error


def _origin(number: int | None) -> str:
    return "a loaded adapter" if number is None else f"round {number}"


def _copy(source: Path, target: Path) -> None:
    check_no_device(source)
    with atomic_write(target) as file:
        file.write(source.read_bytes())


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the rounds in a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and len(p.name) < 7)


class Rounds:
    """The rounds of a project.

    Parameters
    ----------
    project
        Whose rounds they are.
    """

    def __init__(self, project: LabelledFolder) -> None:
        self._project = project
        self._late: list[tuple[Adapter, RoundRecord]] = []  # written, but not installed yet

    def records(self) -> list[RoundRecord]:
        """Return the history, oldest first; rounds whose record is damaged are left out."""
        found = []
        for number in self._numbers():
            try:
                found.append(read_record(self.folder(number)))
            except InputError:  # one damaged record must not close the whole project
                continue
        return found

    def _numbers(self) -> list[int]:
        return numbers(self._project.own(ROUNDS))

    def folder(self, number: int) -> Path:
        """Return the folder of a round; see `inside`."""
        return self._project.own(ROUNDS, f"{number:03d}")

    def file(self, number: int, *parts: str) -> Path:
        """Return the path of a file of a round; see `inside`."""
        return self._project.own(ROUNDS, f"{number:03d}", *parts)

    def adapter(self, number: int) -> Adapter:
        """Return the adapter of a round.

        Raises
        ------
        AdapterError
            It is absent or damaged.
        """
        from napari_convlora.model.adapter import Adapter

        return Adapter.load(self.file(number, ADAPTER))

    def add(
        self,
        adapter: Adapter,
        annotations: Mapping[str, tuple[np.ndarray, Outlines]],
        settings: Settings,
        events: Iterable[Event] = (),
        start: tuple[int | None, Adapter | None] = (None, None),
    ) -> RoundRecord:
        """Write a finished round and install it if it is better than the installed one.

        Of a round that is written already, as there was no room for more, only the rest is done.

        Parameters
        ----------
        adapter
            What it learnt, with its summary.
        annotations
            What was annotated (P, H, W) and reviewed when it began, by stem, in order.
        settings
            It was run with.
        events
            Of the round, for the history of losses and scores.
        start
            Number and adapter of what was installed when it began; the number is None for an
            adapter that is of no round here, and the adapter if nothing was installed.

        Raises
        ------
        NotInstalledError
            It is written, but cannot be installed.
        InputError
            It cannot be written.
        """
        with self._project.lock:
            record = next((r for known, r in self._late if known is adapter), None)
            if record is None:
                record = self._write(adapter, annotations, settings, events, start)
                self._late.append((adapter, record))
            number, installed = record.number, self._project.manifest.installed or 0
            overtaken = number < installed <= self._numbers()[-1]
            if record.better and not overtaken:
                try:
                    self._project.install(number)
                except InputError as error:
                    raise NotInstalledError(
                        f"Round {number} is in the project, but not installed, as "
                        f"{str(error).rstrip('.')}, then install it in the window."
                    ) from error.__cause__
            self._late = [late for late in self._late if late[0] is not adapter]
            return record

    def _write(
        self,
        adapter: Adapter,
        annotations: Mapping[str, tuple[np.ndarray, Outlines]],
        settings: Settings,
        events: Iterable[Event],
        start: tuple[int | None, Adapter | None],
    ) -> RoundRecord:
        """Write a finished round, as a whole or not at all; see `add`."""
        summary = adapter.summary
        verdict = decide(summary)
        warm = summary.get("start") == "installed"
        before, begun = start
        if begun is not None and not warm:  # of what only taught, the recipe needs no more
            begun = begun.detail_alone() if summary.get("hint") else None
        if not summary.get("hint"):  # whatever the reason, it is repeated without
            settings = replace(settings, train=replace(settings.train, keep_uncorrected=False))
        with self._project.lock:
            number = max(self._numbers(), default=0) + 1
            record = RoundRecord(
                number=number,
                score=summary.get("score"),
                held_out=bool(summary.get("held_out")),
                seconds=float(summary.get("seconds", 0)),
                steps=int(summary.get("steps", 0)),
                ended_by=str(summary.get("ended_by", "")),
                pixels={int(i): n for i, n in summary.get("labelled_pixels", {}).items() if n},
                images=tuple(annotations),
                started_from=_origin(before) if warm else "base",
                better=verdict.better,
                reason=verdict.reason,
            )
            # Written aside and renamed, so that there never is half a round.
            aside = self._project.own(ROUNDS, f".new-{number:03d}")
            shutil.rmtree(aside, ignore_errors=True)
            check_plain(aside)  # of what could not be removed
            recipe = Recipe(
                classes=adapter.classes,
                settings=settings,
                images=tuple(
                    self._project.entry(stem).rebased(self._project.folder, aside)
                    for stem in annotations
                ),
                regions=tuple(len(outlines) for _, outlines in annotations.values()),
                start=None if begun is None else START,
                stop_after=record.steps if record.ended_by == "stopped" else None,
                threads=int(summary.get("threads", 1)),
            )
            recipe.write_annotations(aside, [*annotations.values()])
            adapter.save(aside / ADAPTER)
            write_history(aside / HISTORY, events)
            if begun is not None:
                begun.save(aside / START)
            final = self.folder(number)
            recipe.write(aside / RECIPE)
            write_record(aside, record)
            os.replace(aside, final)
            return record

    def recipe(self, number: int) -> Recipe:
        """Return what repeats a round."""
        return Recipe.read(self.file(number, RECIPE))

    def export_recipe(self, number: int, path: Path) -> None:
        """Write what repeats a round to `path`, with its annotations in a folder beside it.

        Raises
        ------
        InputError
            The round's files cannot be read, or nothing can be written there.
        """
        source, there = self.folder(number), path.parent
        recipe = self.recipe(number)
        annotations = recipe.annotations(source)
        recipe = replace(recipe, labels=f"{path.stem}_annotations")
        recipe.write_annotations(there, annotations)
        if recipe.start is not None:
            start = f"{path.stem}_{START}"
            _copy(self.file(number, recipe.start), there / start)
            recipe = replace(recipe, start=start)
        replace(recipe, images=tuple(e.rebased(source, there) for e in recipe.images)).write(path)

    def labels(self, number: int) -> list[tuple[ImageEntry, np.ndarray]]:
        """Return the images a round learnt from, in order, and their labels (P, H, W) int32.

        What was unpainted in reviewed regions is background in them.
        """
        recipe = self.recipe(number)
        return [*zip(recipe.images, recipe.learnt(self.folder(number)), strict=True)]

    def keep_prediction(self, number: int, stem: str, labels: np.ndarray) -> None:
        """Write what a round's model predicted (P, H, W), for its correction score."""
        with self._project.lock:
            path = self.file(number, PREDICTIONS, f"{stem}.tif")
            make_folder(path.parent)
            write_label_file(path, labels)

    def corrections(self, number: int) -> Correction:
        """Score a round's predictions against what was painted since it was made.

        Images whose labels of then or of now are lost are left out.
        """
        learnt_from = read_record(self.folder(number)).images
        predicted: list[np.ndarray] = []
        before: list[np.ndarray] = []
        now: list[np.ndarray] = []
        for entry in sorted(self._project.manifest.images, key=lambda e: e.stem):
            path, shape = self.file(number, PREDICTIONS, f"{entry.stem}.tif"), entry.shape[:3]
            learnt = self.file(number, ANNOTATIONS, path.name)
            known = learnt.is_file() or entry.stem not in learnt_from
            counts = known and path.is_file()
            today = self._project.annotations(entry.stem)[0] if counts else None
            if today is not None:
                old = read_labels(learnt, shape) if learnt.is_file() else np.zeros_like(today)
                classes, merged = self._project.manifest.classes, self._project.manifest.merged
                for parts, array in ((predicted, read_labels(path, shape)), (before, old)):
                    parts.append(known_only(array, classes, merged).ravel())
                now.append(today.ravel())
        if not now:
            return Correction(0, float("nan"), float("nan"))
        return correction(*map(np.concatenate, (predicted, before, now)))
