"""What is seen of a command: words, a progress bar, and what Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

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
def bar(what: str, total: float | None) -> Iterator[Callable[..., None]]:
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


@contextmanager
def interrupt(stop: Callable[[], None]) -> Iterator[None]:
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
