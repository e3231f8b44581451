"""What a command is asked for, checked as a whole: frozen, typed, free of argparse."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from napari_convlora.config import DeviceName, MethodName, PresetName, StartName
from napari_convlora.errors import ConvLoRAError

T = TypeVar("T")


class UsageError(ConvLoRAError):
    """Options that do not go together, or too few of them."""


@dataclass(frozen=True)
class AdaptRequest:
    """A round on files, on a project, or that of a recipe; None is what was not said.

    Raises
    ------
    UsageError
        Options are missing, or do not go together.
    """

    images: list[Path] | None = None
    labels: list[Path] | None = None
    zero_is_background: bool | None = None
    out: Path | None = None
    project: Path | None = None
    open_anyway: bool | None = None
    without_missing: bool | None = None
    recipe: Path | None = None
    classes: Path | None = None
    backbone: str | None = None
    method: MethodName | None = None
    preset: PresetName | None = None
    start: StartName | None = None
    keep_uncorrected: bool | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    seed: int | None = None
    history: Path | None = None
    device: DeviceName | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        """Check what goes together."""
        by_file = not (self.project or self.recipe)
        _need(self, *(("images", "labels") if by_file else ()), *(() if self.project else ("out",)))
        files_given = ("images", "labels", "classes", "zero_is_background")
        if self.recipe:
            kept = ("backbone", "method", "preset", "start", "max_steps", "max_minutes", "seed")
            _refuse(self, "recipe", "project", *files_given, *kept)
            _refuse(self, "recipe", "device", "devices", "keep_uncorrected")
        elif self.project:
            _refuse(self, "project", *files_given, "devices")
        elif self.start == "installed" or self.keep_uncorrected is not None:
            raise UsageError(
                "--start installed and --keep-uncorrected go with --project, whose installed round "
                "they mean"
            )
        if not self.project:
            _refuse_without_project(self, "open_anyway", "without_missing")


@dataclass(frozen=True)
class PredictRequest:
    """Masks of image files, by an adapter, or of a project's images, by its installed round.

    Raises
    ------
    UsageError
        Options are missing, or do not go together.
    """

    adapter: Path | None = None
    images: list[Path] | None = None
    out: Path | None = None
    project: Path | None = None
    open_anyway: bool | None = None
    format: str = "tif"
    scheduler: str | None = None
    probabilities: bool = False
    backbone: str | None = None
    device: DeviceName | None = None

    def __post_init__(self) -> None:
        """Check what goes together."""
        _need(self, *(() if self.project else ("adapter", "images", "out")))
        if self.project:
            _refuse(self, "project", "adapter", "images")
        else:
            _refuse_without_project(self, "open_anyway")
        if self.probabilities and not self.out:
            raise UsageError("--probabilities needs --out, the folder they are written to")
        if self.project and (self.scheduler or self.format == "zarr"):
            raise UsageError("--scheduler and --format zarr go with --images, not with --project")
        stems = [path.stem for path in self.images or ()]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice:
            raise UsageError(f"several images are called {twice[0]!r}; predict them separately")


@dataclass(frozen=True)
class EvaluateRequest:
    """Scores of a folder of masks against a folder of labels."""

    predictions: Path
    labels: Path
    ignore: int | None
    json: Path | None


@dataclass(frozen=True)
class WeightsRequest:
    """A checkpoint by its name; "" for all of them."""

    name: str = ""


@dataclass(frozen=True)
class DemoRequest:
    """The loop on a sample image, with results in a folder."""

    out: Path
    headless: bool


@dataclass(frozen=True)
class DoctorRequest:
    """What this machine offers."""


def request_of(kind: type[T], options: Namespace) -> T:
    """Return what was said on the command line as a `kind` of request."""
    given = vars(options)
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})  # type: ignore[arg-type]


def _need(request: Any, *names: str) -> None:
    missing = [name for name in names if getattr(request, name) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(map(_flag, missing))}")


def _refuse(request: Any, what: str, *names: str) -> None:
    given = [_flag(name) for name in names if getattr(request, name) is not None]
    if given:
        raise UsageError(f"{given[0]} does not go with --{what}; leave one of them out")


def _refuse_without_project(request: Any, *names: str) -> None:
    for name in names:
        if getattr(request, name) is not None:
            raise UsageError(f"{_flag(name)} goes with --project; leave it out")


def _flag(name: str) -> str:
    return name if name == "adapter" else f"--{name.replace('_', '-')}"
