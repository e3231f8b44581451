"""What the process runs: generators of messages."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.control import Controls
from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import Event, Finished, Preview, Tiles
from napari_convlora.images.regions import Block, is_large, overlap, plan_blocks
from napari_convlora.session.process import Job, SessionGetter
from napari_convlora.session.snapshot import Snapshot

if TYPE_CHECKING:
    from napari_convlora.model.adapter import Adapter
    from napari_convlora.session.session import Session

SECONDS_BETWEEN_PARTS = 2.0
"""napari takes a while to show a large layer anew; what is on screen is not kept waiting."""


@dataclass(frozen=True)
class RoundSettings:
    """Everything the user has chosen for a round."""

    backbone: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    uncertainty: bool = False


@dataclass(frozen=True)
class Ready:
    """The engine is imported; titles of the backbones on this computer, by name."""

    backbones: dict[str, str]


@dataclass(frozen=True)
class CacheUse:
    """Bytes of frozen features that the process keeps for the next round."""

    memory: int
    disk: int


@dataclass(frozen=True)
class Loaded:
    """An adapter was read from a file; which pixels it learnt from, where that is known."""

    adapter: Adapter
    learnt: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remark:
    """A sentence on what is odd about an image."""

    sentence: str


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of an image, as they come: class ids (h, w), and uncertainty if asked for."""

    labels: Sequence[tuple[Block, np.ndarray]]
    uncertainty: Sequence[tuple[Block, np.ndarray]] = ()


@dataclass(frozen=True, eq=False)
class Predicted:
    """All parts of an image have come, with their uncertainty or without.

    `labels` are its class ids (P, H, W); None of a large image, which is not held twice.
    """

    labels: np.ndarray | None
    uncertainty: bool


@dataclass(frozen=True)
class Cancelled:
    """A prediction was stopped; parts that have come by then stay."""


def warm_up(session: SessionGetter, controls: Controls) -> Iterator[Any]:
    """Import the engine, look for checkpoints, and load the backbone that is chosen first.

    What only a round needs comes later, see `prepare_training`.
    """
    state = session()
    from napari_convlora.backbones import REGISTRY, available_backbones

    here = [name for name, path in available_backbones().items() if path is not None]
    yield Ready({name: REGISTRY[name].title for name in here})
    if state.backbone_name in here:
        with suppress(ConvLoRAError):  # what is wrong with it is told to who uses it
            state.backbone()


def prepare_training(session: SessionGetter, controls: Controls) -> Iterator[Any]:
    """Import now what the first round would take seconds to import."""
    for name in ("sklearn.ensemble", "sklearn.linear_model", "torch._dynamo"):
        importlib.import_module(name)  # the last for the sake of torch's optimisers
    yield from ()


def adapt_job(
    snapshots: Sequence[Snapshot], classes: Sequence[ClassInfo], recipe: RoundSettings
) -> Job:
    """Run one round on `snapshots`, then predict the first of them."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare_session(session, recipe)
        first, *others = (snapshot.labelled() for snapshot in snapshots)
        images = [part for _, part in sum(others, first)]
        places, event = [where for where, _ in first], None
        if is_large(snapshots[0].annotations.shape):
            controls.training.places = places
        else:
            controls.training.planes_after = len(snapshots[0].annotations)
        for event in state.run_round(images, classes, controls.training):
            yield _in_place(event, snapshots[0], places)
        if isinstance(event, Finished):
            yield from _predict(state, snapshots[0], controls, recipe)
        yield _kept(state)

    return job


def predict_job(snapshot: Snapshot, recipe: RoundSettings) -> Job:
    """Predict one image with the installed adapter."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare_session(session, recipe)
        yield from _predict(state, snapshot, controls, recipe)
        yield _kept(state)

    return job


def load_job(
    path: Path,
    snapshot: Snapshot | None,
    recipe: RoundSettings,
    labels: Sequence[tuple[str, np.ndarray]] = (),
) -> Job:
    """Install the adapter in `path`, which learnt from `labels` by name, and predict with it."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        from napari_convlora.model.adapter import Adapter

        state = prepare_session(session, recipe)
        adapter = Adapter.load(path)
        if adapter.backbone_name in _available():
            state.backbone_name = adapter.backbone_name
        if snapshot is not None:
            adapter.build(state.backbone())  # of another backbone: nothing has changed yet
        state.reinstall(adapter, labels)
        yield Loaded(adapter, state.learnt)
        if snapshot is not None:
            yield from _predict(state, snapshot, controls, recipe)

    return job


def empty_cache() -> Job:
    """Forget the frozen features; the next round computes them again."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = session()
        state.cache.clear()
        yield _kept(state)

    return job


def _kept(state: Session) -> CacheUse:
    return CacheUse(state.cache.nbytes, state.cache.disk_bytes)


def prepare_session(session: SessionGetter, recipe: RoundSettings) -> Session:
    """Return the session with what the user has chosen."""
    state = session()
    state.model_config, state.train_config = recipe.model, recipe.train
    state.backbone_name = recipe.backbone
    return state


def _available() -> list[str]:
    from napari_convlora.backbones import available_backbones

    return [name for name, path in available_backbones().items() if path is not None]


def _in_place(event: Event, snapshot: Snapshot, places: Sequence[Block]) -> Event | Parts:
    """Turn the preview of a part of a large image into what it shows of the image."""
    if not isinstance(event, Preview) or not is_large(snapshot.annotations.shape):
        return event
    here = [places[event.image]] if event.image < len(places) else []
    return Parts([(where, event.labels) for where in here])


def _predict(
    state: Session, snapshot: Snapshot, controls: Controls, recipe: RoundSettings
) -> Iterator[Any]:
    """Predict part by part, what the viewer shows first."""
    from napari_convlora.events import Progress

    planes, seen = snapshot.planes(), controls.predicting.seen or snapshot.seen
    whole = None
    if isinstance(planes, np.ndarray) and not is_large(planes.shape):
        whole = np.zeros(planes.shape[:3], np.uint8)
        odd = "" if state.installed is None else state.installed.normalizer.remark(planes)
        if odd:
            yield Remark(f"'{snapshot.name}': {odd}")
    labels: list[tuple[Block, np.ndarray]] = []
    doubts: list[tuple[Block, np.ndarray]] = []
    last, blocks = 0.0, plan_blocks(planes.shape, seen)
    on_screen = [b for b in blocks if seen is not None and overlap(b, seen)]
    for step in state.predict_blocks(
        planes, blocks, controls.predicting, uncertainty=recipe.uncertainty
    ):
        if isinstance(step, Progress):
            yield Tiles(step.done, step.total)
            continue
        labels.append((step.block, step.labels))
        if whole is not None:
            whole[step.block.index] = step.labels
        if step.uncertainty is not None:
            doubts.append((step.block, step.uncertainty))
        if step.block in on_screen[-1:] or time.monotonic() - last >= SECONDS_BETWEEN_PARTS:
            yield Parts(labels, doubts)
            labels, doubts, last = [], [], time.monotonic()
    if labels:
        yield Parts(labels, doubts)
    stopped = controls.predicting.stopping
    yield Cancelled() if stopped else Predicted(whole, recipe.uncertainty)
