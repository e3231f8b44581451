"""Who has a project open: locks of the operating system, ways out, and leftovers of the dead."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest

from napari_convlora.cli import commands, parser
from napari_convlora.errors import InputError
from napari_convlora.project import ImageEntry, LockedError, Manifest, Project, lock, recovery

SHAPE = (1, 20, 30, 1)

_OPENS = """
import sys
from pathlib import Path
from napari_convlora.config import InputError
from napari_convlora.project import Project
print("ready", flush=True)
sys.stdin.readline()
try:
    project = Project.open(Path(sys.argv[1]))
    print("open", flush=True)
except InputError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


@contextmanager
def processes(folder: Path, n: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that open a project when they are sent a line, and keep it until they end."""
    command = [sys.executable, "-c", _OPENS, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [subprocess.Popen(command, **pipes) for _ in range(n)]
    try:
        for one in started:
            assert one.stdout.readline() == "ready\n"
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def open_in(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    return process.stdout.readline().strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed project with an image and a stroke."""
    project = Project.create(tmp_path / "p")
    entry = project.add(ImageEntry("", "cells", "", "", SHAPE, SHAPE[1:3]), np.zeros(SHAPE))
    project.keep_annotations(entry.stem, np.ones(SHAPE[:3], np.int32))
    project.close()
    return project.folder


def leave(folder: Path, pid: int, began: float, host: str) -> None:
    """Write what says that a process has a folder open."""
    holder = {"format": 1, "pid": pid, "began": began, "host": host}
    (folder / "open.json").write_text(json.dumps(holder))


def test_of_processes_that_start_at_once_exactly_one_opens_a_project(folder: Path) -> None:
    with processes(folder, 3) as several:
        for one in several:
            one.stdin.write("\n")
        said = [one.stdout.readline().strip() for one in several]
        assert said.count("open") == 1
        assert all(s == "open" or "close it there" in s for s in said)


def test_a_killed_process_locks_nobody_out_and_a_new_host_name_neither(folder: Path) -> None:
    with processes(folder, 1) as (other,):
        assert open_in(other) == "open"
        held = json.loads((folder / "open.json").read_text())
        leave(folder, held["pid"], held["began"], "laptop.at-home")  # it has moved meanwhile
        with pytest.raises(LockedError, match=f"process {other.pid}"):
            Project.open(folder)
        assert lock.is_open(folder)
        other.kill()
        other.wait()
        assert lock.crashed(folder)
        Project.open(folder).close()
    assert not lock.crashed(folder)


@pytest.mark.parametrize("host", ["here", "renamed.example.org"])
def test_what_an_older_version_left_behind_does_not_lock(folder: Path, host: str) -> None:
    (folder / "open.lock").unlink()  # which it did not write
    leave(folder, 999_999_999, 1.0, host)
    project = Project.open(folder)
    assert (project.annotations("cells")[0] == 1).all()


def test_an_older_version_that_has_it_open_is_respected(folder: Path) -> None:
    with processes(folder, 1) as (other,):
        leave(folder, other.pid, psutil.Process(other.pid).create_time(), "anywhere")
        with pytest.raises(LockedError):
            Project.open(folder)


def test_two_windows_of_one_process_do_not_share_a_project(folder: Path) -> None:
    with closing(Project.open(folder)), pytest.raises(LockedError):
        Project.open(folder)
    Project.open(folder).close()


def test_opened_anyway_it_can_be_used_and_stays_the_others(folder: Path) -> None:
    with processes(folder, 2) as (other, third):
        assert open_in(other) == "open"
        project = Project.open(folder, anyway=True)
        project.keep_annotations("cells", np.full(SHAPE[:3], 2))
        project.close()
        assert "close it there" in open_in(third)
    assert (Project.open(folder).annotations("cells")[0] == 2).all()


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "no locks")])
def test_where_there_are_no_locks_the_owners_file_has_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    Project.open(folder).close()
    assert not lock.is_open(folder)
    with processes(folder, 1) as (other,):
        assert open_in(other) == "open"
        with pytest.raises(LockedError):
            Project.open(folder)
    Project.open(folder).close()


def test_a_folder_that_may_not_be_written_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(InputError, match="Permission denied") as failure:
        Project.open(folder)
    assert not isinstance(failure.value, LockedError)


