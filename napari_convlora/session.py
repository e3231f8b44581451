"""One annotate, adapt, correct loop as a state machine, without Qt and napari.

::

    EMPTY --annotations--> READY --run_round()--> TRAINING --> READY (one more round)
                                                          `--> FAILED (rounds so far are kept)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from napari_convlora.adapter_file import Adapter
from napari_convlora.annotations import LabelledImage
from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.config import ClassInfo, ConvLoRAError, ModelConfig, TrainConfig
from napari_convlora.data import FeatureCache
from napari_convlora.events import Event, Failed, Finished, RunControl
from napari_convlora.prediction import Prediction, Progress, predict
from napari_convlora.rounds import Verdict, decide
from napari_convlora.training import adapt
from napari_convlora.training.compare import Learnt, Rival, learnt_pixels


class State(Enum):
    """Where the loop stands."""

    EMPTY = "no round yet"
    TRAINING = "a round is running"
    READY = "an adapter is installed"
    FAILED = "the last round ended without an adapter"


@dataclass(frozen=True)
class Round:
    """One finished round: its number from 1, adapter, how it ended, seconds, and verdict."""

    number: int
    adapter: Adapter
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
    """

    model_config: ModelConfig = field(default_factory=ModelConfig)
    train_config: TrainConfig = field(default_factory=TrainConfig)
    backbone_name: str = "litemedsam"
    rounds: list[Round] = field(default_factory=list)
    installed: Adapter | None = None
    state: State = State.EMPTY
    cache: FeatureCache = field(default_factory=FeatureCache)
    _learnt: Learnt = field(default_factory=dict)
    _backbone: tuple[str, Backbone] | None = None

    def backbone(self) -> Backbone:
        """Return the chosen backbone, loaded once."""
        if self._backbone is None or self._backbone[0] != self.backbone_name:
            self.cache = FeatureCache()
            self._backbone = (self.backbone_name, load_backbone(self.backbone_name))
        return self._backbone[1]

    def run_round(
        self,
        images: Sequence[LabelledImage],
        classes: Sequence[ClassInfo],
        control: RunControl | None = None,
    ) -> Generator[Event, None, None]:
        """Run one round on `images`, and install its adapter unless the one before is better.

        Every round learns from all annotations handed in, from the backbone or, if the settings
        say so, from the installed adapter on.

        Yields
        ------
        Event
            Those of `adapt`; a backbone that cannot be loaded is a `Failed` too.
        """
        start = time.monotonic()
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
                rival=None if self.installed is None else Rival(self.installed, self._learnt),
            )
            for event in events:
                if isinstance(event, Finished):
                    seconds = time.monotonic() - start
                    self._take(event, images, seconds)
                    ended = True
                elif isinstance(event, Failed):
                    ended, self.state = True, State.FAILED
                yield event
        finally:
            if not ended:
                self.state = State.FAILED

    def install(self, adapter: Adapter, learnt: Learnt | None = None) -> None:
        """Make `adapter` the one that predicts; `learnt` tells which pixels it learnt from."""
        self.installed, self._learnt = adapter, learnt or {}
        self.state = State.READY

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

    def _take(self, event: Finished, images: Sequence[LabelledImage], seconds: float) -> None:
        verdict = decide(event.adapter.summary)
        if verdict.better:
            self.install(event.adapter, learnt_pixels(images, event.adapter))
        self.state = State.READY
        number = len(self.rounds) + 1
        self.rounds.append(Round(number, event.adapter, event.reason, seconds, verdict))

    def predict(
        self,
        image: np.ndarray,
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
        if self.installed is None:
            raise ConvLoRAError("There is no adapter yet; press Adapt or load an adapter first.")
        return (
            yield from predict(
                self.installed,
                self.backbone(),
                image,
                probabilities=probabilities,
                device=self.train_config.device,
                control=control,
                cache=self.cache,
            )
        )
