"""One round of adaptation, as a generator of events that anyone can run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora import __version__
from napari_convlora.adapter_file import Adapter
from napari_convlora.annotations import LabelledImage, check_annotations
from napari_convlora.backbones import Backbone
from napari_convlora.config import ClassInfo, ConvLoRAError, ModelConfig, TrainConfig
from napari_convlora.data import FeatureCache, Normalizer, View, auto_pixel_scale
from napari_convlora.detail import DetailBranch, fit, mix
from napari_convlora.devices import choose_device
from napari_convlora.events import (
    Event,
    Failed,
    Finished,
    Paused,
    Preview,
    RunControl,
    Scored,
    Started,
    Step,
)
from napari_convlora.heads import HeadOutput
from napari_convlora.losses import VOID, class_weights, dense_loss, query_loss, taught_loss
from napari_convlora.metrics import scores
from napari_convlora.model import SemanticSAM
from napari_convlora.planes import check_pixels
from napari_convlora.prediction import Returning, detail_logits, plane_logits
from napari_convlora.sampling import (
    TrainingSet,
    pixel_samples,
    training_set,
    view_detail,
    view_image,
    view_pool,
    view_target,
)

_COOL_DOWN = 8
_UNSTABLE = 3
"""Steps in a row without a finite gradient that end a round."""

_SMOOTHING = 0.1
"""Label smoothing: after tens of steps on a few strokes SAM is sure of everything."""

_SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 6, 0.0)
"""Shares of the detail branch in the mixture. The first, with which a sure detail branch cannot be
overruled, holds unless held-out labels clearly speak for another one."""

_CLEAR = 0.005
"""Gain in held-out score that makes another share worth taking."""

_TRAINED_SHARE = 0.5
"""Share of the detail branch in the loss."""

_TEACHING = 0.5
"""Weight of what the detail branch teaches SAM on unlabelled pixels."""

_PREVIEW_REST = 6.0
"""After a preview, train at least this many times as long as it took."""

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

    Yields
    ------
    Started, Step, Scored, Preview, Paused, Finished or Failed
        Always ends with `Finished` or `Failed`; bad input is a `Failed`, never an exception.
    """
    try:
        run = _Round(
            backbone,
            images,
            classes,
            model_config or ModelConfig(),
            config or TrainConfig(),
            control or RunControl(),
            FeatureCache() if cache is None else cache,  # an empty one is falsy
        )
        yield from _adapt(run)
    except ConvLoRAError as error:
        yield Failed(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        yield Failed(
            "The device ran out of memory; choose the fast preset, a smaller backbone or the CPU."
        )


class _Round:
    """State of one round: data, model, optimiser and running scores."""

    def __init__(
        self,
        backbone: Backbone,
        images: Sequence[LabelledImage],
        classes: Sequence[ClassInfo],
        model_config: ModelConfig,
        config: TrainConfig,
        control: RunControl,
        cache: FeatureCache,
    ) -> None:
        self.control, self.cache, self.config = control, cache, config
        for image in images:
            check_pixels(image.image)
        self.pixels = check_annotations(images, classes)
        self.classes = tuple(c for c in classes if self.pixels[c.id])
        self.ids = np.array([c.id for c in self.classes], np.uint8)
        self.device = choose_device(config.device)
        self.tile = backbone.spec.image_size
        self.normalizer = Normalizer.fit([image.image for image in images])
        self.pixel_scale = auto_pixel_scale([i.image.shape[1:3] for i in images], self.tile)
        self.side = max(1, round(self.tile / self.pixel_scale))
        self.set_annotations(images)
        first = model_config.first_block
        if first is None:
            first = 0 if config.preset == "full" else backbone.spec.fast_first_block
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = SemanticSAM(
                backbone,
                replace(model_config, first_block=first),
                len(self.classes),
                len(self.normalizer.low),
            ).to(self.device)
        self.halves: list[DetailBranch] = []
        self.shares = (0.0,) if self.model.detail is None else _SHARES
        if self.model.detail is not None:
            self.halves = [copy.deepcopy(self.model.detail) for _ in range(2)]
        self.views = view_pool(self.data, self.side, config.views, config.seed)
        self.details: dict[View, Tensor] = {}
        self.embeddings: dict[View, Tensor] = {}
        self.start = time.monotonic()

    def set_annotations(self, images: Sequence[LabelledImage]) -> None:
        self.data: TrainingSet = training_set(
            images, [c.id for c in self.classes], self.config.seed
        )
        self.weights = class_weights(self.data.counts()).to(self.device)
        self.confusion = np.zeros((len(_SHARES), len(self.classes), len(self.classes)), np.int64)

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def next_preview(self, began: float) -> float:
        """When to show the next preview, so that previews take a small share of the time."""
        if self.config.preview_seconds is None:
            return math.inf
        now = time.monotonic()
        return now + max(self.config.preview_seconds, _PREVIEW_REST * (now - began))

    def visible(self) -> tuple[int, int]:
        """Image and plane that previews show; the first where there is no such plane."""
        image, plane = self.control.visible
        images = self.data.images
        there = 0 <= image < len(images) and 0 <= plane < len(images[image].image)
        return (image, plane) if there else (0, 0)

    def share(self, step: int) -> float:
        """How much of the round is over, in [0, 1], by steps or by time."""
        share = step / self.config.max_steps
        if self.config.max_minutes is not None:
            share = max(share, self.elapsed() / (60 * self.config.max_minutes))
        return min(1.0, share)

    def features(self, view: View) -> Tensor:
        """Frozen features (without batch axis) of a view."""
        pixels = view_image(self.data, view, self.normalizer, self.tile)
        return self.model.cached_prefix(pixels, self.cache)

    @torch.no_grad()
    def embedding(self, view: View) -> Tensor:
        """Embedding (without batch axis) of a view by the backbone as it came."""
        if view not in self.embeddings:
            self.embeddings[view] = self.model.embed(self.features(view)[None])[0].cpu()
        return self.embeddings[view].to(self.device)

    def detail(self, view: View) -> Tensor:
        """Out-of-fold detail logits (K, tile, tile) of a view."""
        if view not in self.details:
            assert self.model.detail is not None
            self.details[view] = view_detail(
                self.data, view, self.normalizer, self.tile, self.model.detail, self.halves
            )
        return self.details[view].to(self.device)

    def adapter(self, steps: int, reason: str, score: float | None) -> Adapter:
        return Adapter(
            backbone_name=self.model.backbone.spec.name,
            backbone_sha256=self.model.backbone.checkpoint_sha256,
            model=self.model.config,
            classes=self.classes,
            normalizer=self.normalizer,
            pixel_scale=self.pixel_scale,
            state=self.model.adapter_state(),
            summary={
                "preset": self.config.preset,
                "steps": steps,
                "seconds": round(self.elapsed(), 1),
                "ended_by": reason,
                "score": score,
                "held_out": self.data.holds_out,
                "labelled_pixels": {str(k): v for k, v in self.pixels.items()},
                "seed": self.config.seed,
            },
            version=__version__,
        )


def _adapt(run: _Round) -> Iterator[Event]:
    config, control = run.config, run.control
    yield Started(config.max_steps, run.pixels, run.data.holds_out, str(run.device))
    if run.model.detail is not None:
        yield from _fit_detail(run, run.model.detail)
    parameters = [p for n, p in run.model.trained().items() if not n.startswith("detail.")]
    adapter = {p for n, p in run.model.backbone.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p in adapter], "lr": config.adapter_lr},
            {"params": [p for p in parameters if p not in adapter], "lr": config.decoder_lr},
        ],
        weight_decay=1e-4,
    )
    peak = [group["lr"] for group in optimiser.param_groups]
    run.model.eval()
    rng = np.random.default_rng(config.seed)
    reason, step, score = "steps", 0, None
    best, best_step = 0.0, 0
    unstable = 0
    end = config.max_steps
    next_preview = run.next_preview(time.monotonic())
    while step < end:
        if control.paused and not control.stopping:
            yield Paused(step)
            began = time.monotonic()
            control.wait()
            run.start += time.monotonic() - began  # a pause uses up no time limit
        if control.stopping:
            reason = "stopped"
            break
        if config.max_minutes is not None and run.elapsed() > 60 * config.max_minutes:
            reason = "time"
            break
        images = control.take_annotations()
        if images is not None:
            yield from _take_over(run, images)
        warm = min(1.0, (step + 1) / max(1, config.warmup))
        factor = warm * 0.5 * (1 + math.cos(math.pi * run.share(step)))
        factor *= min(1.0, (end - step) / _COOL_DOWN)
        for group, lr in zip(optimiser.param_groups, peak, strict=True):
            group["lr"] = lr * factor
        decoder_only = not adapter or run.share(step) < config.decoder_share
        batch = config.decoder_batch if decoder_only else config.batch
        views = [run.views[i] for i in rng.choice(len(run.views), batch)]
        loss = _step(run, views, optimiser, parameters, config.seed + step, decoder_only)
        unstable = 0 if math.isfinite(loss) else unstable + 1
        if unstable == _UNSTABLE:
            raise ConvLoRAError(
                f"Training became unstable after step {step}; lower the learning rates or the rank."
            )
        step += 1
        yield Step(step, config.max_steps, loss, run.elapsed())
        if step % config.score_every == 0 and run.confusion.any():
            score = _score(run)
            yield Scored(step, score, run.data.holds_out)
            if score > best + _PROGRESS:
                best, best_step = score, step
            elif step - best_step >= config.patience and end > step + _COOL_DOWN:
                # Learning rates run out over a few more steps: stopping at full rate is noisy.
                reason, end = "plateau", step + _COOL_DOWN
        if time.monotonic() > next_preview:
            began = time.monotonic()
            yield from _adapted_preview(run)
            next_preview = run.next_preview(began)
    yield Finished(run.adapter(step, reason, score), reason)


