"""Few strokes, rounds of corrections: Conv-LoRA and its peers from the same first strokes."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from napari_convlora import __version__
from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.benchmark.annotator import correct, first_strokes
from napari_convlora.benchmark.baselines import Predict, forest, unet
from napari_convlora.benchmark.records import PEERS, PLAIN, Key, RoundResult, Run, RunSettings
from napari_convlora.benchmark.sets import ImageSet, Sample, open_set, read_sample
from napari_convlora.config import MethodName, ModelConfig
from napari_convlora.devices import choose_device
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.evaluation.metrics import Scores, confusion, scores
from napari_convlora.events import Failed, Finished, Preview
from napari_convlora.labels.annotations import LabelledImage, protect
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction.predict import predict
from napari_convlora.training import adapt

_NEAR = 0.02
_UNET_SECONDS = 60.0
"""The U-Net's time for a round where none of our methods has run from the same strokes."""

Learn = Callable[[Sequence[LabelledImage], int], Generator[Preview, None, Predict]]
"""Learns from annotated images in round 0, 1, ...; our methods yield their previews."""


@dataclass(frozen=True)
class Job:
    """One run that is to be made.

    Parameters
    ----------
    key
        Which one.
    folder
        Of the image set.
    settings
        Shared by all runs.
    unet_seconds
        Time the U-Net gets, by round.
    """

    key: Key
    folder: Path
    settings: RunSettings
    unet_seconds: tuple[float, ...] = ()


def run_jobs(
    jobs: Sequence[Job], done: Sequence[Run], runner: Callable[[Job], Run]
) -> Iterator[Run]:
    """Run what is not done yet, one at a time.

    Parameters
    ----------
    jobs
        In the order of execution; a U-Net should come after our methods, as it gets their time.
    done
        Earlier runs; those that failed are repeated.
    runner
        `in_child`, or `run_job` itself.

    Yields
    ------
    Run
        Also for a run that failed, as one failure must not end a long benchmark.
    """
    finished = [run for run in done if run.failed is None]
    for job in jobs:
        if any(run.key == job.key for run in finished):
            continue
        try:
            run = runner(replace(job, unet_seconds=_longest(finished, job.key)))
            finished.append(run)
        except ConvLoRAError as error:
            run = Run(job.key, failed=str(error))
        except Exception as error:
            run = Run(job.key, failed=f"{type(error).__name__}: {error}")
        yield run


def _longest(runs: Sequence[Run], key: Key) -> tuple[float, ...]:
    """Seconds the slowest of our methods took from the same first strokes, by round."""
    ours = [
        [own.learn_seconds for own in run.rounds]
        for run in runs
        if replace(run.key, system=key.system) == key and run.key.system not in PEERS
    ]
    return tuple(map(max, zip(*ours, strict=True)))


def in_child(job: Job) -> Run:
    """Run a job in a process of its own, so that the peak of memory is its own.

    Raises
    ------
    ConvLoRAError
        As `run_job`, and when the process ends without a word, as it does when it is killed.
    """
    spawn = get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_send_run, args=(sender, job), daemon=True)
    child.start()
    sender.close()  # the child's end is the only one, so that its death is seen
    try:
        outcome = receiver.recv()
    except EOFError:
        child.join()
        raise ConvLoRAError(
            f"The run was killed (exit code {child.exitcode}), perhaps for lack of memory; "
            "repeat it with a smaller backbone or with fewer programs running."
        ) from None
    child.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _send_run(sender: Connection, job: Job) -> None:
    try:
        sender.send(run_job(job))
    except Exception as error:
        sender.send(error)


