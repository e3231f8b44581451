"""Work in a thread, with its result in the main thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.qt.threading import create_worker


def in_thread(
    function: Callable[..., Any],
    *arguments: Any,
    then: Callable[[Any], None],
    failed: Callable[[Exception], None],
) -> None:
    """Call `function` in a thread; `then` or `failed` is called in the main thread."""
    worker: Any = create_worker(function, *arguments, _start_thread=False, _ignore_errors=True)
    worker.returned.connect(then)
    worker.errored.connect(failed)
    worker.start()
