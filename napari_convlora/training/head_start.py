"""Where a round's head starts: at a linear reading of what SAM sees without any training."""

from __future__ import annotations

import numpy as np
import torch

from napari_convlora.model.heads import ClassTokens
from napari_convlora.training.losses import VOID
from napari_convlora.training.round_state import RoundState
from napari_convlora.training.views import view_target

_VIEWS = 12
_PIXELS = 20_000
_INVERSE_PENALTY = 0.01
"""scikit-learn's C. Pixels of a stroke repeat each other, so that 20,000 say what 200 would."""


def begin_head(run: RoundState) -> None:
    """Start class tokens from a logistic regression on SAM's own mask and upscaled map.

    SAM's mask without prompts often shows the very object that is asked for, or its opposite; how
    much it says of each class is read from the labelled pixels of some views. Other heads, labels
    of a single class in these views, and a backbone that overflows leave the start as it is.
    """
    head = run.model.head
    if not isinstance(head, ClassTokens) or head.decoder.probe is None:
        return
    from sklearn.linear_model import LogisticRegression  # takes a second

    views = run.views[:_VIEWS]
    evidence, labels = [], []
    for view in views:
        if run.control.stopping:
            return
        embedding = run.embedding(view)[None]
        maps = head.evidence(embedding, *run.model.no_prompt(embedding))[0].cpu()
        target = view_target(run.data, view, run.tile)
        rows, columns = (target != VOID).nonzero().T
        coarse = maps.shape[-1] / run.tile
        evidence.append(maps[:, (rows * coarse).long(), (columns * coarse).long()].T)
        labels.append(target[rows, columns])
    known, index = torch.cat(evidence).numpy(), torch.cat(labels).numpy()
    drawn = np.random.default_rng(run.config.seed).permutation(len(index))[:_PIXELS]
    known, index = known[drawn], index[drawn]
    present = np.unique(index)
    if len(present) < 2 or not np.isfinite(known).all():
        return
    mean, std = known.mean(0), known.std(0) + 1e-6
    fitted = LogisticRegression(C=_INVERSE_PENALTY, max_iter=300).fit(
        (known - mean) / std, index, run.weights.cpu().numpy()[index]
    )
    found, offset = fitted.coef_, fitted.intercept_
    if len(present) == 2:  # one row says both
        found, offset = (np.concatenate([-row, row]) / 2 for row in (found, offset))
    found = found / std
    offset = offset - found @ mean
    weights = np.zeros((len(run.classes), known.shape[1]), np.float32)
    bias = np.full(len(run.classes), offset.min(), np.float32)
    weights[present], bias[present] = found, offset
    head.begin(*(torch.from_numpy(part).to(run.device) for part in (weights, bias)))
