"""Work that has no project yet is kept aside, and offered again after a crash."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.files.atomic import data_folder
from napari_convlora.project import lock
from napari_convlora.project.folder import Project
from napari_convlora.project.layout import MANIFEST
from napari_convlora.project.lost_labels import with_first_counts
from napari_convlora.project.manifest import Manifest

MOST = 5
"""Unsaved sessions kept; older ones are removed."""


@dataclass(frozen=True)
class Leftover:
    """An unsaved session: its folder, how much was annotated in it, and when."""

    folder: Path
    images: int
    pixels: int
    regions: int
    when: float
    crashed: bool
    host: str
    """Another computer, on which it is perhaps still open; "" for this one."""

    @property
    def sentence(self) -> str:
        """What there is, and why."""
        when = time.strftime("%d %B, %H:%M", time.localtime(self.when))
        how = "napari ended unexpectedly" if self.crashed else "napari was closed without saving"
        if self.host:
            how = f"napari on {self.host} ended unexpectedly or runs there still, and last saved"
        images = "1 image" if self.images == 1 else f"{self.images} images"
        regions = f", {self.regions} reviewed region{'s' * (self.regions > 1)}"
        what = f"{self.pixels:,} painted pixels{regions * bool(self.regions)} on {images}"
        return f"{how[0].upper()}{how[1:]} on {when}: {what}."


def root() -> Path:
    """Return the folder of unsaved sessions; ``NAPARI_CONVLORA_RECOVERY`` names another."""
    return data_folder() / "recovery"


def begin(manifest: Manifest) -> Project:
    """Make a project aside for a session that has none.

    Raises
    ------
    InputError
        Nothing can be written there.
    """
    return Project.create(
        root() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}", manifest
    )


def leftovers() -> list[Leftover]:
    """Return unsaved sessions whose process is gone, newest first; only the newest are kept.

    None that another computer has left open is removed, as its locks may not be seen here.
    """
    found: list[Leftover] = []
    for path in sorted(root().glob(f"*/{MANIFEST}"), key=_when, reverse=True):
        try:
            if lock.is_open(path.parent):
                continue
            entries = [with_first_counts(e, path.parent) for e in Manifest.read(path).images]
        except ConvLoRAError:  # a newer version's, damaged, or not ours to write
            continue
        images, host = [e for e in entries if e.annotated], lock.elsewhere(path.parent)
        if images and (host or len(found) < MOST):
            pixels = sum(sum(e.counts.values()) for e in images)
            regions = sum(e.regions for e in images)
            crashed = lock.crashed(path.parent)
            much = len(images), pixels, regions
            found.append(Leftover(path.parent, *much, _when(path), crashed, host))
        elif not host:
            discard(path.parent)
    return found


def discard(folder: Path) -> None:
    """Remove an unsaved session, unless a window has it open."""
    if folder.resolve().parent != root().resolve():
        return
    with contextlib.suppress(InputError):
        held = lock.hold(folder)  # which needs no room on the disk
        shutil.rmtree(folder, ignore_errors=True)
        held.release()
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps a file that is held


def _when(path: Path) -> float:
    return path.stat().st_mtime
