"""What the child process runs: generators of messages, free of Qt and napari."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from napari_convlora.annotations import LabelledImage
from napari_convlora.blocks import Block, is_large, overlap, plan
from napari_convlora.child import Job
from napari_convlora.config import ClassInfo, ConvLoRAError, ModelConfig, TrainConfig
from napari_convlora.events import Controls, Event, Finished, Preview, Tiles
from napari_convlora.planes import Planes, drop_alpha, lazy_planes, read_pixels, to_planes
from napari_convlora.project import ImageEntry
from napari_convlora.reviewed import Outlines, complete

if TYPE_CHECKING:
    from napari_convlora.adapter_file import Adapter
    from napari_convlora.session import Session

SECONDS_BETWEEN_PARTS = 2.0
"""napari takes a while to show a large layer anew; what is on screen is not kept waiting."""

SessionGetter = Callable[[], "Session"]
"""Returns the session of the process that runs the job."""


@dataclass(frozen=True)
class OnDisk:
    """Pixels of a project's image that is not open; read by whoever opens it."""

    entry: ImageEntry
    folder: Path

    def open(self) -> Any:
        """Return the pixels as a layer would hold them."""
        return self.entry.as_layer(self.entry.read(self.folder))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An image and a copy of its annotations, free to travel to another process.

    Parameters
    ----------
    name
        Of the image layer.
    pixels
        As napari holds them, or `OnDisk`; a lazy array is computed by whoever calls `planes`.
    rgb, channel_axis
        How to read `pixels`; see `to_planes`.
    annotations : (P, H, W) int
    seen
        What the viewer shows; the image is predicted there first.
    reviewed
        Plane and vertices (N, 2) of every reviewed region.
    background_id
        Class of what remains unpainted in them; None if no class is the background.
    stem
        Of an image that only the project holds; "" of one in the viewer.
    """

    name: str
    pixels: Any
    rgb: bool
    channel_axis: int | None
    annotations: np.ndarray
    seen: Block | None = None
    reviewed: Outlines = ()
    background_id: int | None = None
    stem: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """Leave lazy pixels to the process that gets them."""
        return self.__dict__ | {"pixels": portable(self.pixels)}

    def planes(self) -> Planes:
        """Return the pixels as (P, H, W, C); a large lazy array stays lazy."""
        pixels = self.pixels.open() if isinstance(self.pixels, OnDisk) else self.pixels
        how: dict[str, Any] = {"rgb": self.rgb, "channel_axis": self.channel_axis}
        if not isinstance(pixels, np.ndarray):
            lazy = lazy_planes(pixels, **how, alpha=self.rgb, name=f"'{self.name}'")
            if is_large(lazy.shape):
                return lazy
            pixels = read_pixels(pixels, (slice(None),) * len(pixels.shape), lazy.name)
        planes = to_planes(np.asarray(pixels), **how)
        return drop_alpha(planes) if self.rgb else planes

    def labelled(self) -> list[tuple[Block, LabelledImage]]:
        """Return what the engine learns from, and where it lies; see `labelled_parts`.

        Raises
        ------
        InputError
            There are reviewed regions, but no class is the background.
        """
        from napari_convlora.parts import labelled_parts

        annotations = complete(self.annotations, self.reviewed, self.background_id, self.name)
        return labelled_parts(self.planes(), annotations, self.name)


def portable(pixels: Any) -> Any:
    """Leave a lazy array to the process it is sent to, unless it hangs on an open file."""
    if not isinstance(pixels, np.ndarray):
        try:
            cloudpickle.dumps(pixels)
        except Exception:  # pickle raises whatever the object does
            return read_pixels(pixels, (slice(None),) * len(pixels.shape), "The image")
    return pixels


@dataclass(frozen=True)
class Recipe:
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
class Kept:
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


def adapt(snapshots: Sequence[Snapshot], classes: Sequence[ClassInfo], recipe: Recipe) -> Job:
    """Run one round on `snapshots`, then predict the first of them."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare(session, recipe)
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


def predict(snapshot: Snapshot, recipe: Recipe) -> Job:
    """Predict one image with the installed adapter."""

    def job(session: SessionGetter, controls: Controls) -> Iterator[Any]:
        state = prepare(session, recipe)
        yield from _predict(state, snapshot, controls, recipe)
        yield _kept(state)

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

        state = prepare(session, recipe)
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


def _kept(state: Session) -> Kept:
    return Kept(state.cache.nbytes, state.cache.disk_bytes)


def prepare(session: SessionGetter, recipe: Recipe) -> Session:
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
    state: Session, snapshot: Snapshot, controls: Controls, recipe: Recipe
) -> Iterator[Any]:
    """Predict part by part, what the viewer shows first."""
    from napari_convlora.scorer import Progress

    planes, seen = snapshot.planes(), controls.predicting.seen or snapshot.seen
    whole = None
    if isinstance(planes, np.ndarray) and not is_large(planes.shape):
        whole = np.zeros(planes.shape[:3], np.uint8)
        odd = "" if state.installed is None else state.installed.normalizer.remark(planes)
        if odd:
            yield Remark(f"'{snapshot.name}': {odd}")
    labels: list[tuple[Block, np.ndarray]] = []
    doubts: list[tuple[Block, np.ndarray]] = []
    last, blocks = 0.0, plan(planes.shape, seen)
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
