"""The object that a SAM prompt makes: what was asked about it, and what it has painted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.prediction.prompts import Prompt, Window
from napari_convlora.session import prompt_jobs
from napari_convlora.widget.layers import edits

if TYPE_CHECKING:
    from napari_convlora.widget.layers.image_layers import ImageLayers


@dataclass(eq=False)
class PromptedObject:
    """The object that is being made; what it has painted is one item of the undo history."""

    record: ImageLayers
    plane: int
    class_id: int
    prompt: Prompt
    window: Window | None = None
    painted: Any = None

    @property
    def undone(self) -> bool:
        """Whether what was painted is not there any more."""
        if self.painted is None:
            return False
        return bool((self.record.painted()[self.painted] != self.class_id).any())

    def question(self) -> prompt_jobs.Question:
        """Return what is asked about the object."""
        record = self.record
        return prompt_jobs.Question(
            record.pixels,
            record.image.rgb,
            record.channel_axis,
            self.plane,
            record.planes_shape[1:],
            self.prompt,
            self.window,
        )

    def show(self, mask: np.ndarray, over: bool) -> int:
        """Paint `mask` instead of what was painted before; returns pixels."""
        assert self.window is not None
        self.take_back()
        at = edits.paint(self.record, self.plane, self.window, mask, self.class_id, over)
        self.painted = at if len(at[0]) else None
        return len(at[0])

    def take_back(self) -> None:
        """Restore what was there."""
        if self.painted is not None and not self.undone and self.record.annotations is not None:
            self.record.annotations.undo()
        self.painted = None
