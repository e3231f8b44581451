"""Work in a thread, with its result in the main thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.qt.threading import create_worker

from napari_convlora.errors import ConvLoRAError


class JobError(ConvLoRAError):
    """A `RuntimeError` of what runs in a thread, renamed so that the worker reports it.

    superqt takes a RuntimeError for a deleted worker and says nothing at all, and torch's are
    RuntimeErrors.
    """


def in_thread(
    function: Callable[..., Any],
    *arguments: Any,
    then: Callable[[Any], None],
    failed: Callable[[Exception], None],
) -> None:
    """Call `function` in a thread; `then` or `failed` is called in the main thread."""

    def call() -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise JobError(str(error)) from error

    worker: Any = create_worker(call, _start_thread=False, _ignore_errors=True)
    worker.returned.connect(then)
    worker.errored.connect(failed)
    worker.start()
