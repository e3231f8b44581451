"""What is measured of single objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.measure import regionprops_table

from napari_convlora.config import UNLABELLED, ClassInfo


def region_table(
    instances: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[ClassInfo],
    uncertainty: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Describe every instance.

    Parameters
    ----------
    instances : (P, H, W) int
        1 to n, 0 is no object.
    labels : (P, H, W) int
        Class ids; every instance has the class of one of its pixels.
    classes
        The class table, for the names.
    uncertainty : (P, H, W) uint8
        In per cent; None leaves out the confidence.

    Returns
    -------
    table
        Columns of n values: ``index``, ``class_id``, ``class``, ``area`` in pixels, centroid
        (``plane``, ``row``, ``column``), bounding box with its ends excluded (``plane_start``,
        ``plane_stop``, ``row_start``, ...) and ``confidence``, the mean of 100 - uncertainty.
    """
    confidence = None if uncertainty is None else 100.0 - uncertainty
    wanted = ["label", "area", "centroid", "bbox"] + (confidence is not None) * ["intensity_mean"]
    found = regionprops_table(instances, confidence, properties=wanted)
    ids = np.zeros(int(instances.max(initial=0)) + 1, np.int64)
    ids[instances.ravel()] = labels.ravel()
    ids = ids[found["label"]]
    names = {UNLABELLED: "", **{info.id: info.name for info in classes}}
    table = {
        "index": found["label"],
        "class_id": ids,
        "class": np.array([names.get(int(i), f"class {i}") for i in ids], object),
        "area": found["area"].astype(np.int64),
    }
    axes = ("plane", "row", "column")
    table |= {axis: found[f"centroid-{i}"] for i, axis in enumerate(axes)}
    for i, axis in enumerate(axes):
        table[f"{axis}_start"], table[f"{axis}_stop"] = found[f"bbox-{i}"], found[f"bbox-{i + 3}"]
    if confidence is not None:
        table["confidence"] = found["intensity_mean"]
    return table
