"""The history of a round as a table."""

from __future__ import annotations

import os
from collections.abc import Iterable

from napari_convlora.events import Event, Scored, Step
from napari_convlora.files.tables import write_csv


def write_history(path: str | os.PathLike[str], events: Iterable[Event]) -> None:
    """Write what a round reported as CSV: step, loss, seconds, score, held_out.

    Parameters
    ----------
    path
        ``.csv`` file to create or replace.
    events
        Of one round, in any order; others than `Step` and `Scored` are skipped.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    rows: dict[int, dict[str, object]] = {}
    for event in events:
        if isinstance(event, Step):
            found: dict[str, object] = {"loss": event.loss, "seconds": round(event.seconds, 3)}
        elif isinstance(event, Scored):
            found = {"score": event.score, "held_out": event.held_out}
        else:
            continue
        rows[event.step] = rows.get(event.step, {}) | found
    columns = ["step", "loss", "seconds", "score", "held_out"]
    write_csv(path, columns, ({"step": step} | row for step, row in sorted(rows.items())))
