"""Which process has a folder open, so that no two write into it and a crash can be told."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from napari_convlora.config import InputError
from napari_convlora.project.checked import build, read_json, write_json

_FILE = "open.json"
_FORMAT = 1


@dataclass(frozen=True)
class _Holder:
    pid: int
    began: float
    host: str


def claim(folder: Path) -> None:
    """Take note that this process has `folder` open, after a process that died if need be.

    Raises
    ------
    InputError
        Another living process has it open, or nothing can be written there.
    """
    holder = _holder(folder)
    if holder is not None and holder != os.getpid():
        raise InputError(
            f"'{folder}' is open in another window or command (process {holder}); close it there."
        )
    pid = os.getpid()
    this = _Holder(pid, psutil.Process(pid).create_time(), platform.node())
    write_json(folder / _FILE, {"format": _FORMAT, **asdict(this)})


def release(folder: Path) -> None:
    """Take note that this process has closed `folder` in good order."""
    with contextlib.suppress(OSError):
        (folder / _FILE).unlink(missing_ok=True)


def is_open(folder: Path) -> bool:
    """Whether a living process has `folder` open."""
    return _holder(folder) is not None


def crashed(folder: Path) -> bool:
    """Whether the process that last had `folder` open died before it could close it."""
    return (folder / _FILE).exists() and not is_open(folder)


def _holder(folder: Path) -> int | None:
    """Process that has `folder` open; one on another computer counts as living."""
    try:
        holder = build(_Holder, read_json(folder / _FILE, _FORMAT))
    except (InputError, TypeError, ValueError):
        return None
    if holder.host != platform.node():
        return holder.pid
    with contextlib.suppress(psutil.Error, OverflowError):
        # A number is given again to another process, but not at the same time.
        if abs(psutil.Process(holder.pid).create_time() - holder.began) < 1:
            return holder.pid
    return None