def test_work_of_a_crash_is_offered_whatever_the_computer_is_called_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(tmp_path))
    project = recovery.begin(Manifest())
    project.add(ImageEntry("", "cells", "", "", SHAPE, SHAPE[1:3]), np.zeros(SHAPE))
    project.keep_annotations("cells", np.ones(SHAPE[:3], np.int32))
    assert recovery.leftovers() == []  # it is still open
    recovery.discard(project.folder)
    assert (project.folder / "annotations" / "cells.tif").exists()
    project.close()
    leave(project.folder, 999_999_999, 1.0, "renamed.example.org")
    (left,) = recovery.leftovers()
    assert (left.folder, left.pixels, left.crashed) == (project.folder, 600, True)
    recovery.discard(left.folder)
    assert recovery.leftovers() == []
    assert not project.folder.exists()


def unsaved(strokes: bool) -> Project:
    """Begin a session that has no project yet."""
    project = recovery.begin(Manifest())
    project.add(ImageEntry("", "cells", "", "", SHAPE, SHAPE[1:3]), np.zeros(SHAPE))
    if strokes:
        project.keep_annotations("cells", np.ones(SHAPE[:3], np.int32))
    return project


@pytest.fixture
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of unsaved sessions."""
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(tmp_path / "aside"))
    return recovery.root()


def test_a_live_session_of_another_computer_is_never_removed_unasked(aside: Path) -> None:
    # Its home is shared, and the locks of one computer are not seen on the other.
    folders = []
    for i in range(recovery.MOST + 2):
        project = unsaved(strokes=i > 0)
        project.close()
        leave(project.folder, 999_999_999, 1.0, "node17")
        folders.append(project.folder)
    left = recovery.leftovers()
    assert {one.folder for one in left} == set(folders[1:])  # of the other nothing can be offered
    assert all(folder.exists() for folder in folders)
    assert "napari on node17" in left[0].sentence.lower()
    recovery.discard(left[0].folder)
    assert not left[0].folder.exists()


def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fail)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks otherwise")
def test_without_locks_another_computer_is_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_flock(monkeypatch)
    leave(folder, 999_999_999, 1.0, "node17")
    with pytest.raises(LockedError, match="node17"):
        Project.open(folder)
    assert json.loads((folder / "open.json").read_text())["host"] == "node17"
    Project.open(folder, anyway=True).close()
    Project.open(folder).close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks otherwise")
def test_where_flock_is_not_implemented_a_file_that_lies_there_locks_nobody_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_flock(monkeypatch)
    assert (folder / "open.lock").exists()  # it has come with a copy of the folder
    for _ in range(2):
        project = Project.open(folder)
        assert lock.is_open(folder)
        project.close()
        assert not lock.is_open(folder)


def test_a_lock_that_is_another_file_by_a_second_name_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    thesis, lock = tmp_path / "thesis.txt", folder / "open.lock"
    thesis.write_text("three years")
    lock.unlink()
    os.link(thesis, lock)
    with pytest.raises(InputError, match="hard link") as failure:
        Project.open(folder)
    assert not isinstance(failure.value, LockedError)
    assert thesis.read_text() == "three years"
    lock.unlink()
    Project.open(folder).close()


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


def test_on_a_full_disk_unsaved_work_can_be_discarded(
    aside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = unsaved(strokes=True)
    fill_disk(monkeypatch)
    recovery.discard(project.folder)
    assert project.folder.exists()  # as it is open
    lock.release(project.folder, project._claim)
    recovery.discard(project.folder)
    assert not project.folder.exists()


@pytest.mark.parametrize("written", [0, 1])
def test_a_folder_that_was_too_full_for_a_project_can_be_used_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    real = lock.write_checked_json
    with monkeypatch.context() as patched:
        if written:  # what says who has it open finds room, and the manifest does not

            def write(path: Path, data: dict) -> None:
                real(path, data)
                fill_disk(patched)

            patched.setattr(lock, "write_checked_json", write)
        else:
            fill_disk(patched)
        with pytest.raises(InputError, match="full"):
            Project.create(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    Project.create(tmp_path / "new").close()


def test_a_copy_that_finds_no_room_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.open(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.copystat", full)  # when a first folder has been copied
        with pytest.raises(InputError, match="cannot be written"):
            project.save_as(tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
    there = project.save_as(tmp_path / "copy")
    assert (there.annotations("cells")[0] == 1).all()


def test_the_command_names_its_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["predict", "--project", str(folder)]
    with closing(Project.open(folder)):
        assert parser.main(predict) == commands.FAILED
        said = capsys.readouterr().err
        assert "close it there, or give --open-anyway." in said
        assert parser.main([*predict, "--open-anyway"]) == commands.FAILED
        assert "No round is installed" in capsys.readouterr().err
    for command in ("adapt", "predict"):
        assert parser.main([command, "--open-anyway"]) == parser.BAD_USAGE
