"""What the commands do; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from napari_convlora.config import ClassInfo, TrainConfig
from napari_convlora.errors import ConvLoRAError, InputError

if TYPE_CHECKING:
    from napari_convlora.labels import importing

DONE, FAILED = 0, 1

# No markup: a file may be called "[red]cells.tif".
out = Console(soft_wrap=True, markup=False)
err = Console(stderr=True, soft_wrap=True, markup=False)


class _TimeLeft(TimeRemainingColumn):
    """The time left that a round tells; else what the pace until now would take."""

    def render(self, task: Task) -> Text:
        """Return the words of a task."""
        from napari_convlora.events import duration_text

        left = task.fields["left"]
        return super().render(task) if left is None else Text(f"about {duration_text(left)} left")


@contextmanager
def _bar(what: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Progress bar on a terminal, silence elsewhere; yields its update function."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        _TimeLeft(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=total, note="", left=None)
        yield lambda **fields: progress.update(task, **fields)


def run_adapt(options: argparse.Namespace) -> int:
    """Run a round on annotated images, or repeat or add one."""
    from napari_convlora.cli import sources
    from napari_convlora.exports import history_csv
    from napari_convlora.files import atomic
    from napari_convlora.formats import opening
    from napari_convlora.labels import importing
    from napari_convlora.labels.around_labels import labelled_parts
    from napari_convlora.labels.classes import default_classes, read_classes
    from napari_convlora.session.session import Session

    by_file = not (options.project or options.recipe)
    _need(
        options, *(("images", "labels") if by_file else ()), *(() if options.project else ("out",))
    )
    files_given = ("images", "labels", "classes", "zero_is_background")
    if options.recipe:
        kept = ("backbone", "method", "preset", "start", "max_steps", "max_minutes", "seed")
        _refuse(options, "recipe", "project", *files_given, *kept)
        _refuse(options, "recipe", "device", "devices", "keep_uncorrected")
    elif options.project:
        _refuse(options, "project", *files_given, "devices")
    elif options.start == "installed" or options.keep_uncorrected is not None:
        options.parser.error(
            "--start installed and --keep-uncorrected go with --project, whose installed round "
            "they mean"
        )
    if not options.project:
        _refuse_without_project(options, "open_anyway", "without_missing")
    written = [path for path in (options.out, options.history) if path is not None]
    read = [*(options.images or ()), *(options.labels or ()), options.classes, options.recipe]
    atomic.check_apart(written, filter(None, read))
    for path in written:
        atomic.check_writable(path)
    if by_file:
        if len(options.images) != len(options.labels):
            options.parser.error(
                f"{len(options.images)} images but {len(options.labels)} label images; "
                "give one each"
            )
        classes = read_classes(options.classes) if options.classes else ()
        plan = _finished(options.labels, classes) if options.zero_is_background else None
        images = []
        for image_path, label_path in zip(options.images, options.labels, strict=True):
            image = opening.open_image(image_path)
            labels = opening.read_labels(label_path, image.shape[:3])
            if plan is not None:
                importing.apply_import(plan, labels, labels)
            images += [part for _, part in labelled_parts(image, labels, image_path.stem)]
        ids = {i for im in images for i in set(_ids(im))} - {0}
        if len(ids) == 1 and plan is None:
            raise InputError(
                f"Only class {ids.pop()} is annotated, as 0 means unlabelled; label a second class "
                "too, or give --zero-is-background if the labels are finished masks."
            )
        classes = (*classes, *plan.classes) if plan else classes or default_classes(ids)
        settings = sources.settings(options)
        session = Session(settings.model, settings.train, settings.backbone)
        if options.devices:
            _share(session, options.devices)
        last, history = _run_round(session, images, classes, [options.out])
        if session.team.rank:
            return DONE
        said = str(options.out)
    else:
        last, history, said = sources.adapt_stored(options, _run_round)
    if options.out:
        try:
            last.adapter.save(options.out)
        except InputError as error:
            raise atomic.rescued(error, options.out, last.adapter.save) from error
    if options.history:
        history_csv.write_history(options.history, history)
    summary = last.adapter.summary
    out.print(
        f"{said}: {len(last.adapter.classes)} classes, {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s, ended by {last.reason}{_score_text(summary)}.",
        highlight=False,
        markup=False,
    )
    # What follows in a script must not take an interrupted round for a whole one.
    return FAILED if last.reason == "stopped" and not options.recipe else DONE


def _share(session: Any, n_devices: int) -> None:
    """Train `session` on several devices; all processes but the first keep quiet."""
    from napari_convlora.training import several_devices

    team = session.team = several_devices.launch(n_devices, session.train_config.device)
    out.quiet = err.quiet = team.rank > 0
    before = session.train_config
    config = session.train_config = several_devices.enlarge_batches(before, n_devices)
    if config != before:
        err.print(f"Batches have {n_devices} views at least, one for each device.")


def _need(options: argparse.Namespace, *names: str) -> None:
    missing = [name for name in names if getattr(options, name) is None]
    if missing:
        listed = ", ".join(map(_flag, missing))
        options.parser.error(f"the following arguments are required: {listed}")


def _refuse(options: argparse.Namespace, what: str, *names: str) -> None:
    given = [_flag(name) for name in names if getattr(options, name) is not None]
    if given:
        options.parser.error(f"{given[0]} does not go with --{what}; leave one of them out")


def _refuse_without_project(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            options.parser.error(f"{_flag(name)} goes with --project; leave it out")


def _flag(name: str) -> str:
    return name if name == "adapter" else f"--{name.replace('_', '-')}"


def _run_round(
    session: Any,
    images: Sequence[Any],
    classes: Sequence[ClassInfo],
    places: Sequence[Path],
    stop_after: int | None = None,
) -> tuple[Any, list[Any]]:
    """Run a round, until a step if one is given; returns its `Finished` and all its events.

    It is refused unless its adapter fits where it will be written: `places`.
    """
    from napari_convlora import events
    from napari_convlora.control import RunControl
    from napari_convlora.files import atomic

    control = RunControl()
    history: list[events.Event] = []
    with _bar("adapting", session.train_config.max_steps) as update, _interrupt(control.stop):
        for event in session.run_round(images, classes, control):
            history.append(event)
            if isinstance(event, events.Started):
                for place in places:
                    atomic.check_space(place, event.nbytes)
            elif isinstance(event, events.Step):
                loss = f"loss {event.loss:.3f}"
                update(completed=event.step, note=loss, left=event.seconds_left)
                if event.step == stop_after:
                    control.stop()
            elif isinstance(event, events.Planned | events.Adjusted):
                err.print(str(event), highlight=False)
    last = history[-1]
    if isinstance(last, events.Failed):
        raise ConvLoRAError(last.message)
    assert isinstance(last, events.Finished)
    if control.stopping and not last.adapter.summary["steps"]:
        raise ConvLoRAError("Stopped before the first step; nothing was written.")
    return last, history


def _finished(paths: Sequence[Path], classes: Sequence[ClassInfo]) -> importing.ImportPlan:
    """Return what becomes of the values of finished masks, whose 0 is the background."""
    from napari_convlora.formats import opening
    from napari_convlora.labels import importing

    values = {
        value for path in paths for value in importing.count_values(opening.read_labels(path))
    }
    seen = importing.Survey(dict.fromkeys(sorted(values), 0))
    names = {info.id: info.name for info in classes}
    meaning = importing.propose_meaning(seen, classes, names, finished=True, one_class=False)
    return importing.plan_import(seen.counts, meaning, classes)


def _ids(image: Any) -> Iterator[int]:
    import numpy as np

    return map(int, np.unique(image.annotations))


def _score_text(summary: dict[str, Any]) -> str:
    if summary["score"] is None:
        return ""
    kind = "held-out" if summary["held_out"] else "training"
    return f", mean IoU {summary['score']:.3f} on {kind} labels"


@contextmanager
def _interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C end the work in good order, and a second one break it off."""

    def first(*_: object) -> None:
        stop()
        signal.signal(signal.SIGINT, previous)
        err.print("Stopping in good order; press Ctrl-C again to break off.")

    previous = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def run_predict(options: argparse.Namespace) -> int:
    """Predict images into a folder."""
    from contextlib import ExitStack

    from napari_convlora.cli import sources
    from napari_convlora.control import RunControl
    from napari_convlora.devices import choose_device
    from napari_convlora.exports.masks import CLASSES_FILE
    from napari_convlora.files import atomic
    from napari_convlora.model.iteration import Returning
    from napari_convlora.session.session import Session

    _need(options, *(() if options.project else ("adapter", "images", "out")))
    if options.project:
        _refuse(options, "project", "adapter", "images")
    else:
        _refuse_without_project(options, "open_anyway")
    if options.probabilities and not options.out:
        options.parser.error("--probabilities needs --out, the folder they are written to")
    if options.project and (options.scheduler or options.format == "zarr"):
        options.parser.error("--scheduler and --format zarr go with --images, not with --project")
    stems = [path.stem for path in options.images or ()]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        options.parser.error(f"several images are called {twice[0]!r}; predict them separately")
    session = Session(train_config=TrainConfig(device=options.device or TrainConfig().device))
    failed, own = 0, list[str]()
    control = RunControl()
    if not options.scheduler:
        choose_device(session.train_config.device)  # or every image would tell what is wrong
    with ExitStack() as stack:
        adapter, backbone, tasks = stack.enter_context(sources.to_predict(options))
        session.install(adapter)
        session.backbone_name = options.backbone or backbone
        if not options.scheduler:
            session.backbone()
        if options.out:
            atomic.make_folder(options.out)
        update = stack.enter_context(_bar("predicting", len(tasks)))
        stack.enter_context(_interrupt(control.stop))
        for number, task in enumerate(tasks):
            update(completed=number, note=task.name)
            try:
                steps = Returning(task.run(session, control))
                for step in steps:
                    update(completed=number + step.done / step.total)
                if steps.value is not None and steps.value.name != CLASSES_FILE:
                    own.append(steps.value.name)
            except (InputError, OSError) as error:
                failed += 1
                said = error if isinstance(error, InputError) else _failed(error)
                err.print(f"{task.name}: {said}", style="red", markup=False, highlight=False)
            if control.stopping:
                break
    where = options.out or options.project
    if control.stopping:
        raise ConvLoRAError(
            f"Stopped; masks finished so far are in {where}, and of a large image the same "
            "command goes on where it was."
        )
    out.print(f"{len(tasks) - failed} of {len(tasks)} images predicted into {where}.")
    if own:
        more = f" and {len(own) - 1} more like it" if len(own) > 1 else ""
        out.print(
            f"The classes of these masks are in {own[0]}{more}, which counts before the "
            f"{CLASSES_FILE} there; that one is kept for the other masks.",
            highlight=False,
        )
    return FAILED if failed else DONE


