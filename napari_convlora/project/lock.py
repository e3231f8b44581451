"""Which process has a folder open, so that no two write into it and a crash can be told.

Whoever has it open holds the operating system's lock of a file in it, which ends with the process
whatever happens. A second file says who that is: for people, to tell a crash, and in place of the
lock where the file system has none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from napari_convlora.errors import InputError
from napari_convlora.files.checked_json import build, read_json, write_checked_json
from napari_convlora.project.layout import inside

_FILE, _LOCK = "open.json", "open.lock"
_FORMAT = 1
_PATIENCE = 0.3
"""Seconds to wait for the lock, as somebody may be looking whether it is held."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockedError(InputError):
    """A project is open elsewhere; it can be opened all the same if its user wants to."""


@dataclass(frozen=True)
class _Holder:
    pid: int
    began: float
    host: str


def claim(folder: Path, *, anyway: bool = False) -> BaseFileLock:
    """Open `folder` for this process, after one that died if need be.

    Parameters
    ----------
    folder
        Of a project.
    anyway
        Whether to open what another process has open.

    Returns
    -------
    lock
        For `release`; it is let go of with the process at the latest.

    Raises
    ------
    LockedError
        Another living process has it open.
    InputError
        Nothing can be written there.
    """
    fresh = not inside(folder, _LOCK).exists()
    lock, pid, host = hold(folder, anyway=anyway), os.getpid(), elsewhere(folder)
    if host and not lock.is_locked and not anyway:  # its processes cannot be looked for
        raise LockedError(
            f"'{folder}' is perhaps open on {host}, which cannot be told where a file system has "
            "no locks; close it there."
        )
    this = _Holder(pid, psutil.Process(pid).create_time(), platform.node())
    try:
        write_checked_json(inside(folder, _FILE), {"format": _FORMAT, **asdict(this)})
    except InputError:
        if fresh:
            withdraw(folder, lock)
        lock.release()
        raise
    return lock


def hold(folder: Path, *, anyway: bool = False) -> BaseFileLock:
    """Take the lock of `folder` and write nothing; see `claim`."""
    lock = _lock(folder)
    taken, holder = _taken(lock), _living(folder)
    others = holder is not None and holder.pid != os.getpid()
    if (taken or others) and not anyway:
        lock.release()
        who = f" (process {holder.pid} on {holder.host})" if holder is not None else ""
        raise LockedError(f"'{folder}' is open in another window or command{who}; close it there.")
    return lock


def withdraw(folder: Path, lock: BaseFileLock) -> None:
    """Undo `claim` in a folder that was empty, and is to be again as nothing else found room."""
    with contextlib.suppress(OSError):  # Windows keeps what is held, and removes it on release
        (folder / _LOCK).unlink()
    release(folder, lock)


def release(folder: Path, lock: BaseFileLock) -> None:
    """Take note that this process has closed `folder` in good order."""
    with contextlib.suppress(InputError, OSError):
        holder = _holder(folder)
        if holder is not None and holder.pid == os.getpid():  # it may have been opened anyway
            inside(folder, _FILE).unlink(missing_ok=True)
    lock.release()


def is_open(folder: Path) -> bool:
    """Whether a living process has `folder` open."""
    if _living(folder) is not None:
        return True
    if not (folder / _LOCK).exists():  # nor need there be one to look for
        return False
    lock = _lock(folder)
    taken = _taken(lock)
    lock.release()
    return taken


def crashed(folder: Path) -> bool:
    """Whether the process that last had `folder` open died before it could close it."""
    return (folder / _FILE).exists() and not is_open(folder)


def elsewhere(folder: Path) -> str:
    """Return the other computer that had `folder` open last and has not closed it; "" if none."""
    holder = _holder(folder)
    return "" if holder is None or holder.host == platform.node() else holder.host


def _lock(folder: Path) -> BaseFileLock:
    path = inside(folder, _LOCK)
    with contextlib.suppress(OSError):
        found = path.stat()
        if found.st_nlink > 1 and found.st_size:  # ours are empty
            raise InputError(
                f"'{path}' is another file by a second name (a hard link), which locking it might "
                "empty; remove it."
            )
    # Of all threads, as a project is written and closed from several. A file in place of the lock
    # would outlive its process, and come along when a folder is copied.
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def _taken(lock: BaseFileLock) -> bool:
    """Take the lock if there are any on this file system, and return whether somebody has it."""
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        return True
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(
                f"'{lock.lock_file}' cannot be written ({error.strerror}); choose a folder that "
                "you may write to."
            ) from error
    return False


def _holder(folder: Path) -> _Holder | None:
    """Return who had `folder` open last and has not closed it in good order."""
    try:
        return build(_Holder, read_json(inside(folder, _FILE), _FORMAT))
    except (InputError, TypeError, ValueError):
        return None


def _living(folder: Path) -> _Holder | None:
    """Return the process of this computer, whatever its name is now, that has `folder` open."""
    holder = _holder(folder)
    if holder is not None:
        with contextlib.suppress(psutil.Error, OverflowError):
            # A number is given again to another process, but not at the same time.
            if abs(psutil.Process(holder.pid).create_time() - holder.began) < 1:
                return holder
    return None
