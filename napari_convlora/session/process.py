"""A Python process of its own for the engine: jobs go in, messages come out.

The window keeps its time and its memory, and whatever ends the process leaves the window alive.
Both ways are pickles over the child's standard streams. It is started by a command rather than by
`multiprocessing`, which would run the user's script a second time; the end of a stream tells each
side that the other one is gone, however it went.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import cloudpickle

from napari_convlora.control import Controls, RunControl
from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import Failed, Finished, Interim, Silent, Started, batched

if TYPE_CHECKING:
    from napari_convlora.model.adapter import Adapter
    from napari_convlora.session.session import Session
    from napari_convlora.training.versus_installed import Learnt

SessionGetter = Callable[[], "Session"]
"""Returns the session of the process that runs the job."""

Job = Callable[[SessionGetter, Controls], Iterator[Any]]
"""Takes what returns the process's session, and controls; yields messages that can be pickled."""

SECONDS_BETWEEN_SNAPSHOTS = 10.0
SECONDS_TO_STOP = 5.0
"""A step of a large model may take longer: what was learnt before it is kept."""

SECONDS_TO_COMPARE = 20.0
"""After the last step of a round that was stopped; then it is kept without a comparison."""

SECONDS_OF_SILENCE = 300.0
"""A longer one of a round that is not paused is worth a word; nothing is ended by itself."""

_POLL = 0.02
_NICENESS = 5
_MEMORY = "choose the fast preset or a smaller backbone, or close other programs"
_KILLED = f"The background process was killed, most likely as memory ran out; {_MEMORY}"
_OUT_OF_MEMORY = f"The background process ran out of memory; {_MEMORY}."