def _take_over(run: _Round, images: Sequence[LabelledImage]) -> Iterator[Event]:
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
    run.details.clear()
    if run.model.detail is not None:
        yield from _fit_detail(run, run.model.detail)


def _fit_detail(run: _Round, detail: DetailBranch) -> Iterator[Preview]:
    """Fit the detail branch on all labelled pixels, show it, then one branch on each half."""
    parts = list(pixel_samples(run.data, run.normalizer, run.config.seed))
    features, target, fold, surroundings = (
        torch.from_numpy(np.concatenate(part)).to(run.device) for part in zip(*parts, strict=True)
    )
    chosen = [torch.ones_like(fold), ~fold, fold]
    for branch, keep in zip([detail, *run.halves], chosen, strict=True):
        # The halves only serve the loss: a third of the steps will do for them.
        n_steps = run.config.detail_steps // (1 if branch is detail else 3)
        steps = fit(
            branch,
            features[keep],
            target[keep],
            n_steps,
            run.config.seed,
            surroundings,
            run.data.counts(),
        )
        for _ in steps:
            if run.control.stopping:
                break
        if branch is detail and run.control.stopping:
            raise ConvLoRAError("Stopped before anything was learnt; nothing has changed.")
        if branch is detail:
            branch.share.fill_(1.0)  # what a round stopped here predicts is what was shown
            yield _detail_preview(run, detail)


