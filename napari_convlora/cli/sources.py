"""What ``adapt`` and ``predict`` work on: files, a project or a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from napari_convlora.cli.requests import AdaptRequest, PredictRequest, UsageError
from napari_convlora.config import ClassInfo, listed
from napari_convlora.control import RunControl
from napari_convlora.devices import use_threads
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.events import Event, Finished, Progress
from napari_convlora.exports.masks import save_masks, save_probabilities
from napari_convlora.files.atomic import check_apart, rescued
from napari_convlora.formats.opening import open_image, read_labels
from napari_convlora.images.planes import LazyPlanes, Planes
from napari_convlora.labels import importing
from napari_convlora.labels.annotations import LabelledImage, protect
from napari_convlora.labels.around_labels import labelled_parts
from napari_convlora.labels.classes import default_classes, find_background, read_classes
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


def settings(request: AdaptRequest, base: Settings | None = None) -> Settings:
    """Return `base`, else the defaults, with what the command line gives in its place."""
    base = base or Settings()

    def given(*names: str) -> dict[str, Any]:
        found = {name: getattr(request, name) for name in names}
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


def annotated_files(
    request: AdaptRequest,
) -> tuple[Session, list[LabelledImage], tuple[ClassInfo, ...]]:
    """Return a session with the settings that are asked for, and the images and their classes.

    Raises
    ------
    UsageError
        There are not as many label images as images.
    InputError
        A file cannot be read, or only one class is annotated.
    """
    paths, label_paths = request.images or [], request.labels or []
    if len(paths) != len(label_paths):
        raise UsageError(f"{len(paths)} images but {len(label_paths)} label images; give one each")
    classes = read_classes(request.classes) if request.classes else ()
    plan = _finished_masks(label_paths, classes) if request.zero_is_background else None
    images: list[LabelledImage] = []
    for path, label_path in zip(paths, label_paths, strict=True):
        image = open_image(path)
        labels = read_labels(label_path, image.shape[:3])
        if plan is not None:
            importing.apply_import(plan, labels, labels)
        images += [part for _, part in labelled_parts(image, labels, path.stem)]
    ids = {int(i) for image in images for i in np.unique(image.annotations)} - {0}
    if len(ids) == 1 and plan is None:
        raise InputError(
            f"Only class {ids.pop()} is annotated, as 0 means unlabelled; label a second class "
            "too, or give --zero-is-background if the labels are finished masks."
        )
    classes = (*classes, *plan.classes) if plan else classes or default_classes(ids)
    return _session(settings(request)), images, classes


def _finished_masks(paths: Sequence[Path], classes: Sequence[ClassInfo]) -> importing.ImportPlan:
    """Return what becomes of the values of finished masks, whose 0 is the background."""
    values = {value for path in paths for value in importing.count_values(read_labels(path))}
    seen = importing.Survey(dict.fromkeys(sorted(values), 0))
    names = {info.id: info.name for info in classes}
    meaning = importing.propose_meaning(seen, classes, names, finished=True, one_class=False)
    return importing.plan_import(seen.counts, meaning, classes)


def adapt_stored(request: AdaptRequest, run: RunRound) -> tuple[Finished, list[Event], str]:
    """Run a round on a project, which it is added to, or repeat that of a recipe.

    Returns
    -------
    tuple
        How it ended, its events, and what to say of it.
    """
    if request.recipe:
        recipe = Recipe.read(request.recipe)
        session = _session(recipe.settings)
        if recipe.start is not None:
            session.install(Adapter.load(inside(request.recipe.parent, recipe.start)))
        with use_threads(recipe.threads):
            images = recipe.labelled(request.recipe.parent)
            last, history = run(session, images, recipe.classes, [request.out], recipe.stop_after)
            return last, history, str(request.out)
    assert request.project is not None  # the request saw to it
    with closing(_open(request.project, request.open_anyway)) as project:
        chosen = settings(request, project.manifest.settings)
        try:
            stems, images = project.labelled(without_missing=bool(request.without_missing))
        except LostLabelsError as error:
            if request.without_missing:
                raise
            raise InputError(f"{str(error).rstrip('.')}, or give --without-missing.") from error
        painted = {stem: project.annotated(stem) for stem in stems}
        session = _session(chosen)
        restore(project, session)
        start = project.manifest.installed, session.installed
        places = [project.folder, *([request.out] if request.out else [])]
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


def _open(folder: Path, anyway: bool | None) -> Project:
    try:
        return Project.open(folder, anyway=bool(anyway))
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
def to_predict(request: PredictRequest) -> Iterator[tuple[Adapter, str, list[PredictionTask]]]:
    """Give the adapter, its backbone's name or path, and the images to predict.

    Predictions of a project are kept in it, and with annotations on top in ``--out`` if given.

    Raises
    ------
    InputError
        No round of the project is installed.
    """
    if request.project is None:
        assert request.adapter is not None  # the request saw to it
        assert request.images is not None
        adapter = Adapter.load(request.adapter)
        _spare(request, [path.stem for path in request.images], request.images)
        tasks = [_of_file(path, request.adapter, adapter, request) for path in request.images]
        yield adapter, adapter.backbone_name, tasks
        return
    with closing(_open(request.project, request.open_anyway)) as project:
        number = project.manifest.installed
        if number is None:
            raise InputError(
                f"No round is installed in '{project.folder}'; run "
                f"`napari-convlora adapt --project {project.folder}` first."
            )
        entries = project.manifest.images
        places = [place for entry in entries for place in entry.places(project.folder)]
        _spare(request, [entry.stem for entry in entries], places)
        images = [_of_project(entry, project, request) for entry in entries]
        backbone = project.rounds.recipe(number).settings.backbone
        yield project.rounds.adapter(number), backbone, images


def _spare(request: PredictRequest, stems: Sequence[str], sources: Sequence[Path]) -> None:
    """Raise an `InputError` if a mask would replace an image."""
    if request.out is not None:
        endings = [f".{request.format}", *([_PROBABILITIES] if request.probabilities else [])]
        check_apart((request.out / f"{s}{ending}" for s in stems for ending in endings), sources)


def _of_file(
    path: Path, adapter_path: Path, adapter: Adapter, request: PredictRequest
) -> PredictionTask:
    folder = request.out
    assert folder is not None  # the request saw to it

    def run(session: Session, control: RunControl) -> Generator[Progress, None, Path | None]:
        image = open_image(path)
        if request.scheduler or request.format == "zarr" or isinstance(image, LazyPlanes):
            if request.probabilities:
                raise InputError("--probabilities is for small images; leave it out.")
            task = to_file.task(
                adapter_path, path, session.backbone_name, session.train_config.device
            )
            out = folder / f"{path.stem}.{request.format}"
            backbone = None if request.scheduler else session.backbone()
            return (
                yield from to_file.predict_file(
                    task, adapter, backbone, image, out, control, request.scheduler
                )
            )
        _remark(path.name, adapter, image)
        found = yield from session.predict(image, control, probabilities=request.probabilities)
        if found is None:
            return None
        return _export(found, found.labels, folder / path.stem, adapter.classes)

    return PredictionTask(str(path), run)


def _of_project(entry: ImageEntry, project: Project, request: PredictRequest) -> PredictionTask:
    def run(session: Session, control: RunControl) -> Generator[Progress, None, Path | None]:
        image = entry.read(project.folder)
        _remark(entry.name, session.installed, image)
        found = yield from session.predict(image, control, probabilities=request.probabilities)
        if found is None:
            return None
        project.keep_prediction(entry.stem, found.labels)
        if not request.out:
            return None
        background, labels = find_background(project.manifest.classes), found.labels
        try:
            painted = fill_outlines(*project.annotated(entry.stem), background)
            labels = protect(labels, painted)
        except LostLabelsError as error:
            logger.warning("The mask of '%s' is the prediction alone: %s", entry.name, error)
        return _export(found, labels, request.out / entry.stem, project.manifest.classes)

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
    place: Path,
    classes: tuple[ClassInfo, ...],
) -> Path:
    """Write masks, and probabilities if there are any, at `place` with their endings."""
    table = save_masks(_squeeze(labels), place.with_name(f"{place.name}.tif"), classes)
    if prediction.probabilities is not None:
        path = place.with_name(f"{place.name}{_PROBABILITIES}")
        save_probabilities(_squeeze(prediction.probabilities), path, classes)
    return table


def _squeeze(stack: np.ndarray) -> np.ndarray:
    return stack[0] if len(stack) == 1 else stack


def _session(chosen: Settings) -> Session:
    return Session(chosen.model, chosen.train, chosen.backbone)
