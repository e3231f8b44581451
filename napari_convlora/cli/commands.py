"""What the commands do; each returns the exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from napari_convlora.cli.console import bar, err, interrupt, out
from napari_convlora.cli.requests import (
    AdaptRequest,
    DemoRequest,
    DoctorRequest,
    EvaluateRequest,
    PredictRequest,
    UsageError,
    WeightsRequest,
)
from napari_convlora.config import CLASSES_FILE, ClassInfo, TrainConfig
from napari_convlora.errors import ConvLoRAError, InputError

if TYPE_CHECKING:
    from napari_convlora.cli.sources import PredictionTask
    from napari_convlora.control import RunControl
    from napari_convlora.session.session import Session

DONE, FAILED = 0, 1


def run_adapt(request: AdaptRequest) -> int:
    """Run a round on annotated images, or repeat or add one."""
    from napari_convlora.cli import sources
    from napari_convlora.exports.history_csv import write_history
    from napari_convlora.files.atomic import check_apart, check_writable, rescued

    written = [path for path in (request.out, request.history) if path is not None]
    read = [*(request.images or ()), *(request.labels or ()), request.classes, request.recipe]
    check_apart(written, filter(None, read))
    for path in written:
        check_writable(path)
    if request.project or request.recipe:
        last, history, sentence = sources.adapt_stored(request, _run_round)
    else:
        session, images, classes = sources.annotated_files(request)
        if request.devices:
            _share(session, request.devices)
        last, history = _run_round(session, images, classes, written[:1])
        if session.team.rank:
            return DONE
        sentence = str(request.out)
    if request.out:
        try:
            last.adapter.save(request.out)
        except InputError as error:
            raise rescued(error, request.out, last.adapter.save) from error
    if request.history:
        write_history(request.history, history)
    summary = last.adapter.summary
    out.print(
        f"{sentence}: {len(last.adapter.classes)} classes, {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s, ended by {last.reason}{_score_text(summary)}.",
        highlight=False,
        markup=False,
    )
    # What follows in a script must not take an interrupted round for a whole one.
    return FAILED if last.reason == "stopped" and not request.recipe else DONE


def _share(session: Any, n_devices: int) -> None:
    """Train `session` on several devices; all processes but the first keep quiet."""
    from napari_convlora.training import several_devices

    team = session.team = several_devices.launch(n_devices, session.train_config.device)
    out.quiet = err.quiet = team.rank > 0
    before = session.train_config
    config = session.train_config = several_devices.enlarge_batches(before, n_devices)
    if config != before:
        err.print(f"Batches have {n_devices} views at least, one for each device.")


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
    with bar("adapting", session.train_config.max_steps) as update, interrupt(control.stop):
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


def _score_text(summary: dict[str, Any]) -> str:
    if summary["score"] is None:
        return ""
    kind = "held-out" if summary["held_out"] else "training"
    return f", mean IoU {summary['score']:.3f} on {kind} labels"


def run_predict(request: PredictRequest) -> int:
    """Predict images into a folder."""
    from contextlib import ExitStack

    from napari_convlora.cli import sources
    from napari_convlora.control import RunControl
    from napari_convlora.devices import choose_device
    from napari_convlora.files.atomic import make_folder
    from napari_convlora.session.session import Session

    session = Session(train_config=TrainConfig(device=request.device or TrainConfig().device))
    control = RunControl()
    if not request.scheduler:
        choose_device(session.train_config.device)  # or every image would tell what is wrong
    with ExitStack() as stack:
        adapter, backbone, tasks = stack.enter_context(sources.to_predict(request))
        session.install(adapter)
        session.backbone_name = request.backbone or backbone
        if not request.scheduler:
            session.backbone()
        if request.out:
            make_folder(request.out)
        update = stack.enter_context(bar("predicting", len(tasks)))
        stack.enter_context(interrupt(control.stop))
        tables, n_failed = _predict_all(tasks, session, control, update)
    where = request.out or request.project
    if control.stopping:
        raise ConvLoRAError(
            f"Stopped; masks finished so far are in {where}, and of a large image the same "
            "command goes on where it was."
        )
    out.print(f"{len(tasks) - n_failed} of {len(tasks)} images predicted into {where}.")
    if tables:
        more = f" and {len(tables) - 1} more like it" if len(tables) > 1 else ""
        out.print(
            f"The classes of these masks are in {tables[0]}{more}, which counts before the "
            f"{CLASSES_FILE} there; that one is kept for the other masks.",
            highlight=False,
        )
    return FAILED if n_failed else DONE


def _predict_all(
    tasks: Sequence[PredictionTask],
    session: Session,
    control: RunControl,
    update: Callable[..., None],
) -> tuple[list[str], int]:
    """Predict images until stopped; return masks' own class tables, and how many images failed."""
    from napari_convlora.model.iteration import Returning

    tables, n_failed = list[str](), 0
    for number, task in enumerate(tasks):
        update(completed=number, note=task.name)
        try:
            steps = Returning(task.run(session, control))
            for step in steps:
                update(completed=number + step.done / step.total)
            if steps.value is not None and steps.value.name != CLASSES_FILE:
                tables.append(steps.value.name)
        except (InputError, OSError) as error:
            n_failed += 1
            reason = error if isinstance(error, InputError) else _failed(error)
            err.print(f"{task.name}: {reason}", style="red", markup=False, highlight=False)
        if control.stopping:
            break
    return tables, n_failed


