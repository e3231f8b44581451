"""A round's first part: the detail branch is fitted and shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.errors import ConvLoRAError
from napari_convlora.events import Preview
from napari_convlora.model.detail_branch import CONTEXT_SHARES, DetailBranch
from napari_convlora.model.iteration import Returning
from napari_convlora.prediction.predict import plane_logits
from napari_convlora.training.detail_fit import brightness_spread, fit
from napari_convlora.training.detail_samples import pixel_samples
from napari_convlora.training.losses import class_weights
from napari_convlora.training.round_state import RoundState

_SECONDS_EDGE_ON = 2.0
"""A preview of planes that are seen edge-on begins no other plane after that."""


def fit_detail(run: RoundState, detail: DetailBranch) -> Iterator[Preview]:
    """Fit the detail branch on all labelled pixels, show it, then fit one blind to each fold."""
    parts = list(pixel_samples(run.data, run.normalizer, run.config.seed, run.context))
    features, target, fold, surroundings = (
        torch.from_numpy(np.concatenate(part)).to(run.device) for part in zip(*parts, strict=True)
    )
    brightness = brightness_spread(features, target, fold, detail.n_channels)
    run.renew_blind(detail)
    for i, branch in enumerate([detail, *run.blind]):
        keep = fold != i - 1
        # The blind ones only serve loss and score: a third of the steps will do for them.
        n_steps = run.config.detail_steps // (1 if branch is detail else 3)
        steps = fit(
            branch,
            features[keep],
            target[keep],
            n_steps,
            run.config.seed,
            surroundings,
            run.data.counts(),
            brightness,
            run.data.labelled_share,
            # It has seen the labels that the others must not have seen.
            run.before if branch is detail else None,
        )
        for _ in steps:
            if run.control.stopping:
                break
        if branch is detail and run.control.stopping:
            raise ConvLoRAError("Stopped before anything was learnt; nothing has changed.")
        if branch is detail:
            branch.share.fill_(1.0)  # what a round stopped here predicts is what was shown
            yield from preview(run, "detail")
    if detail.n_context and not run.control.stopping:
        share = context_share(run.blind, features, target, fold, run.data.counts())
        for branch in (detail, *run.blind):
            branch.context_share.fill_(share)


def context_share(
    blind: Sequence[DetailBranch], features: Tensor, target: Tensor, fold: Tensor, counts: Tensor
) -> float:
    """Which of `CONTEXT_SHARES` serves best where labels were not seen, by Brier score.

    Few strokes leave few unseen pixels: how sure each of them was tells more than IoU would.

    Parameters
    ----------
    blind
        Branches that were fitted on all folds but one, in the order of the folds.
    features, target, fold
        (N, F), (N,) and (N,), drawn as for `fit`.
    counts
        (K,) labelled pixels per class.
    """
    weights = class_weights(counts.to(target.device), target.bincount(minlength=len(counts)))

    @torch.inference_mode()
    def score(share: float) -> float:
        total = 0.0
        for i, branch in enumerate(blind):
            branch.context_share.fill_(share)
            truth = target[fold == i]
            wrong = branch(features[fold == i]).softmax(1) - F.one_hot(truth, len(counts))
            total += float((weights[truth] * wrong.square().sum(1)).sum())
        return total

    return min(CONTEXT_SHARES, key=score)


def preview(run: RoundState, stage: str) -> Iterator[Preview]:
    """Predict the visible plane, or some that are seen edge-on; nothing when the round is to stop.

    Of those as many as take a few seconds; the next preview goes on with others.
    """
    began = time.monotonic()
    for image, plane in run.visible():
        steps = Returning(
            plane_logits(
                run.model,
                run.data.images[image].image[plane],
                run.normalizer,
                run.pixel_scale,
                cache=run.cache,
            )
        )
        tiles, started = 0, time.monotonic()
        for _ in steps:
            if run.control.stopping:
                return
            tiles += 1
        run.tiles_per_plane = tiles
        run.seconds_per_tile = (time.monotonic() - started) / max(1, tiles)
        yield Preview(image, plane, run.ids[steps.value.argmax(0)], stage)
        if time.monotonic() - began > _SECONDS_EDGE_ON:
            return
