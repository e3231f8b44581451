"""Rounds of a project on disk: record, adapter, annotations and predictions of each."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from napari_convlora.config import InputError
from napari_convlora.project.checked import build, read_json, write_json

FORMAT = 1
RECORD, RECIPE, HISTORY = "round.json", "recipe.json", "history.csv"
ADAPTER, START = "adapter.safetensors", "start.safetensors"


@dataclass(frozen=True)
class RoundRecord:
    """One row of the history.

    Parameters
    ----------
    number
        From 1.
    score, held_out
        Mean IoU in [0, 1], on held-out or on training labels; None where nothing was scored.
    seconds, steps, ended_by
        How long it took, and why it ended.
    pixels
        Labelled pixels by class id.
    images
        Stems of the images it learnt from, in order.
    started_from
        ``base``, or the round it went on from.
    better, reason
        What the better-or-keep gate said.
    when
        Seconds since 1970.
    """

    number: int
    score: float | None
    held_out: bool
    seconds: float
    steps: int
    ended_by: str
    pixels: dict[int, int]
    images: tuple[str, ...]
    started_from: str = "base"
    better: bool = True
    reason: str = ""
    when: float = field(default_factory=time.time)


def write_record(folder: Path, record: RoundRecord) -> None:
    """Write the record of a round into its folder."""
    write_json(folder / RECORD, {"format": FORMAT, **asdict(record)})


def read_record(folder: Path) -> RoundRecord:
    """Read the record in a round's folder.

    Raises
    ------
    InputError
        It is absent, damaged or of a newer format.
    """
    data = read_json(folder / RECORD, FORMAT)
    try:
        return build(RoundRecord, data)
    except (TypeError, ValueError) as error:
        raise InputError(f"'{folder / RECORD}' is damaged ({error}); restore a copy.") from error


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the rounds in a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and len(p.name) < 7)