def run_job(job: Job, load: Callable[[str], Backbone] = load_backbone) -> Run:
    """Paint, learn and predict, round by round.

    Parameters
    ----------
    job
        Set, task, system, seed and settings.
    load
        Loads the backbone by name.

    Raises
    ------
    ConvLoRAError
        The set or the settings cannot be used, or a round failed.
    """
    source = open_set(job.folder)
    n_classes = len(source.classes)
    known, scored = _samples(source, job)
    start = time.monotonic()
    learn = _learner(job, n_classes, load)
    load_seconds = time.monotonic() - start
    whole = job.key.task == "unseen" and not job.settings.strokes
    images, strokes = _first_annotations(known, job.key.seed, whole)
    rounds: list[RoundResult] = []
    n_rounds = 1 if whole else job.settings.rounds
    for number in range(n_rounds):
        start = time.monotonic()
        steps = Returning(learn(images, number))
        previews = [(time.monotonic() - start, preview) for preview in steps]
        learn_seconds = time.monotonic() - start
        found = {sample.stem: steps.value(sample.image) for sample in scored}
        seconds = time.monotonic() - start - learn_seconds
        rounds.append(
            _round(images, strokes, scored, found, previews, (learn_seconds, seconds), n_classes)
        )
        if number + 1 < n_rounds:
            images, more = _corrected(images, known, found, steps.value, job, number + 1)
            strokes += more
    return Run(
        key=job.key,
        classes=source.classes,
        rounds=rounds,
        load_seconds=round(load_seconds, 2),
        peak_bytes=_peak_bytes(),
        environment={
            "napari-convlora": __version__,
            "torch": torch.__version__,
            "device": str(choose_device(job.settings.train.device)),
            "threads": str(torch.get_num_threads()),
            "machine": f"{platform.system()} {platform.machine()}",
        },
    )


def _samples(source: ImageSet, job: Job) -> tuple[list[Sample], list[Sample]]:
    """Read the images to annotate and those to score; another seed annotates other images."""
    settings, seed = job.settings, job.key.seed

    def read(stem: str) -> Sample:
        return read_sample(source, stem, settings.crop)

    if job.key.task == "unseen":
        first = seed * settings.images % len(source.train)
        stems = (source.train[first:] + source.train[:first])[: settings.images]
        return list(map(read, stems)), list(map(read, source.test[: settings.test_images]))
    first = seed % len(source.train)
    for stem in source.train[first:] + source.train[:first]:
        sample = read(stem)
        if len(np.unique(sample.truth[sample.truth > 0])) > 1:
            return [sample], [sample]
    raise InputError(f"No training image of '{source.name}' shows two classes; leave the set out.")


def _learner(job: Job, n_classes: int, load: Callable[[str], Backbone]) -> Learn:
    """Set up a system; what it keeps between rounds lives here."""
    name, seed, settings = job.key.system, job.key.seed, job.settings
    config = replace(settings.train, seed=seed)
    if job.key.task == "unseen":  # what is shown is an annotated image, and not scored
        config = replace(config, preview_seconds=None)
    if name in PEERS:

        def fit(images: Sequence[LabelledImage], number: int) -> Predict:
            if name == "forest":
                return forest(images, seed)
            seconds = [*job.unet_seconds, *[_UNET_SECONDS] * settings.rounds][number]
            return unet(images, seed, seconds, config.device)

        def learn(
            images: Sequence[LabelledImage], number: int
        ) -> Generator[Preview, None, Predict]:
            yield from ()
            return fit(images, number)

        return learn

    backbone, cache = load(settings.backbone), FeatureCache()
    method = cast(MethodName, name.removeprefix(PLAIN))
    model_config = ModelConfig(method=method)
    if name == "detail":
        model_config = ModelConfig(method="decoder_only")
        config = replace(config, max_steps=0)
    elif name != method:
        model_config = replace(model_config, detail=False, plain_start=True)
        config = replace(config, decoder_share=0.0)

    before: Adapter | None = None

    def adapt_round(
        images: Sequence[LabelledImage], number: int
    ) -> Generator[Preview, None, Predict]:
        nonlocal before
        classes = default_classes(n_classes)
        for event in adapt(
            backbone, images, classes, model_config, config, cache=cache, before=before
        ):
            if isinstance(event, Preview):
                yield event
        if isinstance(event, Failed):
            raise ConvLoRAError(event.message)
        assert isinstance(event, Finished)
        adapter = before = event.adapter

        def labels(image: np.ndarray) -> np.ndarray:
            steps = Returning(predict(adapter, backbone, image, device=config.device, cache=cache))
            for _ in steps:
                pass
            assert steps.value is not None
            return steps.value.labels

        return labels

    return adapt_round


