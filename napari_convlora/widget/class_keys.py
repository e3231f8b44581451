"""Keys that choose the class to paint with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from napari.layers import Labels

from napari_convlora.config import ClassInfo


def bind_keys(layer: Labels, classes: Sequence[ClassInfo]) -> None:
    """Let 1 to 9 choose a row of the class table, where napari has modes that have letters too."""
    for key, info in zip_longest("123456789", classes[:9]):
        # ... keeps napari's own meaning of the key from surprising who has fewer classes
        layer.bind_key(key, ... if info is None else _choosing(info.id), overwrite=True)


def _choosing(class_id: int) -> Callable[[Labels], None]:
    def choose(layer: Labels) -> None:
        layer.selected_label = class_id

    return choose