def _failed(error: OSError) -> str:
    where = f"'{error.filename}'" if error.filename else "A file"
    reason = error.strerror or error
    return f"{where} cannot be read or written ({reason}); check it and run the same command again."


def run_evaluate(options: argparse.Namespace) -> int:
    """Score masks against truth."""
    from napari_convlora.evaluation.folders import evaluate_folders
    from napari_convlora.files.atomic import atomic_write
    from napari_convlora.formats.plain import READABLE_SUFFIXES

    if options.json and options.json.suffix.lower() in READABLE_SUFFIXES:
        options.parser.error("--json writes JSON, not an image; call it scores.json")
    result = evaluate_folders(options.predictions, options.labels, options.ignore)
    table = Table("", "IoU", "Dice")
    for i, iou in result.scores.iou.items():
        table.add_row(f"class {i}", f"{iou:.4f}", f"{result.scores.dice[i]:.4f}")
    table.add_row(
        "mean", f"{result.scores.mean_iou:.4f}", f"{result.scores.mean_dice:.4f}", style="bold"
    )
    for stem, own in result.images.items():
        table.add_row(stem, f"{own.mean_iou:.4f}", f"{own.mean_dice:.4f}", style="dim")
    out.print(table)
    if options.json:
        with atomic_write(options.json) as file:
            file.write(json.dumps(result.as_dict(), indent=2).encode() + b"\n")
    return DONE


