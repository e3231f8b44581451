"""How the detail branch is fitted to labelled pixels.

From a stroke or two a perceptron guesses wildly elsewhere, where a random forest stays sober. So a
forest on the same pixels teaches it on unlabelled ones; the perceptron is what is kept, being
smaller, smoother, and safe to load from a file.

A stroke that corrects one place may say too much elsewhere. What the branch of the round before
said was seen and, where it stood out as wrong, corrected: so that branch is a teacher as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from joblib import parallel_config
from torch import Tensor

from napari_convlora.devices import seed_draws
from napari_convlora.model.detail_branch import KINDS, SCALES, DetailBranch, n_features
from napari_convlora.training.losses import class_weights, weighted_cross_entropy

_BATCH = 512
_LEARNING_RATE = 6e-3
_SMOOTHING = 0.05

_TREES = 50
_TREE_PIXELS = 8_000
_EACH_CLASS = 100
_OPINIONS = 20_000
_TAUGHT = 512
_TEACHING = 0.1
_TEACHING_ALONE = 1.0
"""Unlabelled pixels per step, and the weight of what the forest says of them; and the greater
weight without the embedding, between few strokes. What objects are, the forest does not know."""

_TRUST = 0.5
_TEACHING_TRUSTED = 0.3
"""With a branch of the round before: its part in what is taught, and the weight of that where the
embedding is read."""

_MIDDLE = 2
"""Of the six scales, that whose intensity tells how bright a place is."""


def fit(
    branch: DetailBranch,
    features: Tensor,
    target: Tensor,
    steps: int,
    seed: int = 0,
    surroundings: Tensor | None = None,
    counts: Tensor | None = None,
    brightness: float = 0.0,
    labelled: float = 1.0,
    before: DetailBranch | None = None,
) -> Iterator[float]:
    """Fit `branch` on labelled pixels; yields the loss after every step.

    Parameters
    ----------
    branch
        Changed in place, its standardisation included.
    features
        (N, F) float32.
    target
        (N,) int64 class index.
    steps
        Optimiser steps of at most 512 random pixels.
    seed
        Of the pixel draw.
    surroundings
        (M, F) float32, features of any pixels, labelled or not, for the standardisation and for
        what a forest teaches. A filter that says the same on all strokes may still vary beyond
        them; scaled by the strokes alone it would drown the rest there.
    counts
        (K,) labelled pixels per class, of which `target` is a part that may favour rare classes;
        without them thin structures would be painted too thick.
    brightness
        How far pixels are made brighter or darker in training, see `brightness_spread`.
    labelled
        Labelled part of the annotated planes, in [0, 1]; the less, the more there is to be taught.
    before
        The branch whose prediction was corrected, of the same features and classes.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = target.bincount(minlength=branch.n_classes)
    counts = drawn if counts is None else counts.to(drawn.device)
    known, opinion = features, None
    if surroundings is not None:
        rows = torch.randperm(len(surroundings), generator=generator)[:_OPINIONS]
        n = n_features(branch.n_channels)  # by the embedding it would know strokes by their place
        opinion = forest_opinion(features[:, :n], target, counts, surroundings[rows, :n], seed)
        if before is not None:
            with torch.no_grad():
                earlier = before(surroundings[rows]).softmax(1)
            if earlier.isfinite().all():  # an adapter from elsewhere may hold any number
                opinion = opinion.lerp(earlier, _TRUST * (1 - labelled))
        known = torch.cat([features, surroundings[rows]])
    branch.mean.copy_(known.mean(0))
    # Tensor.std takes three times as long along this axis.
    branch.std.copy_((known - branch.mean).square_().mean(0).sqrt_().clamp_min(1e-6))
    weights = class_weights(counts, drawn)
    few = _TEACHING_ALONE, _TEACHING if before is None else _TEACHING_TRUSTED
    teachings = [_TEACHING * labelled + weight * (1 - labelled) for weight in few]
    optimiser = torch.optim.AdamW(
        branch.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _LEARNING_RATE, total_steps=max(2, steps)
    )
    n_drawn = min(_BATCH, len(target))
    shown = known.new_empty(n_drawn + (0 if opinion is None else _TAUGHT), known.shape[1])
    branch.train()
    try:
        for step in range(steps):
            pick = torch.randint(len(target), (n_drawn,), generator=generator)
            truth = target[pick]
            if opinion is not None:
                taught = torch.randint(len(opinion), (_TAUGHT,), generator=generator)
                pick = torch.cat([pick, len(target) + taught])
            with torch.random.fork_rng():  # dropout and light draw from the global state
                seed_draws(seed * steps + step, known.device)
                torch.index_select(known, 0, pick.to(known.device), out=shown)
                relight(shown, branch.n_channels, brightness)
                readings = branch.readings(shown)
            loss = known.new_zeros(())
            for said, teaching in zip(readings, teachings, strict=False):
                each = weighted_cross_entropy(said[:n_drawn], truth, weights, _SMOOTHING)
                loss = loss + each.sum() / weights[truth].sum()
                if opinion is not None:
                    loss = loss + teaching * F.cross_entropy(said[n_drawn:], opinion[taught])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            yield float(loss.detach())
    finally:
        branch.eval()


