"""One optimiser step, and the running score that it feeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.devices import mixed_precision
from napari_convlora.evaluation.metrics import scores
from napari_convlora.model.detail_branch import mix
from napari_convlora.model.heads import HeadOutput
from napari_convlora.training.losses import VOID, dense_loss, query_loss, taught_loss
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.views import View, view_target

_SMOOTHING = 0.1
"""Label smoothing: after tens of steps on a few strokes SAM is sure of everything."""

_SHARE = 0.5
"""Of the detail branch in the mixture, in the loss and in what is predicted. Held-out labels cannot
choose it: they lie in images that SAM has learnt from, and flatter it."""

_STROKES_SHARE = 0.7
"""The same in what is predicted where next to nothing is labelled: between few strokes SAM invents
more than the detail branch does."""

_TEACHING = 0.5
"""Weight of what the detail branch teaches SAM on unlabelled pixels."""

_SEEDS_APART = 1_000_003
"""Between the processes of a team, so that each draws routing noise of its own."""


def train_step(
    run: RoundState,
    views: Sequence[View],
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    seed: int,
    decoder_only: bool,
) -> float:
    """Learn from a batch of views and count their running score.

    Parameters
    ----------
    run
        Changed: model and confusion matrix.
    views
        The batch.
    optimiser, parameters
        The parameters are those whose gradient is clipped.
    seed
        Of routing noise and dropout.
    decoder_only
        Whether to start from cached embeddings, which leaves the encoder as it is.

    Returns
    -------
    float
        The loss; NaN for a step that was left out because its gradient was not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed + _SEEDS_APART * run.team.rank)
        own = run.team.part(views)
        inputs = [run.embedding(view) if decoder_only else run.features(view) for view in own]
        # Before training mode, in which the detail branch would leave out features at random.
        details = [run.detail(view) for view in views if run.model.detail is not None]
        run.model.train()
        forward = run.model.decode if decoder_only else run.model.suffix
        with mixed_precision(run.device):
            output = forward(torch.stack(inputs)).single()
        output = run.team.whole(output, len(views))
        target, held = (
            torch.stack([view_target(run.data, v, run.tile, held=out) for v in views])
            for out in (False, True)
        )
        target, held = target.to(run.device), held.to(run.device)
        logits = F.interpolate(
            output.logits, (run.tile, run.tile), mode="bilinear", align_corners=False
        )
        loss = _head_loss(run, output, logits, target)
        if details:
            detail = torch.stack(details)
            loss = loss + _TEACHING * taught_loss(logits, detail, target.maximum(held))
            logits = mix(logits, detail, _SHARE)
            loss = loss + dense_loss(logits, target, run.weights, _SMOOTHING)
        (loss + run.model.balance_loss() / run.team.size).backward()
    run.team.add_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if norm.isfinite():  # one bad step must not spoil what was learnt
        optimiser.step()
    optimiser.zero_grad()
    run.model.eval()
    n_classes = len(run.classes)
    index = (held if run.data.holds_out else target).cpu().numpy()
    inside = index != VOID
    found = logits.detach().argmax(1).cpu().numpy()
    pairs = index[inside] * n_classes + found[inside]
    run.confusion += np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
    return float(loss.detach()) if norm.isfinite() else math.nan


def _head_loss(run: RoundState, output: HeadOutput, logits: Tensor, target: Tensor) -> Tensor:
    if output.masks is None:
        return dense_loss(logits, target, run.weights, _SMOOTHING)
    masks = F.interpolate(output.masks, (run.tile, run.tile), mode="bilinear", align_corners=False)
    return query_loss(HeadOutput(logits, masks, output.queries), target)


def take_score(run: RoundState) -> float:
    """Mean IoU since the last score; from the first one on SAM counts in what is predicted.

    It is the mean over the classes that were looked for: too rare ones are not held out.
    """
    confusion = run.team.lead(torch.from_numpy(run.confusion.copy())).numpy()
    run.confusion[:] = 0
    if run.model.detail is not None:
        labelled = run.data.labelled_share
        run.model.detail.share.fill_(_SHARE * labelled + _STROKES_SHARE * (1 - labelled))
    ious = scores(confusion, run.classes).iou.values()
    return float(np.mean([iou for iou, n in zip(ious, confusion.sum(1), strict=True) if n]))