def weights_list(options: argparse.Namespace) -> int:
    """List backbones, with licence and size."""
    from napari_convlora.backbones import REGISTRY, available_backbones

    table = Table("name", "size", "licence", "where", "note")
    for name, path in available_backbones().items():
        spec = REGISTRY[name]
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "unknown"
        table.add_row(name, size, spec.licence, str(path or "not here"), spec.note)
    out.print(table)
    return DONE


def weights_fetch(options: argparse.Namespace) -> int:
    """Download checkpoints."""
    from napari_convlora.backbones import REGISTRY, fetch

    spec = REGISTRY.get(options.name)
    if spec is not None:
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "size unknown"
        source = spec.url or "not downloaded, see the note of `weights list`"
        err.print(f"{spec.title}: {size}, licence {spec.licence}, {source}", highlight=False)
    with _bar(options.name, None) as update:
        path = fetch(options.name, lambda done, total: update(completed=done, total=total))
    out.print(str(path), highlight=False, markup=False)
    return DONE


def weights_path(options: argparse.Namespace) -> int:
    """Say where checkpoints lie."""
    from napari_convlora.backbones import checkpoint_path

    out.print(str(checkpoint_path(options.name)), highlight=False, markup=False)
    return DONE


def run_doctor(options: argparse.Namespace) -> int:
    """Say what this machine offers."""
    from napari_convlora.cli.doctor import report

    table = Table("what", "found", show_lines=False)
    findings = report()
    for finding in findings:
        table.add_row(finding.what, finding.found, style="" if finding.ok else "yellow")
    out.print(table)
    for finding in findings:
        if not finding.ok:
            out.print(f"- {finding.what}: {finding.remedy}", highlight=False, markup=False)
    return DONE


def run_demo_command(options: argparse.Namespace) -> int:
    """Run the loop on a sample image."""
    from napari_convlora.widget.demo import run_demo

    return run_demo(options.out, headless=options.headless)
