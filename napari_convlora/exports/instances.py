"""From classes to single objects, and both as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
from scipy import ndimage
from skimage.measure import label
from skimage.morphology import h_maxima
from skimage.segmentation import relabel_sequential, watershed

from napari_convlora.config import UNLABELLED
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import atomic_write
from napari_convlora.files.tables import write_csv
from napari_convlora.formats.tiff import MOST_CLASSIC_BYTES

Splitting = Literal["components", "watershed"]
_RISE = 0.5
"""Pixels of half-width by which an object must be wider than the neck to its neighbour."""


def find_instances(
    labels: np.ndarray,
    class_ids: Sequence[int],
    *,
    method: Splitting = "components",
    min_size: int = 1,
    join_planes: bool = False,
) -> np.ndarray:
    """Give every object of some classes a number of its own.

    Parameters
    ----------
    labels : (P, H, W) int
        Class ids.
    class_ids
        Classes that consist of objects.
    method
        ``components``: pixels of a class that touch, diagonals included, are one object.
        ``watershed``: such a region is cut where it is narrow, along the watershed of the
        distance to its edge.
    min_size
        Smaller objects are left out; in pixels, or voxels if planes are joined.
    join_planes
        Whether an object goes on in the next plane.

    Returns
    -------
    instances : (P, H, W) int32
        0 where there is no object, else 1 to n without gaps.
    """
    wanted = np.where(np.isin(labels, class_ids), labels, UNLABELLED)
    instances = np.zeros(labels.shape, np.int32)
    count = 0
    for part in [np.s_[:]] if join_planes else [np.s_[p] for p in range(len(labels))]:
        # Equal neighbours are one region, so classes never run into each other.
        whole = method == "components"
        regions = label(wanted[part], background=UNLABELLED) if whole else _split(wanted[part])
        sizes = np.bincount(regions.ravel())
        regions[(sizes < min_size)[regions]] = 0
        regions = relabel_sequential(regions)[0]
        instances[part] = np.where(regions, regions + count, 0)
        count += int(regions.max(initial=0))
    return instances


def _split(classes: np.ndarray) -> np.ndarray:
    """Cut regions along the watershed of the distance to their edge.

    Seeds are maxima that rise by `_RISE` above the way to a higher one, so that a region of
    about the same width everywhere stays whole.
    """
    result = np.zeros(classes.shape, np.int64)
    for class_id in np.unique(classes[classes != UNLABELLED]):
        mask = classes == class_id
        regions = label(mask)
        if not mask.all():
            distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
            seeds = label(h_maxima(distance, _RISE) * mask)
            found = watershed(-distance, seeds, connectivity=mask.ndim, mask=mask)  # as label
            # What is too small or too thin for a seed of its own is an object nonetheless.
            regions = np.where(found, found, (regions + found.max()) * mask)
        result[mask] = regions[mask] + result.max()
    return result


def save_instances(
    instances: np.ndarray, table: dict[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Write the table as CSV, and for a TIFF path the instances too.

    Parameters
    ----------
    instances : (P, H, W) int32
    table
        Of :func:`region_table`.
    path
        ``.csv``: the table alone. ``.tif`` or ``.tiff``: int32 instances, zlib-compressed, with
        the table of the same name beside.

    Raises
    ------
    InputError
        Another suffix, or a file that cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tif", ".tiff"):
        raise InputError(f"'{path.name}' ends in '{path.suffix}'; use .tif or .csv.")
    if suffix != ".csv":
        planes = instances[0] if len(instances) == 1 else instances
        with atomic_write(path) as file:
            tifffile.imwrite(
                file,
                planes,
                photometric="minisblack",
                metadata={"axes": "ZYX"[-planes.ndim :]},
                compression="zlib",
                bigtiff=instances.nbytes > MOST_CLASSIC_BYTES,
            )
    columns = [c.round(3) if c.dtype.kind == "f" else c for c in table.values()]
    rows = zip(*(c.tolist() for c in columns), strict=True)
    write_csv(
        path.with_suffix(".csv"), [*table], (dict(zip(table, row, strict=True)) for row in rows)
    )
