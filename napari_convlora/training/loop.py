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
    config, control = run.config, run.control
    n_bytes = sum(tensor.nbytes for tensor in run.model.adapter_state().values())
    yield Started(
        config.max_steps, run.pixels, run.data.holds_out, str(run.device), n_bytes + MAX_HEADER
    )
    if run.model.detail is not None:
        yield from fit_detail(run, run.model.detail)
    run.model.eval()
    if not run.warm:
        begin_head(run)
    run.team.align(run.model.trained().values())
    parameters = [p for n, p in run.model.trained().items() if not n.startswith("detail.")]
    adapter = {p for n, p in run.model.backbone.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p in adapter], "lr": config.adapter_lr},
            {"params": [p for p in parameters if p not in adapter], "lr": config.decoder_lr},
        ],
        weight_decay=1e-4,
    )
    average = WeightAverage(parameters)
    peak = [group["lr"] for group in optimiser.param_groups]
    rng = np.random.default_rng(config.seed)
    reason, step, score = "steps", 0, None
    begun, alone = 0, config.decoder_share if adapter else 0.0
    best, best_step = 0.0, 0
    unstable = 0
    end = config.max_steps
    next_preview = run.next_preview(time.monotonic())
    kept = -math.inf
    broken_off = {} if rival is None else {"why": "it was broken off"}
    decoder_steps = math.ceil(alone * end) if adapter else end
    careful = CarefulSteps(run, optimiser, parameters, decoder_steps, most_tiles(run, rival))
    yield from careful.try_encoder()
    while step < end:
        if control.keep_every is not None and time.monotonic() - kept >= control.keep_every:
            with average.shown():
                snapshot = run.adapter(step, "failure", score, broken_off)
            yield Interim(step, snapshot)
            kept = time.monotonic()
        if control.paused and not control.stopping:
            yield Paused(step)
            began = time.monotonic()
            control.wait()
            run.start += time.monotonic() - began  # a pause uses up no time limit
        now = torch.tensor([control.stopping, run.elapsed()], dtype=torch.float64)
        stopping, elapsed = run.team.lead(now).tolist()
        if stopping:
            reason = "stopped"
            break
        if config.max_minutes is not None and elapsed > 60 * config.max_minutes:
            reason = "time"
            break
        images = control.take_annotations()
        if images is not None:
            yield from _take_over(run, images)
        share = run.share(step, elapsed)
        decoder_only = not adapter or share < config.decoder_share
        if decoder_only:
            begun = step + 1  # the encoder's first step, as far as known
        factor = 0.5 * (1 + math.cos(math.pi * max(0.0, share - alone) / max(1e-9, 1 - alone)))
        factor *= min(1.0, (end - step) / _COOL_DOWN)
        for group, lr, since in zip(optimiser.param_groups, peak, (begun, 0), strict=True):
            group["lr"] = lr * factor * min(1.0, (step - since + 1) / max(1, config.warmup))
        drawn = rng.choice(len(run.views), run.plan.views(decoder_only))
        views = [run.views[i] for i in drawn]
        loss = yield from careful.take(views, config.seed + step, decoder_only)
        unstable = 0 if math.isfinite(loss) else unstable + 1
        if unstable == _UNSTABLE:
            raise ConvLoRAError(
                f"Training became unstable after step {step}; lower the learning rates or the rank."
            )
        if adapter and decoder_only:
            average.restart()  # what comes before the encoder learns is not worth keeping
        else:
            average.update()
        step += 1
        yield Step(step, config.max_steps, loss, run.elapsed(), careful.seconds_left())
        if step % config.score_every == 0 and run.confusion.any():
            score = take_score(run)
            yield Scored(step, score, run.data.holds_out)
            if score > best + _PROGRESS or (adapter and decoder_only):
                best, best_step = max(best, score), step  # the encoder gets its chance
            elif step - best_step >= config.patience and end > step + _COOL_DOWN:
                # Learning rates run out over a few more steps: stopping at full rate is noisy.
                reason, end = "plateau", step + _COOL_DOWN
                careful.end = end
        if time.monotonic() > next_preview:
            began = time.monotonic()
            with average.shown():
                found = list(preview(run, "adapted"))
            yield from found
            next_preview = run.next_preview(began)
    average.install()
    if rival is not None and control.keep_every is not None:  # comparing may be cut short
        yield Interim(step, run.adapter(step, reason, score, broken_off))
    yield Finished(run.adapter(step, reason, score, compare(run, rival)), reason)


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