def _score(run: _Round) -> float:
    """Mean IoU since the last score; held-out labels also choose the detail branch's share."""
    found = [_mean_iou(run, matrix) for matrix in run.confusion[: len(run.shares)]]
    best = int(np.argmax(found))
    if not run.data.holds_out or found[best] < found[0] + _CLEAR:
        best = 0
    if run.model.detail is not None:
        run.model.detail.share.fill_(run.shares[best])
    run.confusion[:] = 0
    return found[best]


def _mean_iou(run: _Round, matrix: np.ndarray) -> float:
    """Mean over the classes that were looked for: too rare ones are not held out."""
    ious = scores(matrix, run.classes).iou
    return float(np.mean([iou for iou, n in zip(ious.values(), matrix.sum(1), strict=True) if n]))


def _step(
    run: _Round,
    views: Sequence[View],
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    seed: int,
    decoder_only: bool,
) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        run.model.train()
        if decoder_only:
            output = run.model.decode(torch.stack([run.embedding(view) for view in views]))
        else:
            output = run.model.suffix(torch.stack([run.features(view) for view in views]))
        target, held = (
            torch.stack([view_target(run.data, v, run.tile, held=out) for v in views])
            for out in (False, True)
        )
        target, held = target.to(run.device), held.to(run.device)
        logits = F.interpolate(
            output.logits, (run.tile, run.tile), mode="bilinear", align_corners=False
        )
        loss = _head_loss(run, output, logits, target)
        detail = torch.zeros_like(logits)
        if run.model.detail is not None:
            detail = torch.stack([run.detail(view) for view in views])
            mixture = mix(logits, detail, _TRAINED_SHARE)
            loss = loss + dense_loss(mixture, target, run.weights, _SMOOTHING)
            loss = loss + _TEACHING * taught_loss(logits, detail, target.maximum(held))
        (loss + run.model.balance_loss()).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if norm.isfinite():  # one bad step must not spoil what was learnt
        optimiser.step()
    optimiser.zero_grad()
    run.model.eval()
    n_classes = len(run.classes)
    index = (held if run.data.holds_out else target).cpu().numpy()
    inside = index != VOID
    for matrix, share in zip(run.confusion, run.shares, strict=False):
        found = mix(logits.detach(), detail, share).argmax(1).cpu().numpy()
        pairs = index[inside] * n_classes + found[inside]
        matrix += np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
    return float(loss.detach()) if norm.isfinite() else math.nan


def _head_loss(run: _Round, output: HeadOutput, logits: Tensor, target: Tensor) -> Tensor:
    if output.masks is None:
        return dense_loss(logits, target, run.weights, _SMOOTHING)
    masks = F.interpolate(output.masks, (run.tile, run.tile), mode="bilinear", align_corners=False)
    return query_loss(HeadOutput(logits, masks, output.queries), target)


def _detail_preview(run: _Round, detail: DetailBranch) -> Preview:
    """Predict the visible plane with the detail branch alone."""
    image, plane = run.visible()
    logits = detail_logits(detail, run.data.images[image].image[plane], run.normalizer)
    return Preview(image, plane, run.ids[logits.argmax(0)], "detail")


def _adapted_preview(run: _Round) -> Iterator[Preview]:
    """Predict the visible plane with the whole model; nothing when the round is to stop."""
    image, plane = run.visible()
    steps = Returning(
        plane_logits(
            run.model,
            run.data.images[image].image[plane],
            run.normalizer,
            run.pixel_scale,
            cache=run.cache,
        )
    )
    for _ in steps:
        if run.control.stopping:
            return
    yield Preview(image, plane, run.ids[steps.value.argmax(0)], "adapted")
