"""Writes in the background, in order, in a thread that lives only while there is work."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from napari_convlora.errors import ConvLoRAError

logger = logging.getLogger(__name__)


class Writer:
    """Runs jobs one after the other in a thread of its own.

    Attributes
    ----------
    failures
        What went wrong since somebody last looked, a sentence each; take them with ``popleft``.
    waiting
        Jobs that must not be lost and found no room on the disk; see `put`.
    last_try
        Set once what cannot be written now never will be.
    """

    def __init__(self) -> None:
        self.failures: deque[str] = deque()
        self.waiting: deque[Callable[[], object]] = deque()
        self.last_try = threading.Event()
        self._jobs: deque[tuple[Callable[[], object], bool]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still to be written."""
        return self._thread is not None

    def put(self, job: Callable[[], object], *, keep: bool = False) -> None:
        """Run `job` after those that wait already; `keep` it for `retry` if the disk fails."""
        with self._lock:
            self._jobs.append((job, keep))
            if self._thread is None:
                # No daemon: the interpreter waits for what is being written.
                self._thread = threading.Thread(target=self._run, name="convlora-writer")
                self._thread.start()

    def retry(self) -> None:
        """Run those again that found no room."""
        for _ in range(len(self.waiting)):
            self.put(self.waiting.popleft(), keep=True)

    def flush(self) -> None:
        """Wait until everything is written and the thread is gone; any thread may."""
        with self._lock:  # a thread that was made just now is started, too
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job, keep = self._jobs.popleft()
            try:
                job()
            except ConvLoRAError as error:
                self.failures.append(str(error))
                if keep and isinstance(error.__cause__, OSError):
                    self.waiting.append(job)
            except Exception as error:  # whatever it is, the next job must not suffer
                if keep and isinstance(error, OSError):
                    self.waiting.append(job)
                logger.exception("The project could not be written")
                self.failures.append(
                    f"The project could not be written ({error}); save it to another folder."
                )
