"""Writing files that are never half-written, and never over what they are made from.

Neither is anything read or written that is no file: a pipe or a device would be waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

from napari_convlora.errors import ConvLoRAError, InputError

_WRITE_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another disk",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
    errno.EACCES: "permission is denied; choose a folder you may write to",
    errno.EPERM: "permission is denied; choose a folder you may write to",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.ENOENT: "its folder does not exist; create the folder first",
    errno.ENOTDIR: "part of its path is a file; choose another folder",
    errno.EISDIR: "a folder has that name; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file whose content replaces `path` only once it is complete.

    Parameters
    ----------
    path
        File to create or replace; its folder must exist. A symbolic link is followed.

    Yields
    ------
    file
        Seekable, open for reading and writing, in the same folder as `path`.

    Raises
    ------
    InputError
        The disk is full, the folder absent or not writable, `path` a pipe or device, or another
        ``OSError`` while writing. As after any other exception, the old file is then whole.
    """
    check_no_device(path)
    target = Path(os.path.realpath(path))
    # Not derived from the target's name, which may already be as long as a name can be.
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only")
        try:
            # Mode "x" rather than tempfile's 0600: colleagues must be able to read the result.
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o777)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = f"{error.strerror or error}; check the disk or choose another folder"
        remedy = _WRITE_REMEDIES.get(error.errno or 0, reason)
        raise InputError(f"'{path}' cannot be written: {remedy}.") from error
    with contextlib.suppress(OSError):  # Windows cannot open a folder; nothing to flush there
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_no_device(path: str | os.PathLike[str], kind: type[ConvLoRAError] = InputError) -> None:
    """Raise a `kind` of error if `path` is neither a file nor a folder nor absent.

    A pipe would be waited for, a device may never end, and neither can be replaced.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise kind(f"'{path}' is a {what}, which is neither read nor written here; give a file.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work whether a file can be written at `path`.

    Raises
    ------
    InputError
        Its folder is absent or not writable, or it is a pipe or device.
    """
    check_no_device(path)
    folder = Path(path).absolute().parent
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has that name")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written ({error.strerror}); choose a folder that exists and "
            "that you may write to."
        ) from error


def check_apart(
    results: Iterable[str | os.PathLike[str]], sources: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise an `InputError` if a result would replace what it is made from."""
    read = set(map(os.path.realpath, sources))
    for path in results:
        if os.path.realpath(path) in read:
            raise InputError(
                f"'{path}' is read here, and the result would replace it; choose another name or "
                "folder for the result."
            )


def make_folder(path: Path) -> None:
    """Create a folder for results, and those above it, where they are absent.

    Raises
    ------
    InputError
        It cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot create {path} ({error.strerror}); choose a folder you may write to."
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Find out before long work whether `needed` bytes fit where `path` is, or will be.

    Raises
    ------
    InputError
        The disk has less.
    """
    places = [path, *path.absolute().parents]
    folder = next((p for p in places if p.is_dir()), path)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # some network disks do not tell
        return
    if free < needed:
        raise InputError(
            f"'{folder}' has {free / 1e6:.1f} MB free, but about {needed / 1e6:.1f} MB will be "
            "written; free some space or choose another folder."
        )


def data_folder() -> Path:
    """Return where unsaved work goes; ``NAPARI_CONVLORA_RECOVERY`` names another place."""
    named = os.environ.get("NAPARI_CONVLORA_RECOVERY")
    return Path(named or platformdirs.user_data_dir("napari-convlora", False))


def rescued(
    error: Exception, path: Path, write: Callable[[Path], object], *first: Path
) -> ConvLoRAError:
    """Have a result that took long written to the next place that is writable.

    Parameters
    ----------
    error
        Why it could not be written where it was to go.
    path
        Where that was; the new name is made from it.
    write
        Writes it, atomically, to the path it is given.
    first
        Paths that are tried before the folder of unsaved work and that of temporary files.

    Returns
    -------
    error
        To be raised: the sentence of `error`, with where the result is now.
    """
    name = f"{path.stem or 'adapter'}-{secrets.token_hex(4)}{path.suffix}"
    folders = (data_folder() / "rescued", Path(tempfile.gettempdir()))
    for place in (*first, *(folder / name for folder in folders)):
        try:
            make_folder(place.parent)
            write(place)
        except ConvLoRAError:
            continue
        sentence = str(error).rstrip(".")
        return ConvLoRAError(f"{sentence}; what was learnt is in {place.absolute()} instead.")
    return ConvLoRAError(str(error))
