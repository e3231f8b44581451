"""Keys that choose the class to paint with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from napari.layers import Labels

from napari_convlora.config import ClassInfo


def bind_keys(layer: Labels, classes: Sequence[ClassInfo]) -> None:
    """Let 1 to 9 choose a row of the class table, where napari has modes that have letters too."""
    for key, info in zip_longest("123456789", classes[:9]):
        layer.bind_key(key, _choosing(None if info is None else info.id), overwrite=True)


def _choosing(class_id: int | None) -> Callable[[Labels], None]:
    def choose(layer: Labels) -> None:
        if class_id is not None:  # napari's meaning of the key would surprise
            layer.selected_label = class_id

    return choose
