"""Who has a project open: locks of the operating system, ways out, and leftovers of the dead."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest

from napari_convlora import cli, commands
from napari_convlora.config import InputError
from napari_convlora.project import ImageEntry, LockedError, Manifest, Project, owner, recovery

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
        assert owner.is_open(folder)
        other.kill()
        other.wait()
        assert owner.crashed(folder)
        Project.open(folder).close()
    assert not owner.crashed(folder)


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
    assert not owner.is_open(folder)
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


def test_the_command_names_its_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["predict", "--project", str(folder)]
    with closing(Project.open(folder)):
        assert cli.main(predict) == commands.FAILED
        said = capsys.readouterr().err
        assert "close it there, or give --open-anyway." in said
        assert cli.main([*predict, "--open-anyway"]) == commands.FAILED
        assert "No round is installed" in capsys.readouterr().err
    for command in ("adapt", "predict"):
        assert cli.main([command, "--open-anyway"]) == cli.BAD_USAGE
