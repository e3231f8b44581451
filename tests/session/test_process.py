from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import joblib
import numpy as np
import psutil
import pytest
import torch

from napari_convlora.backbones.testing import TINY, random_backbone
from napari_convlora.backbones.tiny_vit import build_tiny_vit
from napari_convlora.config import TrainConfig
from napari_convlora.control import Controls
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.events import (
    Failed,
    Finished,
    Interim,
    Paused,
    Preview,
    Scored,
    Silent,
    Started,
    Step,
)
from napari_convlora.session import process as child_module
from napari_convlora.session.jobs import prepare_training, warm_up
from napari_convlora.session.process import Child
from napari_convlora.session.session import Session
from napari_convlora.session.snapshot import Snapshot
from napari_convlora.training import adapt
from tests.conftest import CLASSES, make_scene, small_forests_here

QUICK = TrainConfig(max_steps=3, views=3, detail_steps=10, score_every=2, device="cpu")
LONG = TrainConfig(max_steps=100_000, views=3, detail_steps=10, patience=100_000, device="cpu")
Get = Callable[[], Session]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One process for all tests that leave it alive."""
    child = Child()
    yield child
    child.close()


@pytest.fixture
def mortal() -> Iterator[Child]:
    """A process of this test's own."""
    child = Child()
    yield child
    child.close()


def run(child: Child, job: Any, controls: Controls | None = None) -> list[Any]:
    return [m for messages in child.run(job, controls or Controls()) for m in messages]


def a_round(config: TrainConfig, planes: int = 1) -> Callable[[Get, Controls], Iterator[Any]]:
    """Train a tiny backbone on the scene."""

    def job(session: Get, controls: Controls) -> Iterator[Any]:
        small_forests_here()
        state = session()
        state._backbone, state.train_config = ("litemedsam", random_backbone()), config
        yield from state.run_round([make_scene(planes=planes)[0]], CLASSES, controls.training)

    return job


def gone(pid: int) -> bool:
    """Whether a process ends within seconds; a zombie without a parent is gone too."""
    try:
        process = psutil.Process(pid)
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        return True
    return False


def surroundings(session: Get, controls: Controls) -> Iterator[Any]:
    session()
    packages = {name.split(".")[0] for name in sys.modules}
    yield os.getpid(), packages, os.nice(0), torch.get_num_threads()


def test_it_knows_neither_qt_nor_napari_and_leaves_room_for_the_window(child: Child) -> None:
    run(child, warm_up)
    ((pid, packages, niceness, threads),) = run(child, surroundings)
    assert pid == child.pid != os.getpid()
    assert "torch" in packages
    assert not packages & {"napari", "qtpy", "superqt", "magicgui", "PyQt6", "PySide6", "vispy"}
    assert niceness > os.nice(0)
    assert threads == max(1, joblib.cpu_count() - 1)


def heavy(session: Get, controls: Controls) -> Iterator[Any]:
    yield {name for name in ("sklearn", "torch._dynamo") if name in sys.modules}


def test_it_is_ready_to_predict_before_it_is_ready_to_train(mortal: Child) -> None:
    def tiny(session: Get, controls: Controls) -> Iterator[Any]:
        with torch.device("meta"):  # as checkpoints are loaded
            build_tiny_vit(TINY)
        yield from ()

    run(mortal, warm_up)
    run(mortal, tiny)
    assert run(mortal, heavy) == [set()], "seconds that opening a project would wait for"
    run(mortal, prepare_training)
    assert run(mortal, heavy) == [{"sklearn", "torch._dynamo"}]


