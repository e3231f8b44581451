"""How rounds compare: the better-or-keep gate, and what later corrections say of a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from napari_convlora.config import UNLABELLED

TOLERANCE = 0.01
"""Mean IoU that a round may lose: it has learnt from more labels, and scores are noisy."""

GAIN = 0.005
"""Mean IoU by which a round must be better than the one before to have gained."""


@dataclass(frozen=True)
class Verdict:
    """Whether a round is to be installed, and why, in one sentence."""

    better: bool
    reason: str


@dataclass(frozen=True)
class Correction:
    """How right a prediction was where people painted later.

    Parameters
    ----------
    pixels
        How many were painted since.
    accuracy, mean_iou
        Over those pixels, in [0, 1]; the mean over the classes painted. NaN without pixels.
    """

    pixels: int
    accuracy: float
    mean_iou: float


def decide(summary: Mapping[str, Any]) -> Verdict:
    """Return whether a round is better than the installed one, from its adapter's summary.

    Parameters
    ----------
    summary
        Its ``compared`` is absent in a first round; it holds either ``why`` no comparison was
        possible, or mean IoU of ``installed`` and ``new`` on the same ``pixels`` that are held
        out and that neither has learnt from. A round that was broken off is installed only if
        nothing else is.
    """
    compared = summary.get("compared")
    if not compared:
        return Verdict(True, "Installed, as there was no adapter before.")
    if summary.get("ended_by") == "failure":
        return Verdict(False, "Kept but not installed, as the round was broken off.")
    if "why" in compared:
        return Verdict(True, f"Installed without a comparison, as {compared['why']}.")
    new, before, pixels = compared["new"], compared["installed"], compared["pixels"]
    on = f"on {pixels:,} held-out pixels that neither has learnt from"
    if new >= before - TOLERANCE:
        return Verdict(
            True, f"Installed, as it scores {new:.2f} {on}, and the one before {before:.2f}."
        )
    return Verdict(
        False,
        f"Kept but not installed, as it scores {new:.2f} {on}, but the installed one {before:.2f}.",
    )


def gained(summary: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Return whether a round gained on the one before; True where that cannot be said.

    Parameters
    ----------
    summary, before
        Of the adapters of both rounds. If both were compared on the same pixels, that counts,
        else their scores do if both are on held-out, or both on training labels, and the one before
        left room for more.
    """
    compared = summary.get("compared") or {}
    if "new" in compared:
        return bool(compared["new"] > compared["installed"] + GAIN)
    if before is None or before.get("held_out") != summary.get("held_out"):
        return True
    new, old = summary.get("score"), before.get("score")
    if new is None or old is None or old + GAIN >= 1:  # few strokes are easily learnt by heart
        return True
    return bool(new > old + GAIN)


def correction(prediction: np.ndarray, before: np.ndarray, now: np.ndarray) -> Correction:
    """Score a prediction against what was painted after it was made.

    People correct where they see mistakes, so this says how the mistakes shrink from round to round
    rather than how good a whole prediction is.

    Parameters
    ----------
    prediction, before, now : (P, H, W) int
        What the round predicted, the annotations it learnt from, and those of today.
    """
    painted = (now != before) & (now != UNLABELLED)
    truth, found = now[painted], prediction[painted]
    if not len(truth):
        return Correction(0, float("nan"), float("nan"))
    ious = [
        ((truth == i) & (found == i)).sum() / ((truth == i) | (found == i)).sum()
        for i in np.unique(truth)
    ]
    return Correction(len(truth), float((truth == found).mean()), float(np.mean(ious)))
