"""How a class table is written into a Labels layer, and read back from one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from napari.layers import Layer
from napari.utils.colormaps import DirectLabelColormap

from napari_convlora.config import MAX_CLASSES, ClassInfo
from napari_convlora.labels.classes import default_classes

KEY = "napari_convlora"
"""Entry of a layer's metadata that holds what this plugin knows about the layer."""


_OUTPUTS = ("prediction", "previous", "uncertainty", "instances", "region")


def is_output(layer: Layer) -> bool:
    """Whether `layer` was made by the model or a tool: it is neither image nor annotations."""
    return layer.metadata.get(KEY, {}).get("role") in _OUTPUTS


def colormap(classes: Sequence[ClassInfo]) -> DirectLabelColormap:
    """Return the class colours; an id outside the table shows in black."""
    colours: dict[int | None, str] = {info.id: info.colour for info in classes}
    return DirectLabelColormap(color_dict={0: "transparent", **colours, None: "black"})


def features(classes: Sequence[ClassInfo]) -> dict[str, list]:
    """Return the class names as layer features, which napari shows in its status bar."""
    return {
        "index": [0, *(info.id for info in classes)],
        "name": ["unlabelled", *(info.name for info in classes)],
    }


def metadata(classes: Sequence[ClassInfo], role: str, image: str) -> dict[str, Any]:
    """Return what tells a later session, or the writer, what a layer is."""
    return {KEY: {"role": role, "image": image, "classes": [asdict(info) for info in classes]}}


def attributes(classes: Sequence[ClassInfo], role: str, image: str) -> dict[str, Any]:
    """Return keyword arguments of a Labels layer that shows `classes`."""
    return {
        "colormap": colormap(classes),
        "features": features(classes),
        "metadata": metadata(classes, role, image),
    }


def known_classes(meta: Mapping[str, Any]) -> tuple[ClassInfo, ...]:
    """Return the class table in a layer's attributes, from the surest source there is.

    Parameters
    ----------
    meta
        Layer attributes with any of ``metadata``, ``features`` and ``colormap``.
    """
    rows = (meta.get("metadata") or {}).get(KEY, {}).get("classes")
    if rows:
        return tuple(
            ClassInfo(int(r["id"]), str(r["name"]), str(r["colour"]), r.get("background") is True)
            for r in rows
        )
    names = names_of(meta.get("features"))
    colours = colours_of(meta.get("colormap"))
    ids = {*names, *colours} - {0}
    return tuple(
        ClassInfo(
            info.id,
            names.get(info.id, info.name),
            colours.get(info.id, info.colour),
        )
        for info in default_classes(i for i in ids if 0 < i <= MAX_CLASSES)
    )


def complete_classes(classes: Iterable[ClassInfo], ids: Iterable[int]) -> tuple[ClassInfo, ...]:
    """Return `classes` with a default row for every one of `ids` that lacks one."""
    table = {info.id: info for info in classes}
    for info in default_classes(ids):
        table.setdefault(info.id, info)
    return tuple(table[i] for i in sorted(table))


def names_of(table: Any) -> dict[int, str]:
    """Return class names by id from a layer's features."""
    if table is None or "index" not in table or "name" not in table:
        return {}
    pairs = zip(table["index"], table["name"], strict=True)
    return {int(i): str(name) for i, name in pairs if str(name).strip() and name == name}


def colours_of(colormap: Any) -> dict[int, str]:
    """Return colours by id from a layer's colormap, if it names them one by one."""
    table = getattr(colormap, "color_dict", {})
    return {i: _hex(colour) for i, colour in table.items() if isinstance(i, int)}


def _hex(colour: Any) -> str:
    red, green, blue = (round(255 * float(c)) for c in np.asarray(colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"
