"""The command line: adapt, predict, evaluate, weights, benchmark, doctor and demo."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from napari_convlora.benchmark import commands_interactive, commands_paper
from napari_convlora.config import (
    ClassInfo,
    ConvLoRAError,
    DeviceName,
    InputError,
    MethodName,
    PresetName,
    StartName,
    TrainConfig,
)

# The engine imports torch, which takes seconds: commands import it when they run, not for --help.

DONE, FAILED, BAD_USAGE = 0, 1, 2

_LARGE = (
    "Images of more than 67 megapixels, zarr images, and all with --format zarr or --scheduler, "
    "are read, predicted and written in blocks: memory stays bounded, masks are tiled TIFFs or "
    "OME-Zarrs, and after Ctrl-C or a crash the same command goes on where it was."
)

# No markup: a file may be called "[red]cells.tif".
_out = Console(soft_wrap=True, markup=False)
_err = Console(stderr=True, soft_wrap=True, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when done, 1 when failed, 2 on bad usage."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except SystemExit as stop:  # argparse's own way out: 0 after --help, 2 on bad usage
        return stop.code if isinstance(stop.code, int) else FAILED
    except ConvLoRAError as error:
        _err.print(f"napari-convlora: {error}", style="red", markup=False, highlight=False)
        return FAILED
    except KeyboardInterrupt:
        _err.print("napari-convlora: interrupted.")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("napari-convlora", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[Any], int], help_: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_, epilog=more)
        sub.set_defaults(run=run, parser=sub)
        return sub

    def device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", choices=get_args(DeviceName))

    # Options that are not given are a project's, else the defaults.
    sub = command("adapt", _adapt, "Adapt a backbone to annotated images.")
    sub.add_argument("--images", nargs="+", type=Path, metavar="IMG")
    sub.add_argument(
        "--labels",
        nargs="+",
        type=Path,
        metavar="LAB",
        help="integer images in the order of the images; 0 = unlabelled",
    )
    sub.add_argument("--out", type=Path, metavar="A.safetensors")
    sub.add_argument(
        "--project", type=Path, metavar="DIR", help="add a round on all its images; no --out needed"
    )
    sub.add_argument("--recipe", type=Path, metavar="R.json", help="repeat a round to --out")
    sub.add_argument("--classes", type=Path, metavar="classes.json")
    sub.add_argument("--backbone", metavar="NAME|PATH")
    sub.add_argument("--method", choices=get_args(MethodName))
    sub.add_argument("--preset", choices=get_args(PresetName))
    sub.add_argument("--start", choices=get_args(StartName), help="base, or go on from a project's")
    sub.add_argument("--max-steps", type=_positive(int), metavar="N")
    sub.add_argument("--max-minutes", type=_positive(float), metavar="M")
    sub.add_argument("--seed", type=int, metavar="S")
    sub.add_argument("--history", type=Path, metavar="history.csv", help="loss and score by step")
    device(sub)
    sub.add_argument(
        "--devices", type=_positive(int), metavar="N", help="train on N devices of this machine"
    )

    sub = command("predict", _predict, "Predict images with an adapter.", _LARGE)
    sub.add_argument("adapter", nargs="?", type=Path, metavar="A.safetensors")
    sub.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="IMG",
        help="image files, zarr arrays or OME-Zarr folders",
    )
    sub.add_argument("--out", type=Path, metavar="DIR")
    sub.add_argument(
        "--project",
        type=Path,
        metavar="DIR",
        help="predict all its images with its installed round",
    )
    sub.add_argument(
        "--format", choices=("tif", "zarr"), default="tif", help="masks as TIFF or as OME-Zarr"
    )
    sub.add_argument(
        "--scheduler", metavar="ADDRESS", help="predict on the workers of this dask scheduler"
    )
    sub.add_argument("--probabilities", action="store_true", help="also write class probabilities")
    sub.add_argument(
        "--backbone", metavar="NAME|PATH", help="where the adapter's backbone is, if not installed"
    )
    device(sub)

    sub = command("evaluate", _evaluate, "Compare predictions with labels: IoU and Dice.")
    sub.add_argument("--predictions", required=True, type=Path, metavar="DIR")
    sub.add_argument("--labels", required=True, type=Path, metavar="DIR")
    sub.add_argument("--ignore", type=_ignored, default=0, metavar="0|ID|none")
    sub.add_argument("--json", type=Path, metavar="FILE")

    weights = command("weights", _usage, "List, download or locate backbone checkpoints.")
    actions = weights.add_subparsers(metavar="ACTION", required=True)
    for name, run, help_ in (
        ("list", _weights_list, "Show every known backbone and whether it is here."),
        ("fetch", _weights_fetch, "Download a checkpoint and verify it."),
        ("path", _weights_path, "Print where a checkpoint is."),
    ):
        action = actions.add_parser(name, help=help_, description=help_)
        action.set_defaults(run=run)
        if name != "list":
            action.add_argument("name", metavar="NAME")

    benchmark = command("benchmark", _usage, "Measure methods: the paper's way, or few strokes.")
    kinds = benchmark.add_subparsers(metavar="KIND", required=True)
    for name, module, help_ in (
        ("paper", commands_paper, "Repeat the protocol of the Conv-LoRA paper."),
        ("interactive", commands_interactive, "Few strokes and corrections, against peers."),
    ):
        kind = kinds.add_parser(name, help=help_, description=help_)
        module.add_arguments(kind)
        kind.set_defaults(run=module.run)

    command("doctor", _doctor, "Report torch, devices, Qt and weights on this machine.")

    sub = command("demo", _demo, "Run the whole loop on a sample image.")
    sub.add_argument("--headless", action="store_true", help="end after the loop, keep no window")
    sub.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    return parser


def _usage(options: argparse.Namespace) -> int:
    options.parser.print_usage(sys.stderr)
    return BAD_USAGE


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _ignored(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a class id or 'none', got {text!r}")
    return int(text)


@contextmanager
def _bar(what: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Progress bar on a terminal, silence elsewhere; yields its update function."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, disable=not _err.is_terminal) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda **fields: progress.update(task, **fields)


def _adapt(options: argparse.Namespace) -> int:
    from napari_convlora import annotations, export, files, project_commands, stores
    from napari_convlora.sampling import labelled_parts
    from napari_convlora.session import Session

    by_file = not (options.project or options.recipe)
    _need(
        options, *(("images", "labels") if by_file else ()), *(() if options.project else ("out",))
    )
    for path in filter(None, (options.out, options.history)):
        files.check_writable(path)
    if by_file:
        if len(options.images) != len(options.labels):
            options.parser.error(
                f"{len(options.images)} images but {len(options.labels)} label images; "
                "give one each"
            )
        images = []
        for image_path, label_path in zip(options.images, options.labels, strict=True):
            image = stores.open_image(image_path)
            labels = files.read_labels(label_path, image.shape[:3])
            images += [part for _, part in labelled_parts(image, labels, image_path.stem)]
        if options.classes:
            classes = annotations.read_classes(options.classes)
        else:
            classes = annotations.default_classes({i for im in images for i in set(_ids(im))})
        settings = project_commands.settings(options)
        session = Session(settings.model, settings.train, settings.backbone)
        if options.devices:
            _share(session, options.devices)
        last, history = _run_round(session, images, classes)
        if session.team.rank:
            return DONE
        said = str(options.out)
    elif options.devices:
        options.parser.error("--devices goes with --images, not with --project or --recipe")
    else:
        last, history, said = project_commands.adapt(options, _run_round)
    if options.out:
        last.adapter.save(options.out)
    if options.history:
        export.write_history(options.history, history)
    summary = last.adapter.summary
    _out.print(
        f"{said}: {len(last.adapter.classes)} classes, {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s, ended by {last.reason}{_score_text(summary)}.",
        highlight=False,
        markup=False,
    )
    return DONE


def _share(session: Any, n_devices: int) -> None:
    """Train `session` on several devices; all processes but the first keep quiet."""
    from napari_convlora import fabric

    team = session.team = fabric.launch(n_devices, session.train_config.device)
    _out.quiet = _err.quiet = team.rank > 0
    before = session.train_config
    config = session.train_config = fabric.enlarge_batches(before, n_devices)
    if config != before:
        _err.print(f"Batches have {n_devices} views at least, one for each device.")


def _need(options: argparse.Namespace, *names: str) -> None:
    missing = [name for name in names if getattr(options, name) is None]
    if missing:
        listed = ", ".join(name if name == "adapter" else f"--{name}" for name in missing)
        options.parser.error(f"the following arguments are required: {listed}")


def _run_round(
    session: Any, images: Sequence[Any], classes: Sequence[ClassInfo], stop_after: int | None = None
) -> tuple[Any, list[Any]]:
    """Run a round, until a step if one is given; returns its `Finished` and all its events."""
    from napari_convlora import events

    control = events.RunControl()
    history: list[events.Event] = []
    with _bar("adapting", session.train_config.max_steps) as update, _interrupt(control.stop):
        for event in session.run_round(images, classes, control):
            history.append(event)
            if isinstance(event, events.Step):
                update(completed=event.step, note=f"loss {event.loss:.3f}")
                if event.step == stop_after:
                    control.stop()
            elif isinstance(event, events.Planned | events.Adjusted):
                _err.print(str(event), highlight=False)
    last = history[-1]
    if isinstance(last, events.Failed):
        raise ConvLoRAError(last.message)
    return last, history


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
        _err.print("Stopping after this step; press Ctrl-C again to break off.")

    previous = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _predict(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from napari_convlora import events, files, project_commands
    from napari_convlora.session import Session

    _need(options, *(() if options.project else ("adapter", "images", "out")))
    if options.project and (options.scheduler or options.format == "zarr"):
        options.parser.error("--scheduler and --format zarr go with --images, not with --project")
    stems = [path.stem for path in options.images or ()]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        options.parser.error(f"several images are called {twice[0]!r}; predict them separately")
    session = Session(train_config=TrainConfig(device=options.device or TrainConfig().device))
    failed = 0
    control = events.RunControl()
    with ExitStack() as stack:
        adapter, backbone, tasks = stack.enter_context(project_commands.to_predict(options))
        session.install(adapter)
        session.backbone_name = options.backbone or backbone
        if not options.scheduler:
            session.backbone()
        if options.out:
            files.make_folder(options.out)
        update = stack.enter_context(_bar("predicting", len(tasks)))
        stack.enter_context(_interrupt(control.stop))
        for number, task in enumerate(tasks):
            update(completed=number, note=task.name)
            try:
                for step in task.run(session, control):
                    update(completed=number + step.done / step.total)
            except InputError as error:
                failed += 1
                _err.print(f"{task.name}: {error}", style="red", markup=False, highlight=False)
            if control.stopping:
                break
    where = options.out or options.project
    if control.stopping:
        raise ConvLoRAError(
            f"Stopped; masks finished so far are in {where}, and of a large image the same "
            "command goes on where it was."
        )
    _out.print(f"{len(tasks) - failed} of {len(tasks)} images predicted into {where}.")
    return FAILED if failed else DONE


def _evaluate(options: argparse.Namespace) -> int:
    from napari_convlora.files import atomic_write
    from napari_convlora.metrics import evaluate_folders

    result = evaluate_folders(options.predictions, options.labels, options.ignore)
    table = Table("", "IoU", "Dice")
    for i, iou in result.scores.iou.items():
        table.add_row(f"class {i}", f"{iou:.4f}", f"{result.scores.dice[i]:.4f}")
    table.add_row(
        "mean", f"{result.scores.mean_iou:.4f}", f"{result.scores.mean_dice:.4f}", style="bold"
    )
    for stem, own in result.images.items():
        table.add_row(stem, f"{own.mean_iou:.4f}", f"{own.mean_dice:.4f}", style="dim")
    _out.print(table)
    if options.json:
        with atomic_write(options.json) as file:
            file.write(json.dumps(result.as_dict(), indent=2).encode() + b"\n")
    return DONE


def _weights_list(options: argparse.Namespace) -> int:
    from napari_convlora.backbones import REGISTRY, available_backbones

    table = Table("name", "size", "licence", "where", "note")
    for name, path in available_backbones().items():
        spec = REGISTRY[name]
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "unknown"
        table.add_row(name, size, spec.licence, str(path or "not here"), spec.note)
    _out.print(table)
    return DONE


def _weights_fetch(options: argparse.Namespace) -> int:
    from napari_convlora.backbones import REGISTRY, fetch

    spec = REGISTRY.get(options.name)
    if spec is not None:
        size = f"{spec.size_bytes / 1e6:.0f} MB" if spec.size_bytes else "size unknown"
        _err.print(f"{spec.title}: {size}, licence {spec.licence}, {spec.url}", highlight=False)
    with _bar(options.name, None) as update:
        path = fetch(options.name, lambda done, total: update(completed=done, total=total))
    _out.print(str(path), highlight=False, markup=False)
    return DONE


def _weights_path(options: argparse.Namespace) -> int:
    from napari_convlora.backbones import checkpoint_path

    _out.print(str(checkpoint_path(options.name)), highlight=False, markup=False)
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    from napari_convlora.doctor import report

    table = Table("what", "found", show_lines=False)
    findings = report()
    for finding in findings:
        table.add_row(finding.what, finding.found, style="" if finding.ok else "yellow")
    _out.print(table)
    for finding in findings:
        if not finding.ok:
            _out.print(f"- {finding.what}: {finding.remedy}", highlight=False, markup=False)
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from napari_convlora.widget.demo import run_demo

    return run_demo(options.out, headless=options.headless)