def brightness_spread(features: Tensor, target: Tensor, fold: Tensor, n_channels: int) -> float:
    """How much brighter or darker a class is in one fold than in another.

    Folds are images where there are several: where exposure or staining differ between these, they
    will differ again in those to come; where grey values are calibrated, each is a fact.

    Parameters
    ----------
    features
        (N, F), filter responses first.
    target, fold
        (N,) class index and fold of each pixel.
    n_channels
        Channels of the images.

    Returns
    -------
    float
        Standard deviation over folds of a class's mean intensity, averaged over the channels and
        the classes that occur in several folds; 0 without such a class.
    """
    intensity = features[:, : n_features(n_channels)].unflatten(1, (n_channels, SCALES, KINDS))
    intensity = intensity[:, :, _MIDDLE, 0]
    found = []
    for c in target.unique():
        means = [intensity[(target == c) & (fold == f)].mean(0) for f in fold[target == c].unique()]
        if len(means) > 1:
            found.append(torch.stack(means).std(0).mean())
    return float(torch.stack(found).mean()) if found else 0.0


def relight(features: Tensor, n_channels: int, spread: float) -> None:
    """Change what describes some pixels, in place, to what would under another light.

    All filters are linear in the intensity, or scale with it, so that no image is filtered again.

    Parameters
    ----------
    features
        (N, F), filter responses first.
    n_channels
        Channels of the images.
    spread
        Scale of what is drawn for each pixel, from the global state: a factor for all channels, one
        for each channel, and an offset.
    """
    if not spread:
        return
    draw = (torch.randn(len(features), n_channels + 2) * spread).to(features.device)
    gain = (2 * draw[:, :1] + draw[:, 1:-1]).exp()
    local = features[:, : n_features(n_channels)].unflatten(1, (n_channels, SCALES, KINDS))
    local *= gain[:, :, None, None]
    local[..., 0] += draw[:, -1, None, None]


def forest_opinion(
    features: Tensor, target: Tensor, counts: Tensor, elsewhere: Tensor, seed: int
) -> Tensor:
    """Class probabilities (M, K) that a random forest on labelled pixels gives to other pixels.

    Parameters
    ----------
    features, target
        (N, F) and (N,) int64; at most 8,000 rows, drawn so that classes occur as in `counts`, and
        100 of each class.
    counts
        (K,) labelled pixels per class.
    elsewhere
        (M, F).
    seed
        Of the draw and of the trees.
    """
    from sklearn.ensemble import RandomForestClassifier  # takes a second

    rng = np.random.default_rng(seed)
    labels = target.cpu().numpy()
    share = counts.cpu().numpy() / np.maximum(1, np.bincount(labels, minlength=len(counts)))
    odds = share[labels] / share[labels].max()
    rows = np.flatnonzero(rng.random(len(labels)) < odds)
    rows = rng.permuted(rows)[:_TREE_PIXELS]
    own = [rng.permuted(np.flatnonzero(labels == c))[:_EACH_CLASS] for c in range(len(counts))]
    rows = np.unique(np.concatenate([rows, *own]))
    trees = RandomForestClassifier(_TREES, n_jobs=torch.get_num_threads(), random_state=seed)
    opinion = np.zeros((len(elsewhere), len(counts)), np.float32)
    with parallel_config("threading"):  # processes may be forbidden where this runs
        trees.fit(features.cpu().numpy()[rows], labels[rows])
        opinion[:, trees.classes_] = trees.predict_proba(elsewhere.cpu().numpy())
    return torch.from_numpy(opinion).to(elsewhere.device)
