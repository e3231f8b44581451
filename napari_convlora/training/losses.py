"""Losses that see labelled pixels only: an unlabelled pixel has target -1 and no influence."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from napari_convlora.model.heads import HeadOutput

VOID = -1
"""Target of a pixel that nobody labelled."""


def class_weights(counts: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Weight of every class: its pixels together count by the square root of their number.

    Parameters
    ----------
    counts
        Labelled pixels per class (K,), float or int; classes without pixels get weight 0.
    drawn
        Pixels per class (K,) among those the loss will see, where that is a part of `counts`;
        the mean weight over them is 1.
    """
    counts = counts.float()
    drawn = counts if drawn is None else drawn.float()
    weights = torch.where(drawn > 0, counts.sqrt() / drawn.clamp_min(1), torch.zeros_like(counts))
    mean = (weights * drawn).sum() / drawn.sum().clamp_min(1)
    return weights / mean.clamp_min(1e-12)


def masked_dice(probabilities: Tensor, target: Tensor) -> Tensor:
    """Dice loss over labelled pixels, mean over the classes present in the target.

    Parameters
    ----------
    probabilities
        (B, K, H, W), summing to 1 over K.
    target
        (B, H, W) int64 class index, or `VOID`.

    Returns
    -------
    Tensor
        Scalar in [0, 1]; 0 when nothing is labelled.
    """
    labelled = (target != VOID)[:, None]
    truth = F.one_hot(target.clamp_min(0), probabilities.shape[1]).movedim(-1, 1) * labelled
    probabilities = probabilities * labelled
    overlap = (probabilities * truth).sum((0, 2, 3))
    total = (probabilities.square() + truth).sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    return (dice * present).sum() / present.sum().clamp_min(1)


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weights: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy of every pixel, smoothing included, times the weight of the pixel's class.

    torch's own weighs the smoothing by the classes that a pixel is *not*: at 1000 to 1 the best
    answer for a pixel that is surely of the common class would be the rare one.

    Parameters
    ----------
    logits
        (N, K, ...).
    target
        (N, ...) int64 class index, or `VOID`.
    weights
        (K,).
    smoothing
        Share of the target that is spread over all classes, in [0, 1).

    Returns
    -------
    Tensor
        (N, ...); 0 where nobody labelled.
    """
    each = F.cross_entropy(
        logits, target, ignore_index=VOID, reduction="none", label_smoothing=smoothing
    )
    return each * weights[target.clamp_min(0)]


def dense_loss(logits: Tensor, target: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Class-weighted cross-entropy plus Dice, both over labelled pixels.

    Parameters
    ----------
    logits
        (B, K, H, W).
    target
        (B, H, W) int64 class index, or `VOID`.
    weights
        `class_weights`, (K,).
    smoothing
        Label smoothing of the cross-entropy, in [0, 1).

    Returns
    -------
    Tensor
        Scalar; 0 with zero gradient when nothing is labelled.
    """
    labelled = (target != VOID).sum().clamp_min(1)
    cross_entropy = weighted_cross_entropy(logits, target, weights, smoothing).sum()
    return cross_entropy / labelled + masked_dice(logits.softmax(1), target)


