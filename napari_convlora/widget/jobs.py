"""What the child process runs: generators of messages, free of Qt and napari."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from napari_convlora.annotations import LabelledImage
from napari_convlora.child import Job
from napari_convlora.config import ClassInfo, ConvLoRAError, ModelConfig, TrainConfig
from napari_convlora.events import Controls, Finished, Tiles
from napari_convlora.planes import drop_alpha, to_planes

if TYPE_CHECKING:
    from napari_convlora.adapter_file import Adapter
    from napari_convlora.session import Session

SessionGetter = Callable[[], "Session"]
"""Returns the session of the process that runs the job."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An image and a copy of its annotations, free to travel to another process.

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

    def __getstate__(self) -> dict[str, Any]:
        """Leave a lazy array to the process it is sent to, unless it hangs on an open file."""
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray):
            try:
                cloudpickle.dumps(pixels)
            except Exception:  # pickle raises whatever the object does
                pixels = np.asarray(pixels)
        return self.__dict__ | {"pixels": pixels}

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
class Ready:
    """The engine is imported; titles of the backbones on this computer, by name."""

    backbones: dict[str, str]


@dataclass(frozen=True)
class Loaded:
    """An adapter was read from a file."""

    adapter: Adapter


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


def load(path: Path, snapshot: Snapshot | None, recipe: Recipe) -> Job:
    """Install the adapter in `path` and predict with it."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        from napari_convlora.adapter_file import Adapter

        state = _prepare(session, recipe)
        adapter = Adapter.load(path)
        if adapter.backbone_name in _available():
            state.backbone_name = adapter.backbone_name
        if snapshot is not None:
            adapter.build(state.backbone())  # of another backbone: nothing has changed yet
        state.install(adapter)
        yield Loaded(adapter)
        if snapshot is not None:
            yield from _predict(state, snapshot.planes(), controls)

    return job


def _prepare(session: SessionGetter, recipe: Recipe) -> Session:
    state = session()
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
