"""One annotate, adapt, correct loop as a state machine, without Qt and napari.

::

    EMPTY --annotations--> READY --run_round()--> TRAINING --> READY (one more round)
                                                          `--> FAILED (rounds so far are kept)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.control import RunControl
from napari_convlora.devices import available_memory, choose_device
from napari_convlora.errors import ConvLoRAError
from napari_convlora.evaluation.gate import Verdict, decide
from napari_convlora.events import Event, Failed, Finished, Progress, Started
from napari_convlora.images.planes import Planes
from napari_convlora.images.regions import Block
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.prediction.predict import (
    BlockPrediction,
    Prediction,
    predict,
    predict_blocks,
    ready_scorer,
)
from napari_convlora.prediction.prompter import Prompter
from napari_convlora.training import adapt
from napari_convlora.training.processes import ALONE, Team
from napari_convlora.training.versus_installed import Learnt, Rival, learnt_pixels, taken_back

_CACHE_BYTES = 2 * 1024**3
_CACHE_DISK_BYTES = 8 * 1024**3
_CACHE_SHARE = 4
"""The cache takes a quarter of the free memory at most."""


def _cache() -> FeatureCache:
    return FeatureCache(min(_CACHE_BYTES, available_memory() // _CACHE_SHARE), _CACHE_DISK_BYTES)


class State(Enum):
    """Where the loop stands."""

    EMPTY = "no round yet"
    TRAINING = "a round is running"
    READY = "an adapter is installed"
    FAILED = "the last round ended without an adapter"


@dataclass(frozen=True)
class Round:
    """One round: its number from 1, adapter, how it ended, seconds it trained, and verdict.

    The adapter is None for rounds before the last, unless it is installed: a project keeps all of
    them on disk, a session would only grow.
    """

    number: int
    adapter: Adapter | None
    reason: str
    seconds: float
    verdict: Verdict


@dataclass
class Session:
    """The loop's state; one thread at a time may run a round or predict.

    Parameters
    ----------
    model_config, train_config
        Used by the next round.
    backbone_name
        Name or checkpoint path of the backbone of the next round.
    installed, learnt
        The adapter that predicts, and which pixels it learnt from; empty where that is not known.
    team
        The processes that train together.
    """

    model_config: ModelConfig = field(default_factory=ModelConfig)
    train_config: TrainConfig = field(default_factory=TrainConfig)
    backbone_name: str = "litemedsam"
    rounds: list[Round] = field(default_factory=list)
    installed: Adapter | None = None
    state: State = State.EMPTY
    cache: FeatureCache = field(default_factory=_cache)
    team: Team = ALONE
    learnt: Learnt = field(default_factory=dict)
    _backbone: tuple[str, Backbone] | None = None
    _prompter: Prompter | None = None

    def backbone(self) -> Backbone:
        """Return the chosen backbone, loaded once."""
        if self._backbone is None or self._backbone[0] != self.backbone_name:
            self.cache = _cache()
            self._prompter = None
            self._backbone = (self.backbone_name, load_backbone(self.backbone_name))
        return self._backbone[1]

    def prompter(self) -> Prompter:
        """Return the chosen backbone, ready for clicks and boxes."""
        backbone, device = self.backbone(), choose_device(self.train_config.device)
        if self._prompter is None or self._prompter.device != device:
            self._prompter = Prompter(backbone, device, self.cache)
        return self._prompter

    def share_backbone(self, other: Session) -> None:
        """Use the backbone that `other` has loaded if it is the chosen one; it is only read."""
        loaded = other._backbone
        if loaded is not None and loaded[0] == self.backbone_name and loaded is not self._backbone:
            self._backbone, self._prompter = loaded, None

    def run_round(
        self,
        images: Sequence[LabelledImage],
        classes: Sequence[ClassInfo],
        control: RunControl | None = None,
    ) -> Generator[Event, None, None]:
        """Run one round on `images`, and install its adapter unless the one before is better.

        Every round learns from all annotations handed in, from the backbone or, if the settings
        say so, from the installed adapter on. Else the installed one may still teach where nothing
        is labelled, unless labels that it learnt from were taken back.

        Yields
        ------
        Event
            Those of `adapt`; a backbone that cannot be loaded is a `Failed` too.
        """
        self.state = State.TRAINING
        ended = False
        try:
            try:
                backbone = self.backbone()
            except ConvLoRAError as error:
                ended, self.state = True, State.FAILED
                yield Failed(str(error))
                return
            events = adapt(
                backbone,
                images,
                classes,
                self.model_config,
                self.train_config,
                control=control,
                cache=self.cache,
                start=self.installed if self.train_config.start == "installed" else None,
                rival=None if self.installed is None else Rival(self.installed, self.learnt),
                before=None if taken_back(images, self.learnt) else self.installed,
                team=self.team,
            )
            for event in events:
                self.record(event)
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Finished) and self.installed is event.adapter:
                    self.learnt = learnt_pixels(images, event.adapter)
                    event = replace(event, learnt=self.learnt)
                yield event
        finally:
            if not ended:
                self.state = State.FAILED

    def record(self, event: Event) -> None:
        """Keep account of what a round reports, wherever it runs."""
        match event:
            case Started():
                self.state = State.TRAINING
            case Finished(adapter, reason, learnt):
                self._keep(adapter, reason, learnt)
            case Failed(_, Adapter() as adapter):
                self._keep(adapter, "failed", None)
            case Failed():
                self.state = State.FAILED

    def _keep(self, adapter: Adapter, reason: str, learnt: Learnt | None) -> None:
        verdict = decide(adapter.summary)
        seconds = adapter.summary["seconds"]
        if verdict.better:
            self.install(adapter, learnt)
        self.rounds = [
            earlier if earlier.adapter is self.installed else replace(earlier, adapter=None)
            for earlier in self.rounds
        ]
        self.rounds.append(Round(len(self.rounds) + 1, adapter, reason, seconds, verdict))
        self.state = State.READY

    def install(self, adapter: Adapter, learnt: Learnt | None = None) -> None:
        """Make `adapter` the one that predicts; `learnt` tells which pixels it learnt from."""
        self.installed, self.learnt = adapter, learnt or {}
        self.state = State.READY

    def uninstall(self) -> None:
        """Let no adapter predict."""
        self.installed, self.learnt, self.state = None, {}, State.EMPTY

    def reinstall(self, adapter: Adapter, labels: Sequence[tuple[str, np.ndarray]]) -> None:
        """Install the adapter of an earlier round.

        Parameters
        ----------
        adapter
            Of that round.
        labels
            Name and annotations (P, H, W) of the images it learnt from, in order.
        """
        # Only what was painted is asked for, so that no image need be read.
        blank = [
            LabelledImage(np.broadcast_to(np.uint8(0), (*array.shape, 1)), array, name=name)
            for name, array in labels
        ]
        self.install(adapter, learnt_pixels(blank, adapter) if blank else {})

    def predict(
        self,
        image: Planes,
        control: RunControl | None = None,
        *,
        probabilities: bool = False,
    ) -> Generator[Progress, None, Prediction | None]:
        """Predict `image` (P, H, W, C) with the installed adapter; None when cancelled.

        Raises
        ------
        ConvLoRAError
            If no adapter is installed, or it belongs to another backbone.
        """
        return (
            yield from predict(
                self._adapter(),
                self.backbone(),
                image,
                probabilities=probabilities,
                device=self.train_config.device,
                control=control,
                cache=self.cache,
            )
        )

    def predict_blocks(
        self,
        image: Planes,
        blocks: Sequence[Block],
        control: RunControl,
        *,
        uncertainty: bool = False,
    ) -> Iterator[Progress | BlockPrediction]:
        """Predict parts of an image (P, H, W, C) with the installed adapter, in this order.

        Raises
        ------
        ConvLoRAError
            As `predict`.
        """
        adapter = self._adapter()
        device = self.train_config.device
        scorer = ready_scorer(adapter, self.backbone(), image, device=device, cache=self.cache)
        return predict_blocks(scorer, adapter, blocks, uncertainty=uncertainty, control=control)

    def _adapter(self) -> Adapter:
        if self.installed is None:
            raise ConvLoRAError("There is no adapter yet; press Adapt or load an adapter first.")
        return self.installed