def taught_loss(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy to a teacher's soft answer where nobody labelled.

    Few strokes say nothing about most of an image; a teacher that was fitted on the same strokes
    and sees finer detail keeps the student from inventing there.

    Parameters
    ----------
    logits, teacher
        (B, K, H, W), of the student and of the teacher; no gradient reaches the teacher.
    target
        (B, H, W) int64 class index, or `VOID`.

    Returns
    -------
    Tensor
        Scalar; 0 with zero gradient when everything is labelled.
    """
    free = (target == VOID)[:, None]
    each = teacher.detach().softmax(1) * logits.log_softmax(1)
    return -(each * free).sum() / free.sum().clamp_min(1)


def match_queries(
    masks: Tensor, queries: Tensor, truth: Tensor, classes: Tensor, labelled: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Assign queries to the classes present in one image (Hungarian matching).

    Costs are those of Mask2Former, ``-p(class) + 5 BCE + 5 Dice``, over labelled pixels only.

    Parameters
    ----------
    masks
        Mask logits (Q, H, W).
    queries
        Class logits (Q, K + 1).
    truth
        One binary mask per class present (T, H, W), float.
    classes
        Their indices (T,).
    labelled
        (H, W) bool.

    Returns
    -------
    rows, columns : ndarray of int
        Query ``rows[i]`` answers for class ``classes[columns[i]]``.
    """
    with torch.no_grad():
        pixels, target = masks[:, labelled], truth[:, labelled]
        positive = F.softplus(-pixels) @ target.T
        negative = F.softplus(pixels) @ (1 - target).T
        bce = (positive + negative) / target.shape[1]
        probabilities = pixels.sigmoid()
        overlap = 2 * probabilities @ target.T + 1
        dice = 1 - overlap / (probabilities.sum(1)[:, None] + target.sum(1) + 1)
        cost = -queries.softmax(-1)[:, classes] + 5 * bce + 5 * dice
    rows, columns = linear_sum_assignment(cost.float().cpu().numpy())
    return np.asarray(rows), np.asarray(columns)


def query_loss(output: HeadOutput, target: Tensor, no_object: float = 0.1) -> Tensor:
    """Loss of the classification branch: matched masks and classes, void pixels left out.

    Weights are those Mask2Former intends: 2 for the class, 5 for BCE, 5 for Dice.

    Parameters
    ----------
    output
        With `masks` (B, Q, H, W) and `queries` (B, Q, K + 1).
    target
        (B, H, W) int64 class index, or `VOID`.
    no_object
        Weight of the "no object" class for unmatched queries.

    Returns
    -------
    Tensor
        Scalar, mean over the images that have labels.
    """
    assert output.masks is not None
    assert output.queries is not None
    n_classes = output.queries.shape[-1] - 1
    weight = output.queries.new_ones(n_classes + 1)
    weight[-1] = no_object
    losses = []
    for masks, queries, labels in zip(output.masks, output.queries, target, strict=True):
        labelled = labels != VOID
        if not labelled.any():
            continue
        classes = labels[labelled].unique()
        truth = (labels == classes[:, None, None]).to(masks.dtype)
        rows, columns = match_queries(masks, queries, truth, classes, labelled)
        wanted = torch.full((len(queries),), n_classes, device=labels.device)
        wanted[rows] = classes[columns]
        pixels, matched = masks[rows][:, labelled], truth[columns][:, labelled]
        probabilities = pixels.sigmoid()
        overlap = (probabilities * matched).sum(1)
        dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + matched.sum(1) + 1)
        losses.append(
            2 * F.cross_entropy(queries, wanted, weight)
            + 5 * F.binary_cross_entropy_with_logits(pixels, matched)
            + 5 * dice.mean()
        )
    return torch.stack(losses).mean() if losses else output.logits.sum() * 0


def structure_loss(logits: Tensor, target: Tensor, edge_bce: bool = False) -> Tensor:
    """Structure loss of F3Net (Wei et al., AAAI 2020, arXiv 1911.11445): BCE plus IoU near edges.

    Pixels weigh ``1 + 5 |m - g|``, where m is the mean of the truth g over 31 x 31 pixels; an
    unlabelled pixel counts there as its centre does. As released, and as Conv-LoRA was trained,
    the cross-entropy is averaged before it is weighted, so that only the IoU half sees edges.

    Parameters
    ----------
    logits
        Of the object, (B, H, W).
    target
        (B, H, W) int64: 0, 1 or `VOID`.
    edge_bce
        Weight the cross-entropy as well, as the paper's equation says.

    Returns
    -------
    Tensor
        Scalar, mean over images; an image without labels adds nothing.
    """
    labelled, truth, bce = _binary(logits, target)
    # Beyond the border lies background, as in the released code.
    near, void = (F.avg_pool2d(t[:, None], 31, 1, 15)[:, 0] for t in (truth, 1 - labelled))
    weight = labelled * (1 + 5 * (near + truth * void - truth).abs())
    share = (weight if edge_bce else labelled).flatten(1)
    bce = (share * bce.flatten(1)).sum(1) / share.sum(1).clamp_min(1)
    p = logits.sigmoid()
    overlap = (weight * p * truth).sum((1, 2))
    union = (weight * (p + truth)).sum((1, 2)) - overlap
    return (bce + 1 - (overlap + 1) / (union + 1)).mean()


def balanced_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in which both classes of the batch weigh alike (EVP, arXiv 2303.10883).

    Object pixels weigh by the share of background and the other way round.

    Parameters
    ----------
    logits
        Of the object, (B, H, W).
    target
        (B, H, W) int64: 0, 1 or `VOID`.

    Returns
    -------
    Tensor
        Scalar; 0 where only one class, or none, is labelled.
    """
    labelled, truth, bce = _binary(logits, target)
    total = labelled.sum().clamp_min(1)
    share = truth.sum() / total
    background = labelled.sum() / total - share
    weight = torch.where(truth > 0, background, share) * labelled
    return (weight * bce).sum() / total


def _binary(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labelled pixels, truth and cross-entropy, each (B, H, W) float; void pixels have truth 0."""
    truth = target.clamp_min(0).to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (target != VOID).to(logits.dtype), truth, bce