def test_a_round_there_learns_what_it_learns_here(child: Child) -> None:
    torch.set_num_threads(1)
    *_, here = adapt(random_backbone(), [make_scene()[0]], CLASSES, config=QUICK)
    there = run(child, a_round(QUICK))
    assert [type(e) for e in there if isinstance(e, Started | Step)] == [Started, *[Step] * 3]
    assert any(isinstance(e, Preview) for e in there)
    assert isinstance(here, Finished)
    assert isinstance(there[-1], Finished)
    assert not any(isinstance(e, Interim) for e in there), "snapshots are for emergencies"
    learnt, expected = there[-1].adapter.state, here.adapter.state
    assert learnt.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(learnt[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_session_lives_on_and_takes_the_adapter_it_is_given(child: Child) -> None:
    finished = run(child, a_round(QUICK))[-1]
    known = run(child, lambda session, _: iter([len(session().cache), len(session().rounds)]))
    assert known[0] > 0
    assert known[1] == 0, "rounds are kept on this side alone"

    def names(session: Get, controls: Controls) -> Iterator[Any]:
        yield session().installed

    assert run(child, names) == [None]
    ((adapter,),) = child.run(names, Controls(), finished.adapter)
    assert adapter.classes == CLASSES


def test_messages_are_not_disturbed_by_what_is_printed_nor_by_ctrl_c(child: Child) -> None:
    def noisy(session: Get, controls: Controls) -> Iterator[Any]:
        print("noise")
        os.write(1, b"more noise\n")
        os.kill(os.getpid(), signal.SIGINT)
        yield "undisturbed"

    assert run(child, noisy) == ["undisturbed"]


def raising(make: Callable[[], Exception]) -> Callable[[Get, Controls], Iterator[Any]]:
    def job(session: Get, controls: Controls) -> Iterator[Any]:
        yield 1
        raise make()

    return job


class Odd(Exception):
    """Can be pickled, but not read again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)


def test_errors_come_back_as_they_are(child: Child) -> None:
    with pytest.raises(InputError, match=r"^A sentence\.$"):
        run(child, raising(lambda: InputError("A sentence.")))
    with pytest.raises(KeyError) as caught:
        run(child, raising(lambda: KeyError("k")))
    assert "in job" in caught.value.__notes__[0], "the traceback over there, for a bug report"
    with pytest.raises(RuntimeError, match="Odd: 1"):
        run(child, raising(lambda: Odd(1, 2)))
    assert child.alive


def test_running_out_of_memory_is_a_sentence_and_the_process_goes_on(child: Child) -> None:
    def greedy(session: Get, controls: Controls) -> Iterator[Any]:
        yield torch.empty(2**50)

    for job in (raising(MemoryError), greedy):
        with pytest.raises(ConvLoRAError, match="ran out of memory; choose the fast preset"):
            run(child, job)
    assert child.alive


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_round_that_runs_out_of_memory_ends_with_what_it_had_learnt(mortal: Child) -> None:
    def starving(session: Get, controls: Controls) -> Iterator[Any]:
        import resource

        from napari_convlora.training import guarded_steps

        train_step, steps = guarded_steps.train_step, itertools.count()

        def hungry(*args: Any) -> float:
            if next(steps) >= 3:  # the first is a trial
                used = psutil.Process().memory_info().vms
                resource.setrlimit(resource.RLIMIT_AS, (used, used))
                np.ones(2**30)
            return train_step(*args)

        guarded_steps.train_step = hungry
        yield from a_round(LONG)(session, controls)

    events = run(mortal, starving)
    last = events[-1]
    assert isinstance(last, Failed)
    assert "ran out of memory; choose the fast preset" in last.message
    assert last.message.endswith("; the first preview is kept.")
    assert last.adapter is not None
    assert max(e.step for e in events if isinstance(e, Step)) == 2
    assert mortal.alive


def test_a_killed_round_ends_in_one_sentence_with_what_it_had_learnt(mortal: Child) -> None:
    events = []
    for messages in mortal.run(a_round(LONG), Controls()):
        events += messages
        if any(isinstance(m, Step) for m in messages) and mortal.alive:
            os.kill(mortal.pid, signal.SIGKILL)
    last = events[-1]
    assert isinstance(last, Failed)
    assert last.message.startswith(
        "The background process was killed, most likely as memory ran out"
    )
    assert last.message.endswith("; the first preview is kept.")
    assert last.message.count(". ") == 0
    assert last.adapter is not None
    assert last.adapter.classes == CLASSES
    last.adapter.build(random_backbone())
    assert not mortal.alive


def test_a_process_that_ends_outside_a_round_is_a_sentence(mortal: Child) -> None:
    def vanish(session: Get, controls: Controls) -> Iterator[Any]:
        yield 1
        os._exit(3)

    with pytest.raises(ConvLoRAError, match=r"process ended \(code 3\); see the terminal"):
        run(mortal, vanish)


def keeping() -> Controls:
    controls = Controls()
    controls.training.keep_every = 0
    return controls


def test_what_does_not_stop_in_time_is_ended_and_its_last_snapshot_kept(
    mortal: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "SECONDS_TO_STOP", 0.3)

    def deaf(session: Get, controls: Controls) -> Iterator[Any]:
        for event in a_round(QUICK)(session, keeping()):
            if isinstance(event, Finished):
                time.sleep(1000)
            yield event

    controls = Controls()
    events = []
    for messages in mortal.run(deaf, controls):
        events += messages
        if any(isinstance(m, Scored) for m in messages):
            pressed = time.monotonic()
            controls.stop()
    assert time.monotonic() - pressed < 3
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "terminated"
    assert last.adapter.summary["steps"] == 2
    assert gone(mortal.pid)


@pytest.mark.parametrize("paused", [False, True])
def test_a_round_that_says_nothing_is_told_of_and_goes_on(
    mortal: Child, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    monkeypatch.setattr(child_module, "SECONDS_OF_SILENCE", 0.3)

    def slow(session: Get, controls: Controls) -> Iterator[Any]:
        time.sleep(1)  # nothing is said of what is no round
        yield Started(2, {}, False, "cpu")
        for step in (1, 2):
            time.sleep(1)
            yield Step(step, 2, 0.0, 1.0)

    controls = Controls()
    if paused:
        controls.training.pause()
    events = run(mortal, slow, controls)
    told = [] if paused else [Silent(0.3), Silent(0)]
    first, second = (Step(step, 2, 0.0, 1.0) for step in (1, 2))
    assert events == [Started(2, {}, False, "cpu"), *told, first, *told, second]
    assert str(Silent(300)) == (
        "The trainer has said nothing for 5 minutes; Stop ends it and keeps the last snapshot."
    )


def test_a_comparison_after_stop_has_a_time_of_its_own(
    mortal: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "SECONDS_TO_STOP", 20.0)
    monkeypatch.setattr(child_module, "SECONDS_TO_COMPARE", 0.3)

    def compares(session: Get, controls: Controls) -> Iterator[Any]:
        for event in a_round(QUICK)(session, Controls()):
            if isinstance(event, Finished):
                yield Interim(QUICK.max_steps, event.adapter)
                time.sleep(1000)
            yield event

    controls = Controls()
    events = []
    for messages in mortal.run(compares, controls):
        events += messages
        if any(isinstance(m, Scored) for m in messages):
            pressed = time.monotonic()
            controls.training.stop()
    assert time.monotonic() - pressed < 15
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "terminated"
    assert last.adapter.summary["steps"] == QUICK.max_steps


def test_a_deaf_job_that_is_no_round_is_ended_without_a_word(
    mortal: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "SECONDS_TO_STOP", 0.3)

    def deaf(session: Get, controls: Controls) -> Iterator[Any]:
        yield "begun"
        time.sleep(1000)

    controls = Controls()
    controls.stop()
    assert run(mortal, deaf, controls) in ([], ["begun"])
    assert not mortal.alive


def test_wishes_reach_the_round_at_once(child: Child) -> None:
    """Pause, look elsewhere, take new labels, go on, stop."""
    controls = Controls()
    config = TrainConfig(
        max_steps=100_000, views=3, detail_steps=10, preview_seconds=0.05, device="cpu"
    )
    latest, _ = make_scene(planes=2)
    latest.annotations[1] = 0
    events: list[Any] = []
    took: dict[str, float] = {}

    def until(what: str, condition: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < 30, what
            time.sleep(0.005)
        took[what] = time.monotonic() - began

    def count(kind: type) -> int:
        return sum(isinstance(e, kind) for e in list(events))

    def consume() -> None:
        for messages in child.run(a_round(config, planes=2), controls):
            events.extend(messages)

    thread = threading.Thread(target=consume)
    thread.start()
    until("first step", lambda: count(Step) > 0)
    controls.training.pause()
    until("pause", lambda: count(Paused) == 1)
    steps = count(Step)
    time.sleep(0.3)
    assert count(Step) == steps
    controls.training.visible = (0, 1)
    controls.training.update_annotations([latest])
    controls.training.resume()
    until("resume", lambda: count(Step) > steps)
    until("other plane", lambda: any(isinstance(e, Preview) and e.plane == 1 for e in list(events)))
    controls.stop()
    until("stop", lambda: not thread.is_alive())
    assert took["pause"] < 2
    assert took["stop"] < 3
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "stopped"
    pixels = last.adapter.summary["labelled_pixels"]
    assert sum(pixels.values()) == (latest.annotations > 0).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_goes_back_to_the_system_after_a_job(mortal: Child) -> None:
    def greedy(session: Get, controls: Controls) -> Iterator[Any]:
        pieces = [np.ones(4000) for _ in range(10_000)]
        session().keeps_the_heap_from_shrinking = np.ones(4000)  # type: ignore[attr-defined]
        yield len(pieces)

    run(mortal, surroundings)  # torch is imported
    process = psutil.Process(mortal.pid)
    before = process.memory_info().rss
    peak = 0
    for _ in mortal.run(greedy, Controls()):
        peak = max(peak, process.memory_info().rss)
    assert peak - before > 200e6
    assert process.memory_info().rss - before < 50e6


def test_leaving_a_job_in_the_middle_ends_the_process(mortal: Child) -> None:
    messages = mortal.run(a_round(LONG), Controls())
    next(iter(messages))
    messages.close()  # type: ignore[attr-defined]
    assert not mortal.alive


def test_lazy_pixels_are_computed_over_there(child: Child) -> None:
    lazy = da.map_blocks(lambda: np.full((4, 4), os.getpid()), chunks=((4,), (4,)), dtype=int)
    snapshot = Snapshot("lazy", lazy, False, None, np.zeros((1, 4, 4), np.int32))
    (planes,) = run(child, lambda *_: iter([snapshot.planes()]))
    assert planes.shape == (1, 4, 4, 1)
    assert (planes == child.pid).all()


def test_pixels_of_an_open_file_are_computed_here(child: Child, tmp_path) -> None:
    with open(tmp_path / "x", "w") as file:
        lazy = da.map_blocks(lambda: np.full((4, 4), file.fileno()), chunks=((4,), (4,)), dtype=int)
        snapshot = Snapshot("open", lazy, False, None, np.zeros((1, 4, 4), np.int32))
        (planes,) = run(child, lambda *_: iter([snapshot.planes()]))
        assert (planes == file.fileno()).all()


SCRIPT = """
    import sys, time
    print("top", flush=True)
    from napari_convlora.session.process import Child
    from napari_convlora.control import Controls

    def mine(session, controls):
        yield sys.modules["__main__"].__name__, {extra}

    child = Child()
    print(child.pid, flush=True)
    for messages in child.run(mine, Controls()):
        print(messages, flush=True)
    {end}
"""


@pytest.mark.parametrize("how", ["file", "console"])
def test_a_script_without_a_guard_runs_once_and_takes_its_process_along(how: str, tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not this one')")
    script = textwrap.dedent(SCRIPT.format(extra="1 + 1", end=""))
    (tmp_path / "script.py").write_text(script)
    if how == "file":
        (tmp_path / "torch.py").unlink()  # a script's own folder comes first, as ever
    command = [sys.executable, *(["script.py"] if how == "file" else ["-P", "-"])]
    done = subprocess.run(
        command, input=script, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    top, pid, messages = done.stdout.split("\n", 2)
    assert (top, messages) == ("top", "[('__main__', 2)]\n")
    assert gone(int(pid))


def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path) -> None:
    script = textwrap.dedent(SCRIPT.format(extra="time.sleep(1000)", end=""))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "top\n"
    pid = int(parent.stdout.readline())
    time.sleep(1)
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)