class Child:
    """A process that runs jobs, one at a time; it ends with this one at the latest.

    It keeps one `Session`, and with it the backbone and the frozen features, from job to job.
    """

    def __init__(self) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            # -P: the folder that napari was started in is no place to import from.
            [
                sys.executable,
                "-P",
                "-c",
                "from napari_convlora.session.process import serve; serve()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr else subprocess.DEVNULL,  # Windows without a console
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        reader = (self._process.stdout, self._inbox.put)
        threading.Thread(target=_read, args=reader, name="convlora-child", daemon=True).start()
        self.close = weakref.finalize(self, _end, self._process)
        """End the process at once; also called when Python exits."""

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process can take jobs."""
        return self._process.poll() is None

    def run(
        self,
        job: Job,
        controls: Controls,
        installed: Adapter | None = None,
        learnt: Learnt | None = None,
    ) -> Iterator[list[Any]]:
        """Run `job` in the process and hand on its messages; call it in one thread at a time.

        Parameters
        ----------
        job
            Sent by reference where it can be imported, else (closures, lambdas) by value.
        controls
            What is asked of them here is asked of the job.
        installed, learnt
            What the process's session has installed when the job begins, and which pixels that
            learnt from.

        Yields
        ------
        list
            Messages of the job. A round that breaks off ends with `Failed`, one that does not stop
            in time with `Finished`, both with what was learnt shortly before; `Silent` says that
            nothing comes.

        Raises
        ------
        ConvLoRAError
            The process ended outside a round, unless it was stopped.
        Exception
            What the job raised.
        """
        interim: Interim | None = None
        training = False
        try:
            for messages in self._exchange(job, controls, (installed, learnt)):
                news = []
                for message in messages:
                    match message:
                        case Interim():
                            interim = message
                            continue
                        case Silent() if not training:
                            continue
                        case Started():
                            training = True
                        case Finished():
                            training = False
                        case Failed(sentence, None):
                            training = False
                            message = _broken_off(sentence, interim, controls)
                    news.append(message)
                if news:
                    yield news
        except EOFError as error:
            if training:
                yield [_broken_off(str(error), interim, controls)]
            elif not (controls.training.stopping or controls.predicting.stopping):
                raise ConvLoRAError(f"{error}.") from None
        except GeneratorExit:
            self.close()  # nobody waits for the end of the job
            raise

    def _exchange(
        self, job: Job, controls: Controls, installed: tuple[Adapter | None, Learnt | None]
    ) -> Iterator[list[Any]]:
        """Send the job, then its messages here and wishes there until it ends.

        Raises EOFError with the beginning of a sentence when the process ends.
        """
        self._send("job", cloudpickle.dumps((job, *installed)))
        told = [_wishes(RunControl())] * 2
        patience = float("inf")
        heard, silent = time.monotonic(), False
        while True:
            wishes = [_wishes(controls.training), _wishes(controls.predicting)]
            images = controls.training.take_annotations()
            if wishes != told or images is not None:
                self._send("wishes", (wishes, images))
                if any(new[0] and not old[0] for new, old in zip(wishes, told, strict=True)):
                    patience = time.monotonic() + SECONDS_TO_STOP
                told = wishes
            try:
                kind, content = self._inbox.get(timeout=_POLL)
            except queue.Empty:
                if time.monotonic() > patience:
                    self.close()
                if controls.training.paused:
                    heard = time.monotonic()
                elif not silent and time.monotonic() - heard > SECONDS_OF_SILENCE:
                    silent = True
                    yield [Silent(SECONDS_OF_SILENCE)]
                continue
            if silent and kind == "messages":
                yield [Silent(0)]
            heard, silent = time.monotonic(), False
            if kind == "gone":
                with suppress(subprocess.TimeoutExpired):  # then it sent what cannot be read
                    self._process.wait(1)
                self.close()
                raise EOFError(_why(self._process.returncode))
            if kind == "end":
                if content is not None:
                    raise content
                return
            stopped = patience < float("inf") and not controls.training.hurry
            if any(isinstance(message, Finished | Failed) for message in content):
                patience = float("inf")
            elif stopped and any(isinstance(message, Interim) for message in content):
                patience = time.monotonic() + SECONDS_TO_COMPARE  # nothing can be lost any more
            yield content

    def _send(self, kind: str, content: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it is gone, and its other stream says so
            _write(self._process.stdin, kind, content)


def _read(stream: IO[bytes], put: Callable[[tuple[str, Any]], None]) -> None:
    """Take messages out of the stream until it ends, maybe in the middle of one."""
    try:
        while True:
            put(pickle.load(stream))
    except EOFError:
        pass
    finally:
        stream.close()
        put(("gone", None))


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(OSError):  # what was not yet sent has nobody to go to
        process.stdin.close()


def _why(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return _KILLED
    return f"The background process ended (code {code}); see the terminal for why, and try again"


def _broken_off(sentence: str, interim: Interim | None, controls: Controls) -> Finished | Failed:
    """Return how a round ends of which there is no more than the last snapshot."""
    if controls.training.stopping:
        nothing = Failed("Stopped before anything was learnt; nothing has changed.")
        return nothing if interim is None else Finished(interim.adapter, "terminated")
    if interim is None:
        return Failed(f"{sentence.rstrip('.')}.")
    what = f"what was learnt by step {interim.step}" if interim.step else "the first preview"
    return Failed(f"{sentence.rstrip('.')}; {what} is kept.", interim.adapter)


def _wishes(control: RunControl) -> tuple[Any, ...]:
    return control.stopping, control.paused, control.visible, control.seen, control.hurry


def serve() -> None:
    """Run jobs from the standard input until it ends: what the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is meant for napari
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    if sys.platform == "linux":
        with suppress(OSError):  # where memory runs out, napari is the last to go
            Path("/proc/self/oom_score_adj").write_text("1000")
    # Whatever prints must not write into the messages.
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[tuple[bytes, Controls]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()

    from napari_convlora.devices import leave_a_core
    from napari_convlora.session.session import Session

    leave_a_core()
    session = Session()
    while True:
        content, controls = jobs.get()
        error: Exception | None = None
        try:
            for messages in _work(content, controls, session):
                _write(outbox, "messages", messages)
        except Exception as failure:
            error = _portable(failure)
        del content
        _return_memory()
        _write(outbox, "end", error)


def _listen(jobs: queue.SimpleQueue[tuple[bytes, Controls]]) -> None:
    """Take jobs and wishes out of the standard input; its end is the end of the process."""
    controls = Controls()
    try:
        while True:
            kind, content = pickle.load(sys.stdin.buffer)
            if kind == "job":
                controls = Controls()
                controls.training.keep_every = SECONDS_BETWEEN_SNAPSHOTS
                jobs.put((content, controls))
                continue
            wishes, images = content
            for control, (stop, pause, visible, seen, hurry) in zip(
                (controls.training, controls.predicting), wishes, strict=True
            ):
                control.visible, control.seen, control.hurry = visible, seen, hurry
                if stop:
                    control.stop()
                elif pause:
                    control.pause()
                else:
                    control.resume()
            if images is not None:
                controls.training.update_annotations(images)
    finally:
        os._exit(0)  # whatever the main thread is busy with


def _work(content: bytes, controls: Controls, session: Session) -> Iterator[list[Any]]:
    job, installed, learnt = pickle.loads(content)
    if not _same(installed, session.installed):
        session.installed = None
        if installed is not None:
            session.install(installed, learnt)
    session.rounds.clear()  # the other side keeps them
    yield from batched(job(lambda: session, controls))


def _same(one: Adapter | None, other: Adapter | None) -> bool:
    """Whether two adapters, one of which has travelled, are the same."""
    if one is None or other is None:
        return one is other
    return (one.summary, one.state.keys()) == (other.summary, other.state.keys()) and all(
        tensor.equal(other.state[name]) for name, tensor in one.state.items()
    )


def _write(stream: IO[bytes], kind: str, content: Any) -> None:
    stream.write(pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL))  # all of it, or nothing
    stream.flush()


def _portable(error: Exception) -> Exception:
    """Make `error` fit to travel, with its traceback as a note."""
    from napari_convlora.devices import is_out_of_memory

    if isinstance(error, ConvLoRAError):
        return error
    if is_out_of_memory(error):
        return ConvLoRAError(_OUT_OF_MEMORY)
    text = traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error.with_traceback(None)))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(text)
    return error


def _return_memory() -> None:
    """Give memory that is no longer used back to the system and to the GPU's other users."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
