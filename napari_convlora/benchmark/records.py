"""What a run leaves behind, and the file that keeps it; light enough to redraw without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from napari_convlora.config import TrainConfig
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.files.tables import write_json

TaskName = Literal["finish", "unseen"]
PEERS = ("forest", "unet")
"""Systems that are not ours."""

BASELINES = (*PEERS, "detail")
"""Systems that are no method; `detail` is a round's first preview alone."""

PLAIN = "plain_"
"""Before a method's name: as in its paper, without our detail branch and our start of the head."""

_FORMAT = 1


@dataclass(frozen=True)
class RunSettings:
    """What decides the figures, apart from set, task, system and seed.

    Parameters
    ----------
    backbone
        Name or checkpoint path.
    train
        How our rounds are trained; the seed is the run's.
    rounds
        Of strokes, the first one included.
    corrections
        Strokes per annotated image from the second round on.
    max_share
        Share of an image, 0..1, beyond which corrections stop.
    images, test_images
        Annotated and scored images of `unseen`.
    strokes
        Whether `unseen` learns from strokes and corrections, not from whole annotated images.
    crop
        Only the central square of this side, in pixels, of every image; None for all of it.
    """

    backbone: str = "litemedsam"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(preview_seconds=10.0))
    rounds: int = 5
    corrections: int = 3
    max_share: float = 0.1
    images: int = 3
    test_images: int = 8
    strokes: bool = False
    crop: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as ``json.loads`` would read them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Key:
    """Which run: one system on one task of one set, from the strokes of one seed."""

    set: str
    task: TaskName
    system: str
    seed: int


@dataclass(frozen=True)
class RoundResult:
    """One round of a run.

    Parameters
    ----------
    strokes, pixels, share
        Annotated so far: strokes (0 for whole images), pixels, and their share 0..1.
    learn_seconds, predict_seconds
        From strokes to a usable model, and the mean over the scored images.
    mean_iou, iou
        Over all scored images, 0..1; per class id, None where the class is nowhere.
    confusion
        Per stem, (K, K) counts: truth in rows.
    previews
        Of our methods: seconds since the strokes, stage, and mean IoU where the preview shows a
        scored image, else None.
    near_final_seconds
        When a preview first came within 2 points of the round's result; the round's own
        seconds where none did; None where previews are not scored.
    """

    strokes: int
    pixels: int
    share: float
    learn_seconds: float
    predict_seconds: float
    mean_iou: float | None
    iou: Mapping[str, float | None]
    confusion: Mapping[str, list[list[int]]]
    previews: Sequence[tuple[float, str, float | None]] = ()
    near_final_seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """A run: which one, its rounds, what it took, or the sentence that says why it failed.

    Parameters
    ----------
    key
        Which run.
    classes
        Names of the classes 1..K.
    rounds
        In order; empty after a failure.
    load_seconds
        Reading the backbone.
    peak_bytes
        Most memory its process held, Python and libraries included; None where not measurable.
    environment
        Versions, device and threads.
    failed
        One sentence, or None.
    """

    key: Key
    classes: Sequence[str] = ()
    rounds: Sequence[RoundResult] = ()
    load_seconds: float = 0.0
    peak_bytes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    failed: str | None = None


def write_runs(path: Path, settings: RunSettings, runs: Sequence[Run]) -> None:
    """Replace `path` by the settings and all runs so far, at once or not at all."""
    content = {
        "format": _FORMAT,
        "settings": settings.as_dict(),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    write_json(path, content, indent=None)


def read_runs(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """Return the settings and the runs that `path` holds.

    Raises
    ------
    InputError
        The file is absent, damaged or of another version.
    """
    check_no_device(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        runs = [
            Run(
                **{
                    **run,
                    "key": Key(**run["key"]),
                    "rounds": tuple(RoundResult(**own) for own in run["rounds"]),
                }
            )
            for run in content["runs"]
        ]
        return dict(content["settings"]), runs
    except FileNotFoundError as error:
        raise InputError(f"'{path}' does not exist; run the benchmark first.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"'{path}' is not a result of this version ({error}); choose another folder."
        ) from error


def check_same(settings: RunSettings, stored: Mapping[str, Any], path: Path) -> None:
    """Refuse to add runs to results that were made with other settings.

    Raises
    ------
    InputError
        They differ.
    """
    asked, before = _flat(settings.as_dict()), _flat(stored)
    names = sorted(k for k in asked.keys() | before.keys() if asked.get(k) != before.get(k))
    if names:
        listed = ", ".join(f"{k} {before.get(k)} against {asked.get(k)}" for k in names)
        raise InputError(
            f"'{path}' was made with other settings ({listed}); repeat them or choose another "
            "folder with --out."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["train"], "train": None}
