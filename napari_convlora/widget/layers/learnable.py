"""What a round may learn from the images of a session, and what is still missing for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from napari_convlora.config import listed
from napari_convlora.labels.classes import find_background
from napari_convlora.widget.layers.image_layers import ImageLayers
from napari_convlora.widget.layers.open_images import OpenImages

if TYPE_CHECKING:
    from napari_convlora.project import ImageEntry


def learnable_images(images: OpenImages) -> list[ImageLayers]:
    """Return the current image and the annotated ones with as many channels."""
    current = images.need()
    others = [other for other in images.records if other is not current and other.teaching]
    return [current, *(other for other in others if other.n_channels == current.n_channels)]


def learnable_pixels(images: OpenImages) -> dict[int, int]:
    """Return annotated pixels per class id that a round would learn from.

    Those that remain unpainted in reviewed regions are background; in other images than the
    current one they are not counted, but their class is known to be there.
    """
    pixels, background = dict(images.counts.pixels), find_background(images.classes)
    regions, remaining = 0, images.counts.remaining
    for entry in _others(images):
        regions += entry.regions
        for class_id, n in entry.counts.items():
            pixels[class_id] = pixels.get(class_id, 0) + n
    if background is not None and (regions or remaining):
        pixels[background] = pixels.get(background, 0) + remaining
    return pixels


def next_step(images: OpenImages) -> str:
    """Say what the user should do next, unless there is news."""
    if images.current is None:
        return "Open an image to begin, or try File > Open Sample > Conv-LoRA."
    pixels = learnable_pixels(images)
    enough = len(pixels) >= 2
    if not images.current.annotating:
        each = "" if enough else " of each class in the table"
        return f"Press Start annotating, then paint a few strokes{each}."
    missing = [info.name for info in images.classes if info.id not in pixels]
    if enough:
        others = [f"'{entry.name}'" for entry in _others(images)]
        own = [f"'{images.current.image.name}'"] if images.counts.pixels else []
        where = f" of {listed(own + others)}" if others else ""
        but = f"; no labels yet for {listed(missing)}" if missing else ""
        n_pixels = sum(pixels.values())
        return f"Press Adapt to learn from {n_pixels:,} annotated pixels{where}{but}."
    if pixels and missing:
        return f"No labels yet for {listed(missing)}: select a class and paint a stroke."
    return "Select a class in the table and paint a stroke; do so for two classes or more."


def _others(images: OpenImages) -> list[ImageEntry]:
    if images.current is None:
        return []
    n = images.current.n_channels
    return [entry for entry in images.elsewhere() if entry.annotated and entry.shape[3] == n]
