"""One round of adaptation, as a generator of events that anyone can run."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from napari_convlora.backbones import Backbone
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.control import RunControl
from napari_convlora.devices import is_out_of_memory
from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import Event, Failed, Finished, Interim, Paused, Scored, Started, Step
from napari_convlora.labels.annotations import LabelledImage, check_annotations
from napari_convlora.model.adapter import MAX_HEADER, Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.training.detail_stage import fit_detail, preview
from napari_convlora.training.guarded_steps import CarefulSteps
from napari_convlora.training.head_start import begin_head
from napari_convlora.training.processes import ALONE, Team
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.step import take_score
from napari_convlora.training.versus_installed import Rival, compare, most_tiles
from napari_convlora.training.views import view_pool
from napari_convlora.training.weight_average import WeightAverage

_COOL_DOWN = 8
_UNSTABLE = 3
"""Steps in a row without a finite gradient that end a round."""

_PROGRESS = 0.002
"""A score must rise by this much to count as progress."""


def adapt(
    backbone: Backbone,
    images: Sequence[LabelledImage],
    classes: Sequence[ClassInfo],
    model_config: ModelConfig | None = None,
    config: TrainConfig | None = None,
    *,
    control: RunControl | None = None,
    cache: FeatureCache | None = None,
    start: Adapter | None = None,
    rival: Rival | None = None,
    before: Adapter | None = None,
    team: Team = ALONE,
) -> Generator[Event, None, None]:
    """Adapt `backbone` to annotated images.

    Parameters
    ----------
    backbone
        Frozen; shared, never changed.
    images
        Annotated images of equal channel count.
    classes
        The class table; classes without a label are left out of the adapter.
    model_config, config
        What is trained, and how.
    control
        Stops, pauses, resumes the round or hands it new annotations, from any thread.
    cache
        Keeps frozen features between rounds.
    start
        Go on from this adapter, of the same backbone, method and classes, instead of the base.
    rival
        The installed adapter; the summary of the new one then says how both compare.
    before
        The adapter whose prediction was corrected: where few pixels are labelled, its detail branch
        teaches that of the new one, as what was left uncorrected is more often right than wrong.
        One of other classes, channels, contrast, scale or backbone is left out.
    team
        The processes that train together; each of them calls this with the same arguments.

    Yields
    ------
    Started, Planned, Adjusted, Step, Scored, Preview, Paused, Finished or Failed
        Always ends with `Finished` or `Failed`; bad input is a `Failed`, never an exception.
    """
    try:
        run = RoundState(
            backbone,
            images,
            classes,
            model_config or ModelConfig(),
            config or TrainConfig(),
            control or RunControl(),
            FeatureCache() if cache is None else cache,  # an empty one is falsy
            start,
            team,
            before if (config or TrainConfig()).keep_uncorrected else None,
        )
        yield from _adapt(run, rival)
    except ConvLoRAError as error:
        yield Failed(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        yield Failed(
            "The device ran out of memory; choose the fast preset, a smaller backbone or the CPU."
        )


def _adapt(run: RoundState, rival: Rival | None) -> Iterator[Event]:
    n_bytes = sum(tensor.nbytes for tensor in run.model.adapter_state().values())
    yield Started(
        run.config.max_steps, run.pixels, run.data.holds_out, str(run.device), n_bytes + MAX_HEADER
    )
    if run.model.detail is not None:
        yield from fit_detail(run, run.model.detail)
    run.model.eval()
    if not run.warm:
        begin_head(run)
    run.team.align(run.model.trained().values())
    loop = _Loop(run, rival)
    yield from loop.steps()
    loop.average.install()
    if rival is not None and run.control.keep_every is not None:  # comparing may be cut short
        yield loop.interim(loop.reason)
    compared = compare(run, rival)
    yield Finished(run.adapter(loop.step, loop.reason, loop.score, compared), loop.reason)


class _Loop:
    """Steps of a round whose head and detail branch have begun, until something ends them.

    Attributes
    ----------
    step
        Steps taken.
    reason
        Why they ended; see `Finished`.
    score
        The last one; None before the first.
    average
        Of the weights.
    """

    def __init__(self, run: RoundState, rival: Rival | None) -> None:
        config = run.config
        parameters = [p for n, p in run.model.trained().items() if not n.startswith("detail.")]
        adapter = {p for n, p in run.model.backbone.named_parameters() if p.requires_grad}
        self._run, self._adapts = run, bool(adapter)
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p in adapter], "lr": config.adapter_lr},
                {"params": [p for p in parameters if p not in adapter], "lr": config.decoder_lr},
            ],
            weight_decay=1e-4,
        )
        self._peak = [group["lr"] for group in self._optimiser.param_groups]
        self.average = WeightAverage(parameters)
        self.reason, self.step = "steps", 0
        self.score: float | None = None
        self._begun, self._alone = 0, config.decoder_share if adapter else 0.0
        self._best, self._best_step, self._unstable = 0.0, 0, 0
        self._end = config.max_steps
        self._rng = np.random.default_rng(config.seed)
        self._kept = -math.inf
        self._broken_off = {} if rival is None else {"why": "it was broken off"}
        decoder_steps = math.ceil(self._alone * self._end) if adapter else self._end
        tiles = most_tiles(run, rival)
        self._guarded = CarefulSteps(run, self._optimiser, parameters, decoder_steps, tiles)

    def steps(self) -> Iterator[Event]:
        """Take steps, with scores and previews between them."""
        run, control = self._run, self._run.control
        next_preview = run.next_preview(time.monotonic())
        yield from self._guarded.try_encoder()
        while self.step < self._end:
            yield from self._interludes()
            now = torch.tensor([control.stopping, run.elapsed()], dtype=torch.float64)
            stopping, elapsed = run.team.lead(now).tolist()
            if stopping:
                self.reason = "stopped"
                break
            if run.config.max_minutes is not None and elapsed > 60 * run.config.max_minutes:
                self.reason = "time"
                break
            images = control.take_annotations()
            if images is not None:
                yield from _take_over(run, images)
            yield from self._take(elapsed)
            if time.monotonic() > next_preview:
                began = time.monotonic()
                with self.average.shown():
                    previews = list(preview(run, "adapted"))
                yield from previews
                next_preview = run.next_preview(began)

    def interim(self, reason: str = "failure") -> Interim:
        """Return what is learnt by now."""
        adapter = self._run.adapter(self.step, reason, self.score, self._broken_off)
        return Interim(self.step, adapter)

    def _interludes(self) -> Iterator[Event]:
        """Yield what is learnt by now, if it is time for that, and wait while paused."""
        run, control = self._run, self._run.control
        if control.keep_every is not None and time.monotonic() - self._kept >= control.keep_every:
            with self.average.shown():
                snapshot = self.interim()
            yield snapshot
            self._kept = time.monotonic()
        if control.paused and not control.stopping:
            yield Paused(self.step)
            began = time.monotonic()
            control.wait()
            run.start += time.monotonic() - began  # a pause uses up no time limit

    def _take(self, elapsed: float) -> Iterator[Event]:
        """Take one step, and score it if it is due."""
        run, config = self._run, self._run.config
        share = run.share(self.step, elapsed)
        decoder_only = not self._adapts or share < config.decoder_share
        if decoder_only:
            self._begun = self.step + 1  # the encoder's first step, as far as known
        self._set_rates(share)
        drawn = self._rng.choice(len(run.views), run.plan.views(decoder_only))
        views = [run.views[i] for i in drawn]
        loss = yield from self._guarded.take(views, config.seed + self.step, decoder_only)
        self._unstable = 0 if math.isfinite(loss) else self._unstable + 1
        if self._unstable == _UNSTABLE:
            raise ConvLoRAError(
                f"Training became unstable after step {self.step}; lower the learning rates or "
                "the rank."
            )
        if self._adapts and decoder_only:
            self.average.restart()  # what comes before the encoder learns is not worth keeping
        else:
            self.average.update()
        self.step += 1
        left = self._guarded.seconds_left()
        yield Step(self.step, config.max_steps, loss, run.elapsed(), left)
        if self.step % config.score_every == 0 and run.confusion.any():
            self.score = take_score(run)
            yield Scored(self.step, self.score, run.data.holds_out)
            self._judge(self.score, self._adapts and decoder_only)

    def _set_rates(self, share: float) -> None:
        """Set learning rates for where the round is, `share` of its way."""
        alone, step = self._alone, self.step
        factor = 0.5 * (1 + math.cos(math.pi * max(0.0, share - alone) / max(1e-9, 1 - alone)))
        factor *= min(1.0, (self._end - step) / _COOL_DOWN)
        groups = zip(self._optimiser.param_groups, self._peak, (self._begun, 0), strict=True)
        for group, lr, since in groups:
            warm = min(1.0, (step - since + 1) / max(1, self._run.config.warmup))
            group["lr"] = lr * factor * warm

    def _judge(self, score: float, encoder_waits: bool) -> None:
        """Bring the end nearer if scores rise no more."""
        if score > self._best + _PROGRESS or encoder_waits:  # the encoder gets its chance
            self._best, self._best_step = max(self._best, score), self.step
        elif (
            self.step - self._best_step >= self._run.config.patience
            and self._end > self.step + _COOL_DOWN
        ):
            # Learning rates run out over a few more steps: stopping at full rate is noisy.
            self.reason, self._end = "plateau", self.step + _COOL_DOWN
            self._guarded.end = self._end


def _take_over(run: RoundState, images: Sequence[LabelledImage]) -> Iterator[Event]:
    """Learn from new annotations of the same images; those that cannot be trained on wait."""
    try:
        run.pixels = check_annotations(images, run.classes)
        if [i.image.shape for i in images] != [i.image.shape for i in run.data.images]:
            return
    except ConvLoRAError:
        return
    before = run.data.target
    run.set_annotations(images)
    if all(np.array_equal(a, b) for a, b in zip(before, run.data.target, strict=True)):
        return
    run.views = view_pool(run.data, run.side, run.config.views, run.config.seed)
    if run.model.detail is not None:
        yield from fit_detail(run, run.model.detail)