def _first_annotations(
    known: Sequence[Sample], seed: int, whole: bool
) -> tuple[list[LabelledImage], int]:
    """Annotate images as a whole or by first strokes; returns them and the number of strokes."""
    if whole:
        return [LabelledImage(s.image, s.truth, name=s.stem) for s in known], 0
    painted = [first_strokes(s.truth[0], _seed(seed, i, 0)) for i, s in enumerate(known)]
    images = [
        LabelledImage(s.image, annotations[None], name=s.stem)
        for s, (annotations, _) in zip(known, painted, strict=True)
    ]
    return images, sum(strokes for _, strokes in painted)


def _corrected(
    images: Sequence[LabelledImage],
    known: Sequence[Sample],
    found: Mapping[str, np.ndarray],
    model: Predict,
    job: Job,
    number: int,
) -> tuple[list[LabelledImage], int]:
    """Add the strokes of round `number`; returns the images and how many strokes were added."""
    settings, total = job.settings, 0
    corrected = []
    for i, (image, sample) in enumerate(zip(images, known, strict=True)):
        prediction = found[sample.stem] if sample.stem in found else model(sample.image)
        annotations, strokes = correct(
            sample.truth[0],
            prediction[0],
            image.annotations[0],
            settings.corrections,
            settings.max_share,
            _seed(job.key.seed, i, number),
        )
        corrected.append(replace(image, annotations=annotations[None]))
        total += strokes
    return corrected, total


def _seed(seed: int, image: int, number: int) -> int:
    """Seed of the strokes on one image in one round, the same for all systems."""
    return int(np.random.SeedSequence((seed, image, number)).generate_state(1)[0])


def _round(
    images: Sequence[LabelledImage],
    strokes: int,
    scored: Sequence[Sample],
    found: Mapping[str, np.ndarray],
    previews: Sequence[tuple[float, Preview]],
    seconds: tuple[float, float],
    n_classes: int,
) -> RoundResult:
    """Score a round. On an annotated image the strokes stand, as they do for a person."""
    annotated = {image.name: image.annotations for image in images}
    learn_seconds, predict_seconds = seconds

    def count(labels: np.ndarray, sample: Sample) -> np.ndarray:
        painted = annotated.get(sample.stem, np.zeros_like(sample.truth))
        return confusion(protect(labels, painted), sample.truth, n_classes)

    def score(matrix: np.ndarray) -> Scores:
        return scores(matrix, range(1, n_classes + 1))

    matrices = {sample.stem: count(found[sample.stem], sample) for sample in scored}
    total = score(np.sum(list(matrices.values()), axis=0))
    by_stem = {sample.stem: sample for sample in scored}
    shown: list[tuple[float, str, float | None]] = []
    for when, preview in previews:
        shows = by_stem.get(images[preview.image].name)
        value = None if shows is None else score(count(preview.labels[None], shows)).mean_iou
        shown.append((round(when, 2), preview.stage, value))
    near = None
    if any(value is not None for *_, value in shown):
        enough = total.mean_iou - _NEAR
        near = next(
            (when for when, _, value in shown if value is not None and value >= enough),
            round(learn_seconds + predict_seconds, 2),
        )
    pixels = int(sum(np.count_nonzero(image.annotations) for image in images))
    result: dict[str, Any] = total.as_dict()
    return RoundResult(
        strokes=strokes,
        pixels=pixels,
        share=pixels / sum(image.annotations.size for image in images),
        learn_seconds=round(learn_seconds, 2),
        predict_seconds=round(predict_seconds / len(scored), 2),
        mean_iou=result["mean_iou"],
        iou=result["iou"],
        confusion={stem: matrix.tolist() for stem, matrix in matrices.items()},
        previews=shown,
        near_final_seconds=near,
    )


def _peak_bytes() -> int | None:
    """Return the most memory this process ever held; None on Windows, which does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # On Linux ru_maxrss starts at the peak of the process that forked.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
