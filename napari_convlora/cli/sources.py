"""What ``adapt`` and ``predict`` work on: files, a project or a recipe."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.config import ClassInfo, listed
from napari_convlora.control import RunControl
from napari_convlora.devices import use_threads
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.events import Event, Finished, Progress
from napari_convlora.exports.masks import save_masks, save_probabilities
from napari_convlora.files.atomic import check_apart, rescued
from napari_convlora.formats.opening import open_image
from napari_convlora.images.planes import LazyPlanes, Planes
from napari_convlora.labels.annotations import protect
from napari_convlora.labels.classes import find_background
from napari_convlora.labels.reviewed import fill_outlines
from napari_convlora.model.adapter import Adapter
from napari_convlora.prediction import to_file
from napari_convlora.prediction.predict import Prediction
from napari_convlora.project import (
    ImageEntry,
    LockedError,
    LostLabelsError,
    Project,
    Recipe,
    Settings,
)
from napari_convlora.project.layout import inside
from napari_convlora.project.round_store import NotInstalledError
from napari_convlora.session.session import Session

logger = logging.getLogger(__name__)
_PROBABILITIES = "_probabilities.tif"
RunRound = Callable[..., tuple[Finished, list[Event]]]
"""Runs a round of a session on images and classes that is written to some places."""


@dataclass(frozen=True)
class PredictionTask:
    """An image to predict: its name, and what predicts it and keeps the result.

    `run` returns where the class table of the masks is; None if it wrote none.
    """

    name: str
    run: Callable[[Session, RunControl], Generator[Progress, None, Path | None]]


def settings(options: argparse.Namespace, base: Settings | None = None) -> Settings:
    """Return `base`, else the defaults, with what the command line gives in its place."""
    base = base or Settings()

    def given(*names: str) -> dict[str, Any]:
        found = {name: getattr(options, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    train = given(
        "preset", "max_steps", "max_minutes", "seed", "device", "start", "keep_uncorrected"
    )
    return replace(
        base,
        model=replace(base.model, **given("method")),
        train=replace(base.train, **train),
        **given("backbone"),
    )


def adapt_stored(options: argparse.Namespace, run: RunRound) -> tuple[Finished, list[Event], str]:
    """Run a round on a project, which it is added to, or repeat that of a recipe.

    Returns
    -------
    tuple
        How it ended, its events, and what to say of it.
    """
    if options.recipe:
        recipe = Recipe.read(options.recipe)
        session = _session(recipe.settings)
        if recipe.start is not None:
            session.install(Adapter.load(inside(options.recipe.parent, recipe.start)))
        with use_threads(recipe.threads):
            images = recipe.labelled(options.recipe.parent)
            last, history = run(session, images, recipe.classes, [options.out], recipe.stop_after)
            return last, history, str(options.out)
    with closing(_open(options)) as project:
        chosen = settings(options, project.manifest.settings)
        try:
            stems, images = project.labelled(without_missing=bool(options.without_missing))
        except LostLabelsError as error:
            if options.without_missing:
                raise
            raise InputError(f"{str(error).rstrip('.')}, or give --without-missing.") from error
        painted = {stem: project.annotated(stem) for stem in stems}
        session = _session(chosen)
        restore(project, session)
        start = project.manifest.installed, session.installed
        places = [project.folder, *([options.out] if options.out else [])]
        last, history = run(session, images, project.manifest.classes, places)
        try:
            record = project.rounds.add(last.adapter, painted, chosen, history, start)
        except NotInstalledError:  # it is where it belongs
            raise
        except (ConvLoRAError, OSError) as error:
            adapter = Path(f"{project.folder.name}.safetensors")
            raise rescued(error, adapter, last.adapter.save, *places[1:]) from error
        names = listed([f"'{project.entry(stem).name}'" for stem in stems])
        return last, history, f"{record.reason}\nLearnt from {names}.\nRound {record.number}"


def _open(options: argparse.Namespace) -> Project:
    try:
        return Project.open(options.project, anyway=bool(options.open_anyway))
    except LockedError as error:
        raise LockedError(f"{str(error).rstrip('.')}, or give --open-anyway.") from error


def restore(project: Project, session: Session) -> None:
    """Install the adapter of a project's installed round, and what that learnt from.

    Raises
    ------
    ConvLoRAError
        The round's files are absent or damaged.
    """
    number = project.manifest.installed
    if number is not None:
        labels = [(entry.name, array) for entry, array in project.rounds.labels(number)]
        session.reinstall(project.rounds.adapter(number), labels)


@contextmanager
def to_predict(options: argparse.Namespace) -> Iterator[tuple[Adapter, str, list[PredictionTask]]]:
    """Give the adapter, its backbone's name or path, and the images to predict.

    Predictions of a project are kept in it, and with annotations on top in ``--out`` if given.

    Raises
    ------
    InputError
        No round of the project is installed.
    """
    if options.project is None:
        adapter = Adapter.load(options.adapter)
        _spare(options, [path.stem for path in options.images], options.images)
        yield (
            adapter,
            adapter.backbone_name,
            [_of_file(p, adapter, options) for p in options.images],
        )
        return
    with closing(_open(options)) as project:
        number = project.manifest.installed
        if number is None:
            raise InputError(
                f"No round is installed in '{project.folder}'; run "
                f"`napari-convlora adapt --project {project.folder}` first."
            )
        entries = project.manifest.images
        places = [place for entry in entries for place in entry.places(project.folder)]
        _spare(options, [entry.stem for entry in entries], places)
        images = [_of_project(entry, project, options) for entry in entries]
        backbone = project.rounds.recipe(number).settings.backbone
        yield project.rounds.adapter(number), backbone, images


def _spare(options: argparse.Namespace, stems: Sequence[str], sources: Sequence[Path]) -> None:
    """Raise an `InputError` if a mask would replace an image."""
    if options.out is not None:
        endings = [f".{options.format}", *([_PROBABILITIES] if options.probabilities else [])]
        check_apart((options.out / f"{s}{ending}" for s in stems for ending in endings), sources)


def _of_file(path: Path, adapter: Adapter, options: argparse.Namespace) -> PredictionTask:
    def run(session: Session, control: RunControl) -> Generator[Progress, None, Path | None]:
        image = open_image(path)
        if options.scheduler or options.format == "zarr" or isinstance(image, LazyPlanes):
            if options.probabilities:
                raise InputError("--probabilities is for small images; leave it out.")
            task = to_file.task(
                options.adapter, path, session.backbone_name, session.train_config.device
            )
            out = options.out / f"{path.stem}.{options.format}"
            backbone = None if options.scheduler else session.backbone()
            return (
                yield from to_file.predict_file(
                    task, adapter, backbone, image, out, control, options.scheduler
                )
            )
        _remark(path.name, adapter, image)
        found = yield from session.predict(image, control, probabilities=options.probabilities)
        if found is None:
            return None
        return _export(found, found.labels, path.stem, adapter.classes, options)

    return PredictionTask(str(path), run)


def _of_project(entry: ImageEntry, project: Project, options: argparse.Namespace) -> PredictionTask:
    def run(session: Session, control: RunControl) -> Generator[Progress, None, Path | None]:
        image = entry.read(project.folder)
        _remark(entry.name, session.installed, image)
        found = yield from session.predict(image, control, probabilities=options.probabilities)
        if found is None:
            return None
        project.keep_prediction(entry.stem, found.labels)
        if not options.out:
            return None
        background, labels = find_background(project.manifest.classes), found.labels
        try:
            painted = fill_outlines(*project.annotated(entry.stem), background)
            labels = protect(labels, painted)
        except LostLabelsError as error:
            logger.warning("The mask of '%s' is the prediction alone: %s", entry.name, error)
        return _export(found, labels, entry.stem, project.manifest.classes, options)

    return PredictionTask(entry.name, run)


def _remark(name: str, adapter: Adapter | None, image: Planes) -> None:
    sentence = ""
    if adapter is not None and isinstance(image, np.ndarray):  # of others hardly a part is read
        sentence = adapter.normalizer.remark(image)
    if sentence:
        logger.warning("%s: %s", name, sentence)


def _export(
    prediction: Prediction,
    labels: np.ndarray,
    stem: str,
    classes: tuple[ClassInfo, ...],
    options: argparse.Namespace,
) -> Path:
    table = save_masks(_squeeze(labels), options.out / f"{stem}.tif", classes)
    if prediction.probabilities is not None:
        path = options.out / f"{stem}{_PROBABILITIES}"
        save_probabilities(_squeeze(prediction.probabilities), path, classes)
    return table


def _squeeze(stack: np.ndarray) -> np.ndarray:
    return stack[0] if len(stack) == 1 else stack


def _session(chosen: Settings) -> Session:
    return Session(chosen.model, chosen.train, chosen.backbone)
