"""What is asked of the process that answers SAM prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.control import Controls
from napari_convlora.errors import ConvLoRAError
from napari_convlora.images.planes import lazy_planes
from napari_convlora.prediction.prompts import Prompt, Window, choose_window
from napari_convlora.session.jobs import RoundSettings, prepare_session
from napari_convlora.session.process import Job, SessionGetter
from napari_convlora.session.snapshot import portable

if TYPE_CHECKING:
    from napari_convlora.session.session import Session


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt on one plane of an image.

    Parameters
    ----------
    pixels, rgb, channel_axis
        As in a `Snapshot`.
    plane
        Index of the plane.
    shape
        Its height and width.
    prompt
        What the user said about the object.
    window
        Where the model looked for the object's first prompt; kept as long as it holds them all.
    """

    pixels: Any
    rgb: bool
    channel_axis: int | None
    plane: int
    shape: tuple[int, int]
    prompt: Prompt
    window: Window | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Send no more of an array than the plane; lazy pixels are left to who gets them."""
        if not isinstance(self.pixels, np.ndarray):
            return self.__dict__ | {"pixels": portable(self.pixels)}
        plane = self.read(Window(0, 0, *self.shape))
        return self.__dict__ | {"pixels": plane, "channel_axis": 2, "plane": 0}

    def read(self, window: Window) -> np.ndarray:
        """Return the pixels (H, W, C) of a window."""
        planes = lazy_planes(
            self.pixels, rgb=self.rgb, channel_axis=self.channel_axis, alpha=self.rgb
        )
        return planes[self.plane][window.region]


@dataclass(frozen=True, eq=False)
class Prompted:
    """The object that a prompt means.

    Parameters
    ----------
    window
        Where the model looked.
    mask : (H, W) bool
        Of the window.
    """

    window: Window
    mask: np.ndarray


def prepare_prompts(recipe: RoundSettings, loaded: Session | None) -> Job:
    """Do before the first prompt what it would have to wait for; parameters as `prompt`."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare_session(session, recipe)
        if loaded is not None:
            state.share_backbone(loaded)
        with suppress(ConvLoRAError):  # what is wrong is told to who asks
            state.prompter()
        yield from ()

    return job


def prompt(question: Question, recipe: RoundSettings, loaded: Session | None) -> Job:
    """Find the object that a prompt means, with the backbone of `loaded` if it is the chosen one.

    The session is not that of a round, so that prompts are answered while one runs.
    """

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare_session(session, recipe)
        if loaded is not None:
            state.share_backbone(loaded)
        prompter, prompt = state.prompter(), question.prompt
        window = question.window
        if window is None or not window.holds(prompt.bounds):
            window = choose_window(question.shape, prompt.bounds, prompter.tile)
        yield Prompted(window, prompter.mask(question.read(window), window, prompt))

    return job
