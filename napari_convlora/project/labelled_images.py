"""What a round of a project learns from."""

from __future__ import annotations

import logging

import numpy as np

from napari_convlora.errors import InputError
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.around_labels import labelled_parts
from napari_convlora.labels.classes import find_background
from napari_convlora.labels.reviewed import Outlines, fill_reviewed
from napari_convlora.project.image_entry import ImageEntry
from napari_convlora.project.labelled_folder import LabelledFolder
from napari_convlora.project.lost_labels import Lost, LostLabelsError
from napari_convlora.project.manifest import split_missing

logger = logging.getLogger(__name__)


def labelled_images(
    project: LabelledFolder, *, without_missing: bool
) -> tuple[tuple[str, ...], list[LabelledImage]]:
    """Return stems and contents of the annotated images with as many channels as the first.

    What is unpainted in reviewed regions is background. Large images come in parts. Images that
    cannot be found are left out with a warning.

    Parameters
    ----------
    project
        Of which.
    without_missing
        Whether to leave out, with a warning, images whose label files are lost.

    Raises
    ------
    LostLabelsError
        Label files are lost.
    InputError
        No image is annotated, none can be found, one cannot be read, or a background class is
        missing.
    """
    annotated = [e for e in project.manifest.images if e.annotated]
    if not annotated:
        raise InputError(
            f"Nothing is annotated in '{project.folder}' yet; paint strokes in its images first."
        )
    found, remark = split_missing(annotated, project.folder)
    if found and remark:
        logger.warning(remark)
    annotated = found or annotated[:1]  # which says where it was
    background = find_background(project.manifest.classes)
    painted: list[tuple[ImageEntry, np.ndarray, Outlines]] = []
    gone: list[Lost] = []
    for entry in annotated:
        if entry.shape[3] == annotated[0].shape[3]:
            try:
                painted.append((entry, *project.annotated(entry.stem)))
            except LostLabelsError as error:
                gone.extend(error.lost)
    if gone and not (without_missing and painted):
        raise LostLabelsError(*gone)
    if gone:
        logger.warning("Left out of the round: %s", LostLabelsError(*gone))
    images: list[LabelledImage] = []
    for entry, array, regions in painted:
        labels = fill_reviewed(array, regions, background, entry.name)
        parts = labelled_parts(entry.read(project.folder), labels, entry.name)
        images.extend(part for _, part in parts)
    return tuple(entry.stem for entry, *_ in painted), images
