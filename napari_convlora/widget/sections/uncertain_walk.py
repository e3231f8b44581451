"""From one uncertain place to the next, and at the end of an image on to the next image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from napari.layers import Image

from napari_convlora.labels.reviewed import fill_outlines, inside_outlines
from napari_convlora.prediction.uncertain_places import Guide, Place
from napari_convlora.widget.layers import edits
from napari_convlora.widget.layers.camera import show_place
from napari_convlora.widget.layers.class_colours import is_output

if TYPE_CHECKING:
    from napari_convlora.widget.layers.image_layers import ImageLayers
    from napari_convlora.widget.layers.open_images import OpenImages

NEXT_KEY = "N"
_PLACES_WIDE = 4


class UncertainWalk:
    """Shows one uncertain place of the current image after the other.

    Parameters
    ----------
    images
        Whose current image is meant; its uncertainty is known.
    say
        Called with one sentence on where the user is.

    Attributes
    ----------
    following
        Returns the name of the next image of the project; "" if there is none.
    """

    def __init__(self, images: OpenImages, say: Callable[[str], object]) -> None:
        self._images, self._say = images, say
        self._seen: Guide | None = None  # which has no other place
        self.following: Callable[[], str] = str

    def at_end(self) -> bool:
        """Whether every place was shown, and there is another image to go on with."""
        guide = self._images.need().extra.guide
        return guide is not None and guide is self._seen and bool(self.following())

    def leave(self) -> None:
        """Forget that every place was shown."""
        self._seen = None

    def go_on(self) -> None:
        """Show the next place, or say that there is none."""
        record = self._images.need()
        guide = record.extra.guide
        assert guide is not None
        place = next_place(record, guide)
        if place is None:
            done = f"Nothing else in '{record.image.name}' is uncertain. "
            if fill_outlines(edits.labelled(record), record.outlines(), True).all():
                done = f"All of '{record.image.name}' is painted or reviewed. "
            self._say(done + self._what_now(record.image, bool(guide.visited)))
            guide.restart()
            self._seen = guide
            return
        show_place(record, place, _PLACES_WIDE * record.extra.spacing)
        planes = record.planes_shape[0]
        plane = f"plane {place.plane + 1} of {planes}, " if planes > 1 else ""
        self._say(
            f"Place {len(guide.visited)}: {plane}row {place.row}, column {place.column}, "
            f"{place.uncertainty:.0f} % uncertain. Paint what it is, or press {NEXT_KEY} to go on."
        )

    def _what_now(self, image: Image, again: bool) -> str:
        following = self.following()
        if following:
            return f"Press {NEXT_KEY} again to open '{following}', the next image of the project."
        images = [
            layer
            for layer in self._images.viewer.layers
            if isinstance(layer, Image) and not is_output(layer)
        ]
        at = images.index(image)
        others = images[at + 1 :] + images[:at]
        other = f"Go on with '{others[0].name}': choose it at the top. " if others else ""
        return other + (f"Press {NEXT_KEY} to see its places again." if again else "")


def next_place(record: ImageLayers, guide: Guide) -> Place | None:
    """Return the next place that is neither painted nor reviewed; None if there is none."""
    outlines = record.outlines()

    @cache  # a plane of which no place is looked at is not drawn
    def reviewed(plane: int) -> np.ndarray:
        here = [(0, vertices) for p, vertices in outlines if p == plane]
        return inside_outlines((1, *record.planes_shape[1:]), here)[0]

    return guide.next(lambda part: edits.labelled(record, part) | reviewed(part[0])[part[1:]])
