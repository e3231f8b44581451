"""Parts of the prediction become annotations, or are cleared, and the user is told how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from napari.layers import Labels

from napari_convlora.errors import InputError
from napari_convlora.prediction.uncertain_places import component
from napari_convlora.widget.layers import edits
from napari_convlora.widget.tools.region_tool import RegionTool

if TYPE_CHECKING:
    from napari_convlora.widget.layers.image_layers import ImageLayers
    from napari_convlora.widget.layers.open_images import OpenImages


class AcceptReject:
    """Accepts (annotates) or rejects (clears) parts of the prediction of the current image.

    Parameters
    ----------
    images
        Whose current image is meant.
    tool
        While it is active, Ctrl-Z is its own.
    say
        Called with one sentence on what has happened.

    Attributes
    ----------
    all_planes
        Whether to act in all planes rather than in the one that is shown.
    """

    def __init__(self, images: OpenImages, tool: RegionTool, say: Callable[[str], object]) -> None:
        self._images, self._tool, self._say = images, tool, say
        self._changed: Labels | None = None
        self.all_planes = False

    def pixels(self, accept: bool, mask: np.ndarray, first: int) -> None:
        """Act on pixels of some planes.

        Parameters
        ----------
        accept
            Whether they become annotations rather than being cleared.
        mask : (p, H, W) bool
            The pixels.
        first
            Plane at which `mask` begins.
        """
        record = self._images.need()
        count = self._images.accept(mask, first) if accept else edits.reject(record, mask, first)
        if not count:
            known = "painted" if accept else "painted or reviewed"
            self._say(f"Nothing was changed: there is no prediction, or it is {known} already.")
            return
        self._changed = record.annotations if accept else record.prediction
        if not self._tool.active:  # so that Ctrl-Z reaches it
            record.viewer.layers.selection.active = self._changed
        done = "are annotations now" if accept else "are cleared until the next prediction"
        self._say(f"{count:,} pixels {done}; Ctrl-Z takes it back.")

    def region(self, accept: bool, at: tuple[int, int, int]) -> None:
        """Act on the connected region at a plane, row and column."""
        view = self._images.need().predicted_view()
        if self.all_planes:
            self.pixels(accept, component(view, at), 0)
        else:
            self.pixels(accept, component(view[at[0]], at[1:])[None], at[0])

    def region_under_mouse(self, accept: bool, key: str) -> None:
        """Act on the connected region under the mouse, as `key` was pressed."""
        record = self._images.need()
        record.check_in_view()
        plane, row, column = record.locate(record.viewer.cursor.position)
        at = plane, round(row), round(column)
        if not all(0 <= i < n for i, n in zip(at, record.planes_shape, strict=True)):
            raise InputError(
                f"There is no prediction under the mouse; point at a region, then press {key}."
            )
        self.region(accept, at)

    def drawn(self, accept: bool, plane: int, inside: np.ndarray) -> None:
        """Act on what the user has drawn around.

        Parameters
        ----------
        accept
            Whether it becomes annotations rather than being cleared.
        plane
            Where it was drawn.
        inside : (H, W) bool
            The pixels.
        """
        if self.all_planes:
            planes = self._images.need().planes_shape
            self.pixels(accept, np.broadcast_to(inside, planes), 0)
        else:
            self.pixels(accept, inside[None], plane)

    def of_class(self, accept: bool, class_id: int) -> None:
        """Act on everything that is predicted as a class."""
        record = self._images.need()
        if not class_id:
            raise InputError("No class is selected; select one in the table.")
        first, planes = self._planes(record)
        self.pixels(accept, record.predicted_view()[planes] == class_id, first)

    def by_confidence(self, accept: bool, least: int) -> None:
        """Accept what leads by `least` per cent or more, or reject what leads by less."""
        record = self._images.need()
        uncertainty = record.extra.uncertainty
        assert uncertainty is not None
        first, planes = self._planes(record)
        sure = uncertainty[planes] <= 100 - least
        self.pixels(accept, sure if accept else ~sure, first)

    def undo(self) -> None:
        """Take the last act back."""
        if self._changed is not None:
            self._changed.undo()

    def _planes(self, record: ImageLayers) -> tuple[int, slice]:
        """Return the first of the planes to act on, and all of them."""
        if self.all_planes:
            return 0, slice(None)
        record.check_in_view()
        return record.plane(), slice(record.plane(), record.plane() + 1)
