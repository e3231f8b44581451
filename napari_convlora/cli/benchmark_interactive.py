"""``napari-convlora benchmark interactive``: few strokes against peers, on sets with truth."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from napari_convlora.benchmark.records import (
    BASELINES,
    PLAIN,
    Key,
    Run,
    RunSettings,
    TaskName,
    check_same,
    read_runs,
    write_runs,
)
from napari_convlora.config import DeviceName, PresetName
from napari_convlora.errors import InputError

if TYPE_CHECKING:
    from napari_convlora.benchmark.interactive import Job

_EXTRAS = {"unet": "monai"}
_FULL: dict[str, Any] = {
    "systems": ("conv_lora", "lora", "decoder_only", *BASELINES),
    "seeds": (0, 1, 2),
    "rounds": 5,
    "images": 3,
    "test_images": 8,
    "max_steps": RunSettings().train.max_steps,
}
_QUICK: dict[str, Any] = {
    "systems": ("conv_lora", *BASELINES),
    "seeds": (0,),
    "rounds": 2,
    "images": 2,
    "test_images": 2,
    "max_steps": 4,
}
_QUICK_VIEWS, _QUICK_DETAIL_STEPS, _QUICK_CROP = 4, 200, 256

_err = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


def add_interactive_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to `parser`."""
    data = os.environ.get("NAPARI_CONVLORA_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=data,
        metavar="DIR",
        help="one folder per set, each with images/, masks/ and meta.json",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="default: all")
    parser.add_argument(
        "--tasks", nargs="+", choices=get_args(TaskName), default=get_args(TaskName)
    )
    parser.add_argument(
        "--systems", nargs="+", metavar="SYSTEM", help="methods, or " + ", ".join(BASELINES)
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="default: 0 1 2")
    parser.add_argument("--rounds", type=int, metavar="N", help="of strokes; default: 5")
    parser.add_argument(
        "--corrections",
        type=int,
        default=RunSettings().corrections,
        metavar="N",
        help="strokes per image from the second round on",
    )
    parser.add_argument("--images", type=int, metavar="N", help="annotated, for unseen; default: 3")
    parser.add_argument(
        "--strokes", action="store_true", help="unseen learns from strokes, not from whole images"
    )
    parser.add_argument("--test-images", type=int, metavar="N", help="for unseen; default: 8")
    parser.add_argument("--backbone", default=RunSettings().backbone, metavar="NAME|PATH")
    parser.add_argument(
        "--preset", choices=get_args(PresetName), default=RunSettings().train.preset
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="of a round")
    parser.add_argument(
        "--keep-uncorrected",
        action=argparse.BooleanOptionalAction,
        default=RunSettings().train.keep_uncorrected,
        help="what a round said is a hint for the next one",
    )
    parser.add_argument("--device", choices=get_args(DeviceName), default="auto")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes: does everything run? figures mean little",
    )
    parser.add_argument("--redraw", action="store_true", help="only write tables and curves again")


def run_interactive(options: argparse.Namespace) -> int:
    """Run what is not done yet, then write ``results.md`` and ``curves.png``.

    Returns
    -------
    int
        0 when all runs finished, 1 when one failed.

    Raises
    ------
    ConvLoRAError
        An option cannot be used, an extra is missing, or `--out` holds other results.
    """
    from napari_convlora.benchmark.report import write_report

    _require("matplotlib")
    if options.redraw:
        write_report(options.out)
        return 0
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _check(options)
    from napari_convlora.benchmark.interactive import in_child, run_jobs
    from napari_convlora.files.atomic import make_folder

    settings = _settings(options)
    make_folder(options.out)
    path = options.out / "results.json"
    runs: list[Run] = []
    if path.exists():
        stored, runs = read_runs(path)
        check_same(settings, stored, path)
    jobs = _jobs(options, settings)
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=_err, disable=not _err.is_terminal
    ) as progress:
        task = progress.add_task("runs", total=len(jobs))
        made = [run.key for run in runs if run.failed is None]
        progress.update(task, completed=sum(job.key in made for job in jobs))
        for new in run_jobs(jobs, runs, in_child):
            runs = [old for old in runs if old.key != new.key] + [new]
            write_runs(path, settings, runs)
            failed += new.failed is not None
            progress.advance(task)
            progress.console.print(_line(new))
    write_report(options.out)
    _err.print(f"{options.out / 'results.md'}")
    return 1 if failed else 0


def _require(module: str) -> None:
    if find_spec(module) is None:
        raise InputError(
            f'This benchmark needs {module}; run: pip install "napari-convlora[benchmark]".'
        )


def _check(options: argparse.Namespace) -> None:
    """Find out before hours of work what cannot run."""
    from napari_convlora.peft import METHODS

    if options.data is None:
        raise InputError("There are no images; give their folder with --data.")
    for name in ("rounds", "corrections", "images", "test_images", "max_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1; give another number.")
    if min(options.seeds) < 0:
        raise InputError("A seed must not be negative; give another one.")
    known = (*METHODS, *(PLAIN + name for name in METHODS), *BASELINES)
    for system in options.systems:
        if system not in known:
            raise InputError(f"Unknown system {system!r}; choose among {', '.join(known)}.")
        if system in _EXTRAS:
            _require(_EXTRAS[system])


def _settings(options: argparse.Namespace) -> RunSettings:
    settings = RunSettings(
        backbone=options.backbone,
        rounds=options.rounds,
        corrections=options.corrections,
        images=options.images,
        test_images=options.test_images,
        strokes=options.strokes,
        crop=_QUICK_CROP if options.quick else None,
    )
    train = replace(
        settings.train,
        preset=options.preset,
        max_steps=options.max_steps,
        device=options.device,
        keep_uncorrected=options.keep_uncorrected,
    )
    if options.quick:
        train = replace(train, views=_QUICK_VIEWS, detail_steps=_QUICK_DETAIL_STEPS)
    return replace(settings, train=train)


def _jobs(options: argparse.Namespace, settings: RunSettings) -> list[Job]:
    """List all runs; of the same strokes, the U-Net comes last, as it gets our methods' time."""
    from napari_convlora.benchmark.interactive import Job
    from napari_convlora.benchmark.sets import find_sets, open_set

    folders = []
    for name in options.sets or find_sets(options.data):
        try:
            folders.append(open_set(options.data / name).folder)
        except InputError as error:
            _err.print(f"Skipped: {error}")
    if not folders:
        raise InputError(f"No set in '{options.data}' can be used; see above.")
    if options.quick and not options.sets:
        folders = folders[:1]
    systems = sorted(dict.fromkeys(options.systems), key=lambda system: system == "unet")
    return [
        Job(Key(folder.name, task, system, seed), folder, settings)
        for folder in folders
        for task in options.tasks
        for seed in options.seeds
        for system in systems
    ]


def _line(run: Run) -> str:
    name = f"{run.key.set} {run.key.task} {run.key.system} seed {run.key.seed}"
    if run.failed is not None:
        return f"{name}: failed: {run.failed}"
    points = ", ".join("-" if own.mean_iou is None else f"{own.mean_iou:.3f}" for own in run.rounds)
    return f"{name}: mean IoU {points} in {sum(own.learn_seconds for own in run.rounds):.0f} s"
