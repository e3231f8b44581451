"""One job at a time in a thread that drives the child process; messages in the main thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from napari.qt.threading import create_worker

from napari_convlora.control import Controls
from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import batched
from napari_convlora.session.jobs import Loaded
from napari_convlora.session.process import Child, Job
from napari_convlora.widget.threads import JobError

if TYPE_CHECKING:
    from napari_convlora.session.session import Session

logger = logging.getLogger(__name__)
BUSY = "Something is running already; wait for it or press Stop."


class Runner:
    """Runs one job at a time in a child process; no Qt object, so it outlives the widget.

    Parameters
    ----------
    session
        Run the jobs on this one in the thread itself. If None they run in a child process, which
        owns backbone and features, while rounds and installed adapter are kept here.

    Attributes
    ----------
    on_messages, on_error, on_end
        Called in the main thread: with a list of messages, with the exception of a job that
        broke, and after every job.
    """

    def __init__(self, session: Session | None = None) -> None:
        self.on_messages: Callable[[list[Any]], None] = _ignore
        self.on_error: Callable[[Exception], None] = _ignore
        self.on_end: Callable[[], None] = _ignore
        self.controls: Controls | None = None
        self._session = session
        self._in_thread = session is not None
        self._child: Child | None = None
        self._worker: Any = None
        self._job: Job | None = None
        self._running: Job | None = None
        self._preparations: list[Job] = []
        self._idle = threading.Event()
        self._idle.set()
        self._closed = self._resting = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closed

    @property
    def alive(self) -> bool:
        """Whether features that were kept are still there."""
        return self._in_thread or (self._child is not None and self._child.alive)

    @property
    def session(self) -> Session | None:
        """The session, or None before the first job has made it."""
        return self._session

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits, or has ended without the main thread knowing yet."""
        return self._job is not None

    def start(self, job: Job, controls: Controls | None = None) -> None:
        """Run `job` in the thread, after the warm-up if that is still going on."""
        if self.busy or self._closed:
            raise ConvLoRAError(BUSY)
        self._job, self.controls, self._resting = job, controls or Controls(), False
        self._idle.clear()
        if self._worker is None:
            self._launch(job, self.controls)

    def prepare(self, *preparations: Job) -> None:
        """Run these, one after the other until a job comes, so that it need not wait for them."""
        if self._closed:
            return
        self._resting = False
        if not self.busy:
            self._preparations = [*preparations]
            if self._worker is None:
                self._next_preparation()

    def stop(self) -> None:
        """End the job as soon as possible; what it has learnt is kept."""
        if self.controls is not None:
            self.controls.stop()

    def rest(self) -> None:
        """Stop, and end the process as soon as it is idle; the next job starts another."""
        self._preparations.clear()
        self._resting = True
        if self.busy:
            self.stop()
        elif self._worker is None:
            self._end_child()

    def wait(self, seconds: float) -> bool:
        """Wait until the thread is out of the job; False if it is not in time."""
        end = time.monotonic() + seconds
        while not self._idle.wait(0.01):
            worker = self._worker
            # A worker that napari quits leaves the job where it is, without closing it.
            if worker is None or (worker.abort_requested and not worker.is_running):
                return True
            if time.monotonic() > end:
                return False
        return True

    def close(self, seconds: float = 5.0) -> bool:
        """Stop, wait a bounded time, and never call back again."""
        self._closed = True
        self.on_messages = self.on_error = self.on_end = _ignore
        self.stop()
        self._end_child()
        return self.wait(seconds)

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.close()

    def _next_preparation(self) -> None:
        self._idle.clear()
        self._launch(self._preparations.pop(0), Controls())

    def _launch(self, job: Job, controls: Controls) -> None:
        # Without _ignore_errors an error is raised again in the main thread, beside our handler.
        self._worker = create_worker(
            self._steps, job, controls, _start_thread=False, _ignore_errors=True
        )
        self._worker.yielded.connect(self._on_yielded)
        self._worker.errored.connect(self._on_errored)
        self._worker.finished.connect(self._on_finished)
        self._running = job
        self._worker.start()

    def _steps(self, job: Job, controls: Controls) -> Generator[list[Any], None, None]:
        try:
            yield from (
                self._in_this_thread(job, controls)
                if self._in_thread
                else self._in_child(job, controls)
            )
        except RuntimeError as error:
            raise JobError(str(error)) from error
        finally:
            if self._closed:
                self._end_child()
            self._idle.set()

    def _in_this_thread(self, job: Job, controls: Controls) -> Iterator[list[Any]]:
        assert self._session is not None
        session = self._session
        yield from batched(job(lambda: session, controls))

    def _in_child(self, job: Job, controls: Controls) -> Iterator[list[Any]]:
        if self._child is None or not self._child.alive:
            self._child = Child()
        if self._session is None:
            from napari_convlora.session.session import Session  # takes seconds, as the child does

            self._session = Session()
        session = self._session
        for messages in self._child.run(job, controls, session.installed, session.learnt):
            for message in messages:
                if isinstance(message, Loaded):
                    session.install(message.adapter, message.learnt)
                else:
                    session.record(message)
            yield messages

    def _on_yielded(self, messages: list[Any]) -> None:
        self.on_messages(messages)

    def _on_errored(self, error: Exception) -> None:
        if not isinstance(error, ConvLoRAError) or isinstance(error, JobError):
            logger.error("A job broke", exc_info=error)
        self.on_error(error)

    def _on_finished(self) -> None:
        self._worker = None
        if self._running is self._job:
            self._job = None
            self.on_end()
        elif self._closed:
            return
        elif self._job is not None and self.controls is not None:  # came during a preparation
            self._launch(self._job, self.controls)
        elif self._preparations:
            self._next_preparation()
        if self._resting and self._worker is None:
            self._end_child()


def _ignore(*_: Any) -> None:
    """Do nothing."""
