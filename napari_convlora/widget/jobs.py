"""What the background thread runs: generators of messages, free of Qt and napari."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.annotations import LabelledImage
from napari_convlora.config import AdapterError, ClassInfo, ConvLoRAError, ModelConfig, TrainConfig
from napari_convlora.events import Finished, Step
from napari_convlora.planes import drop_alpha, to_planes

if TYPE_CHECKING:
    from napari_convlora.adapter_file import Adapter
    from napari_convlora.events import RunControl
    from napari_convlora.session import Session

SECONDS_BETWEEN_REPORTS = 0.1
"""Ten reports a second read as live; one at every step would take time from the window."""

SessionGetter = Callable[[], "Session"]
"""Returns the session, importing torch (seconds) when first called, in the thread."""

Job = Callable[[SessionGetter, "Controls"], Iterator[Any]]
"""A job takes the session and its controls, and yields messages."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An image and a copy of its annotations, free to travel to another thread.

    Parameters
    ----------
    name
        Of the image layer.
    pixels
        As napari holds them; a lazy array is computed by whoever calls `planes`.
    rgb, channel_axis
        How to read `pixels`; see `to_planes`.
    annotations : (P, H, W) int
    """

    name: str
    pixels: Any
    rgb: bool
    channel_axis: int | None
    annotations: np.ndarray

    def planes(self) -> np.ndarray:
        """Return the pixels as (P, H, W, C)."""
        planes = to_planes(np.asarray(self.pixels), rgb=self.rgb, channel_axis=self.channel_axis)
        return drop_alpha(planes) if self.rgb else planes

    def labelled(self) -> LabelledImage:
        """Return what the engine learns from."""
        return LabelledImage(self.planes(), self.annotations, name=self.name)


@dataclass(frozen=True)
class Recipe:
    """Everything the user has chosen for a round."""

    backbone: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Controls:
    """Training and the prediction that follows it end apart: Stop keeps what was learnt."""

    training: RunControl
    predicting: RunControl

    def stop(self) -> None:
        """End both as soon as possible."""
        self.training.stop()
        self.predicting.stop()


@dataclass(frozen=True)
class Ready:
    """The engine is imported; titles of the backbones on this computer, by name."""

    backbones: dict[str, str]


@dataclass(frozen=True)
class Loaded:
    """An adapter was read from a file."""

    adapter: Adapter


@dataclass(frozen=True)
class Tiles:
    """`done` of `total` tiles of a prediction."""

    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Predicted:
    """Class ids (P, H, W) of the whole image; None when cancelled."""

    labels: np.ndarray | None


def warm_up(session: SessionGetter, controls: Controls) -> Iterator[Any]:
    """Import the engine, look for checkpoints, and load the backbone that is chosen first.

    The first model that is built makes torch import a second's worth of modules, one of which
    keeps the window waiting for 0.2 s: better now than in the middle of a round.
    """
    state = session()
    from napari_convlora.backbones import REGISTRY, available_backbones

    here = [name for name, path in available_backbones().items() if path is not None]
    yield Ready({name: REGISTRY[name].title for name in here})
    if state.backbone_name in here:
        with suppress(ConvLoRAError):  # what is wrong with it is told to who uses it
            state.backbone()


def adapt(snapshots: Sequence[Snapshot], classes: Sequence[ClassInfo], recipe: Recipe) -> Job:
    """Run one round on `snapshots`, then predict the first of them."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = _prepare(session, recipe)
        images = [snapshot.labelled() for snapshot in snapshots]
        event = None
        for event in state.run_round(images, classes, controls.training):
            yield event
        if isinstance(event, Finished):
            yield from _predict(state, images[0].image, controls)

    return job


def predict(snapshot: Snapshot, recipe: Recipe) -> Job:
    """Predict one image with the installed adapter."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        yield from _predict(_prepare(session, recipe), snapshot.planes(), controls)

    return job


def load(
    path: Path,
    snapshot: Snapshot | None,
    recipe: Recipe,
    labels: Sequence[tuple[str, np.ndarray]] = (),
) -> Job:
    """Install the adapter in `path`, which learnt from `labels` by name, and predict with it."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        from napari_convlora.adapter_file import Adapter

        state = _prepare(session, recipe)
        adapter = Adapter.load(path)
        previous, backbone = state.installed, state.backbone_name
        if adapter.backbone_name in _available():
            state.backbone_name = adapter.backbone_name
        state.reinstall(adapter, labels)
        try:
            yield Loaded(adapter)
            if snapshot is not None:
                yield from _predict(state, snapshot.planes(), controls)
        except AdapterError:  # of another backbone: what worked before goes on working
            state.installed, state.backbone_name = previous, backbone
            raise

    return job


def batched(messages: Iterator[Any]) -> Generator[list[Any], None, None]:
    """Hand messages on, steps and tiles at most ten times a second, anything else at once."""
    waiting: list[Any] = []
    last = 0.0
    for message in messages:
        waiting.append(message)
        often = isinstance(message, Step | Tiles)
        if not often or time.monotonic() - last >= SECONDS_BETWEEN_REPORTS:
            yield waiting
            waiting, last = [], time.monotonic()
    if waiting:
        yield waiting


def _prepare(session: SessionGetter, recipe: Recipe) -> Session:
    state = session()
    from napari_convlora.devices import leave_a_core

    leave_a_core()
    state.model_config, state.train_config = recipe.model, recipe.train
    state.backbone_name = recipe.backbone
    return state


def _available() -> list[str]:
    from napari_convlora.backbones import available_backbones

    return [name for name, path in available_backbones().items() if path is not None]


def _predict(state: Session, planes: np.ndarray, controls: Controls) -> Iterator[Any]:
    from napari_convlora.prediction import Returning

    steps = Returning(state.predict(planes, controls.predicting))
    for tile in steps:
        yield Tiles(tile.done, tile.total)
    yield Predicted(None if steps.value is None else steps.value.labels)