def _failed(error: OSError) -> str:
    where = f"'{error.filename}'" if error.filename else "A file"
    reason = error.strerror or error
    return f"{where} cannot be read or written ({reason}); check it and run the same command again."


def run_evaluate(request: EvaluateRequest) -> int:
    """Score masks against truth."""
    from napari_convlora.evaluation.folders import evaluate_folders
    from napari_convlora.files.tables import write_json
    from napari_convlora.formats.plain import READABLE_SUFFIXES

    if request.json and request.json.suffix.lower() in READABLE_SUFFIXES:
        raise UsageError("--json writes JSON, not an image; call it scores.json")
    result = evaluate_folders(request.predictions, request.labels, request.ignore)
    table = Table("", "IoU", "Dice")
    for i, iou in result.scores.iou.items():
        table.add_row(f"class {i}", f"{iou:.4f}", f"{result.scores.dice[i]:.4f}")
    table.add_row(
        "mean", f"{result.scores.mean_iou:.4f}", f"{result.scores.mean_dice:.4f}", style="bold"
    )
    for stem, own in result.images.items():
        table.add_row(stem, f"{own.mean_iou:.4f}", f"{own.mean_dice:.4f}", style="dim")
    out.print(table)
    if request.json:
        write_json(request.json, result.as_dict())
    return DONE


def weights_list(request: WeightsRequest) -> int:
    """List backbones, with licence and size."""
    from napari_convlora.backbones import REGISTRY, available_backbones

    table = Table("name", "size", "licence", "where", "note")
    for name, path in available_backbones().items():
        spec = REGISTRY[name]
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "unknown"
        table.add_row(name, size, spec.licence, str(path or "not here"), spec.note)
    out.print(table)
    return DONE


def weights_fetch(request: WeightsRequest) -> int:
    """Download checkpoints."""
    from napari_convlora.backbones import REGISTRY, fetch

    spec = REGISTRY.get(request.name)
    if spec is not None:
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "size unknown"
        source = spec.url or "not downloaded, see the note of `weights list`"
        err.print(f"{spec.title}: {size}, licence {spec.licence}, {source}", highlight=False)
    with bar(request.name, None) as update:
        path = fetch(request.name, lambda done, total: update(completed=done, total=total))
    out.print(str(path), highlight=False, markup=False)
    return DONE


def weights_path(request: WeightsRequest) -> int:
    """Say where checkpoints lie."""
    from napari_convlora.backbones import checkpoint_path

    out.print(str(checkpoint_path(request.name)), highlight=False, markup=False)
    return DONE


def run_doctor(request: DoctorRequest) -> int:
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


def run_demo_command(request: DemoRequest) -> int:
    """Run the loop on a sample image."""
    from napari_convlora.widget.demo import run_demo

    return run_demo(request.out, headless=request.headless)
