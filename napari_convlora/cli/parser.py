"""The command line: what can be said on it; `commands` does it."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from napari_convlora.cli import commands
from napari_convlora.cli.benchmark_interactive import (
    add_interactive_arguments,
    run_interactive,
)
from napari_convlora.cli.benchmark_paper import add_paper_arguments, run_paper
from napari_convlora.cli.console import err
from napari_convlora.cli.requests import (
    AdaptRequest,
    DemoRequest,
    DoctorRequest,
    EvaluateRequest,
    PredictRequest,
    UsageError,
    WeightsRequest,
    request_of,
)
from napari_convlora.config import (
    DeviceName,
    MethodName,
    ModelConfig,
    PresetName,
    StartName,
    TrainConfig,
)
from napari_convlora.errors import ConvLoRAError

BAD_USAGE = 2
_LARGE = (
    "Images of more than 67 megapixels, zarr images, and all with --format zarr or --scheduler, "
    "are read, predicted and written in blocks: memory stays bounded, masks are tiled TIFFs or "
    "OME-Zarrs, and after Ctrl-C or a crash the same command goes on where it was."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when done, 1 when failed, 2 on bad usage."""
    try:
        options = _parser().parse_args(arguments)
        try:
            kind = options.request
            return options.run(options if kind is Namespace else request_of(kind, options))
        except UsageError as error:
            options.parser.error(str(error))  # leaves as argparse does
            raise
    except SystemExit as stop:  # argparse's own way out: 0 after --help, 2 on bad usage
        return stop.code if isinstance(stop.code, int) else commands.FAILED
    except ConvLoRAError as error:
        err.print(f"napari-convlora: {error}", style="red", markup=False, highlight=False)
        return commands.FAILED
    except KeyboardInterrupt:
        err.print("napari-convlora: interrupted.")
        return commands.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("napari-convlora", description=__doc__)
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str,
        request: type,
        run: Callable[[Any], int],
        help_: str,
        more: str = "",
        within: Any = parsers,
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = within.add_parser(
            name, help=help_, description=help_, epilog=more
        )
        sub.set_defaults(run=run, request=request, parser=sub)
        return sub

    _add_adapt(
        command("adapt", AdaptRequest, commands.run_adapt, "Adapt a backbone to annotated images.")
    )
    what = "Predict images with an adapter."
    _add_predict(command("predict", PredictRequest, commands.run_predict, what, _LARGE))
    what = "Compare predictions with labels: IoU and Dice."
    _add_evaluate(command("evaluate", EvaluateRequest, commands.run_evaluate, what))

    what = "List, download or locate backbone checkpoints."
    actions = _group(parsers, "weights", "ACTION", what)
    for name, run, help_ in (
        ("list", commands.weights_list, "Show every known backbone and whether it is here."),
        ("fetch", commands.weights_fetch, "Download a checkpoint and verify it."),
        ("path", commands.weights_path, "Print where a checkpoint is."),
    ):
        action = command(name, WeightsRequest, run, help_, within=actions)
        if name != "list":
            action.add_argument("name", metavar="NAME")

    what = "Measure methods: the paper's way, or few strokes."
    kinds = _group(parsers, "benchmark", "KIND", what)
    what = "Repeat the protocol of the Conv-LoRA paper."
    add_paper_arguments(command("paper", Namespace, run_paper, what, within=kinds))
    what = "Few strokes and corrections, against peers."
    add_interactive_arguments(
        command("interactive", Namespace, run_interactive, what, within=kinds)
    )

    what = "Report torch, devices, Qt and weights on this machine."
    command("doctor", DoctorRequest, commands.run_doctor, what)
    what = "Run the whole loop on a sample image."
    sub = command("demo", DemoRequest, commands.run_demo_command, what)
    sub.add_argument("--headless", action="store_true", help="end after the loop, keep no window")
    sub.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    return parser


def _group(parsers: Any, name: str, metavar: str, help_: str) -> Any:
    group = parsers.add_parser(name, help=help_, description=help_)
    return group.add_subparsers(metavar=metavar, required=True)


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", choices=get_args(DeviceName), help="where to compute; auto if not given"
    )


def _add_open_anyway(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--open-anyway",
        action="store_true",
        default=None,
        help="open the project although a window or another command has it open",
    )


def _add_adapt(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--images", nargs="+", type=Path, metavar="IMG", help="image files, all channels alike"
    )
    sub.add_argument(
        "--labels",
        nargs="+",
        type=Path,
        metavar="LAB",
        help="integer images in the order of the images; 0 = unlabelled",
    )
    sub.add_argument(
        "--zero-is-background",
        action="store_true",
        default=None,
        help="the labels are finished masks: 0 is a class, the background",
    )
    sub.add_argument("--out", type=Path, metavar="A.safetensors", help="the adapter to write")
    sub.add_argument(
        "--project", type=Path, metavar="DIR", help="add a round on all its images; no --out needed"
    )
    _add_open_anyway(sub)
    sub.add_argument(
        "--without-missing",
        action="store_true",
        default=None,
        help="go on without images of the project whose annotations are gone",
    )
    sub.add_argument("--recipe", type=Path, metavar="R.json", help="repeat a round to --out")
    sub.add_argument(
        "--classes", type=Path, metavar="classes.json", help='class table, as {"1": "background"}'
    )
    _add_settings(sub)


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """Add options which, where they are not given, are a project's, else the defaults."""
    model, train = ModelConfig(), TrainConfig()
    sub.add_argument(
        "--backbone",
        metavar="NAME|PATH",
        help="frozen Segment Anything model; litemedsam. NAME:PATH is a file whose pixels are to "
        "be normalised as NAME's, such as medsam:tuned.pth",
    )
    sub.add_argument(
        "--method",
        choices=get_args(MethodName),
        help=f"what is trained in the encoder; {model.method}",
    )
    sub.add_argument(
        "--preset",
        choices=get_args(PresetName),
        help=f"fast adapts the last blocks, full every block; {train.preset}",
    )
    sub.add_argument("--start", choices=get_args(StartName), help="base, or go on from a project's")
    sub.add_argument(
        "--keep-uncorrected",
        action=argparse.BooleanOptionalAction,
        help="learn as well from what a project's installed round said; yes",
    )
    sub.add_argument(
        "--max-steps",
        type=_positive(int),
        metavar="N",
        help=f"training steps at most; {train.max_steps}",
    )
    sub.add_argument(
        "--max-minutes", type=_positive(float), metavar="M", help="minutes at most; no limit"
    )
    sub.add_argument("--seed", type=int, metavar="S", help=f"of the random numbers; {train.seed}")
    sub.add_argument("--history", type=Path, metavar="history.csv", help="loss and score by step")
    _add_device(sub)
    sub.add_argument(
        "--devices", type=_positive(int), metavar="N", help="train on N devices of this machine"
    )


def _add_predict(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("adapter", nargs="?", type=Path, metavar="A.safetensors")
    sub.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="IMG",
        help="image files, zarr arrays or OME-Zarr folders",
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the masks")
    sub.add_argument(
        "--project",
        type=Path,
        metavar="DIR",
        help="predict all its images with its installed round",
    )
    _add_open_anyway(sub)
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
    _add_device(sub)


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--predictions", required=True, type=Path, metavar="DIR", help="folder of masks"
    )
    sub.add_argument(
        "--labels", required=True, type=Path, metavar="DIR", help="folder of labels, named alike"
    )
    sub.add_argument(
        "--ignore",
        type=_ignored,
        default=0,
        metavar="0|ID|none",
        help="pixels with this label are left out, and it is no class; 0",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all scores here, too")


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
