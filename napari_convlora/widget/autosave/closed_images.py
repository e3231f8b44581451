"""Annotated images of a project that are not open, read for a round to learn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from napari_convlora.project import ImageEntry, LostLabelsError, Project, split_missing
from napari_convlora.project.background_writer import Writer
from napari_convlora.project.lost_labels import Lost
from napari_convlora.session.snapshot import OnDisk, Snapshot
from napari_convlora.widget.autosave.image_work import Home, ImageWork
from napari_convlora.widget.engine.workflow import ClosedImages


def closed_images_reader(
    project: Project,
    writer: Writer,
    here: Sequence[ImageWork],
    removed: Sequence[ImageWork],
    n_channels: int,
    background_id: int | None,
) -> Callable[[], ClosedImages] | None:
    """Return what reads, in a thread, the images to learn from as they are now.

    Parameters
    ----------
    project, writer
        Where images are, and what writes there.
    here, removed
        The images that are open, and those that were taken out of the viewer.
    n_channels, background_id
        Of what a round learns from.

    Returns
    -------
    Callable or None
        None if there is nothing to be read.
    """
    # Labels of an open image are lost if they are neither in their file nor painted anew.
    alike = [k for k in here if k.stem is not None and k.record.n_channels == n_channels]
    bare = [k.home for k in alike if k.bare]
    left_out = [k.home for k in (*here, *removed)]
    known = {home.stem for home in left_out}
    if all(e.stem in known for e in project.manifest.images) and not bare:
        return None
    return partial(_read, project, writer, left_out, bare, n_channels, background_id)


def _read(
    project: Project,
    writer: Writer,
    left_out: Sequence[Home],
    bare: Sequence[Home],
    n_channels: int,
    background_id: int | None,
) -> ClosedImages:
    writer.flush()  # counts, and what was just closed, are on disk then
    known = {home.stem for home in left_out}
    entries = [entry for entry in project.manifest.images if entry.stem not in known]
    stored = [e for e in entries if e.annotated and e.shape[3] == n_channels]
    found, remark = split_missing(stored, project.folder)
    snapshots: list[Snapshot] = []
    lost: list[Lost] = []
    for entry in found:
        try:
            snapshots.append(_stored_snapshot(project, entry, background_id))
        except LostLabelsError as error:
            lost.extend(error.lost)
    for stem in [home.stem for home in bare if home.stem is not None]:
        try:
            project.annotated(stem)
        except LostLabelsError as error:
            lost.extend(error.lost)
    return ClosedImages(snapshots, remark, LostLabelsError(*lost) if lost else None)


def _stored_snapshot(project: Project, entry: ImageEntry, background_id: int | None) -> Snapshot:
    painted, regions = project.annotated(entry.stem)
    how = OnDisk(entry, project.folder), entry.rgb, entry.channel_axis
    return Snapshot(entry.name, *how, painted, None, regions, background_id, entry.stem)
