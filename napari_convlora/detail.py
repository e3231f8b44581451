"""The detail branch: a small perceptron on each pixel, which sees detail as well as context.

SAM's tokens span 4 to 16 pixels and lose texture and thin structure; a bank of Gaussian, gradient
and Hessian features (scikit-image's) at full resolution has them. What an object is, filters cannot
tell; SAM's embedding before any adaptation often can. The perceptron reads both. Fitted on the
labelled pixels in seconds, it is also a round's first preview.

From a stroke or two a perceptron guesses wildly elsewhere, where a random forest stays sober. So a
forest on the same pixels teaches it on unlabelled ones; the perceptron is what is kept, being
smaller, smoother, and safe to load from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from joblib import parallel_config
from skimage.feature import multiscale_basic_features
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

from napari_convlora.data import Normalizer
from napari_convlora.losses import class_weights
from napari_convlora.planes import LazyPlane, check_finite
from napari_convlora.tiles import Tile, blend

SIGMA_MAX = 16.0
HALO = 48
"""Pixels around a region that its filters can see, to 3 sigma."""

_WIDTH = 128
_STRIP = 64
"""Rows scored at a time, to save memory."""

_BATCH = 2048
_LEARNING_RATE = 6e-3
_SMOOTHING = 0.05
_DROPOUT = 0.1

_HIDDEN = 0.5
_CONTEXT_DROPOUT = 0.5
"""Share of pixels that must do without the embedding at a step of training, and of its channels
that the others lack: what it says of three images is easily known by heart."""

_CONTEXT_SHARE = 0.75
"""How much what is said with the embedding counts beside what is said without."""

_TREES = 50
_TREE_PIXELS = 20_000
_EACH_CLASS = 100
_TEACHING = 0.1
_TAUGHT = 1024
"""Unlabelled pixels per step, and the weight of what the forest says of them."""


def filter_bank(image: np.ndarray) -> np.ndarray:
    """Local features of every pixel.

    Parameters
    ----------
    image
        (H, W, C) float32, normalised to about [0, 1].

    Returns
    -------
    ndarray
        (H, W, F) float32, F = 24 C: intensity, gradient magnitude and the two Hessian
        eigenvalues at six scales from 0.5 to 16 pixels.
    """
    height, width = image.shape[:2]
    # Gradients need two pixels a side.
    padded = np.pad(image, [(0, int(height < 2)), (0, int(width < 2)), (0, 0)], mode="edge")
    features = multiscale_basic_features(
        np.ascontiguousarray(padded, np.float32),
        sigma_min=0.5,
        sigma_max=SIGMA_MAX,
        channel_axis=-1,
        workers=torch.get_num_threads(),
    )
    return np.ascontiguousarray(features[:height, :width], dtype=np.float32)


def region_features(
    plane: np.ndarray | LazyPlane, normalizer: Normalizer, rows: slice, columns: slice
) -> np.ndarray:
    """Filter responses (h, w, F) of a region, seen with the surroundings its filters reach."""
    height, width = plane.shape[:2]
    y0, y1 = max(rows.start - HALO, 0), min(rows.stop + HALO, height)
    x0, x1 = max(columns.start - HALO, 0), min(columns.stop + HALO, width)
    features = filter_bank(normalizer(check_finite(np.asarray(plane[y0:y1, x0:x1]))))
    return features[
        rows.start - y0 : min(rows.stop, height) - y0,
        columns.start - x0 : min(columns.stop, width) - x0,
    ]


def n_features(n_channels: int) -> int:
    """Return how many features `filter_bank` makes of an image with `n_channels`."""
    return 24 * n_channels


class DetailBranch(nn.Module):
    """Per-pixel perceptron on filter responses and SAM's frozen embedding, standardised.

    Parameters
    ----------
    n_channels
        Channels of the images.
    n_context
        Channels of the embedding; 0 for filters alone.
    n_classes
        K.

    Attributes
    ----------
    share
        () in [0, 1], how much its probabilities count beside the head's; training chooses it.
    """

    mean: Tensor
    std: Tensor
    share: Tensor

    def __init__(self, n_channels: int, n_context: int, n_classes: int) -> None:
        super().__init__()
        self.n_channels, self.n_context, self.n_classes = n_channels, n_context, n_classes
        n_inputs = n_features(n_channels) + n_context
        self.register_buffer("mean", torch.zeros(n_inputs))
        self.register_buffer("std", torch.ones(n_inputs))
        self.register_buffer("share", torch.tensor(1.0))
        self.first = nn.Linear(n_inputs, _WIDTH)
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_WIDTH, _WIDTH),
            nn.ReLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_WIDTH, n_classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Score `features` (..., F), filter responses first; logits are (..., K)."""
        local, context = self._halves((features - self.mean) / self.std)
        if self.training:
            hidden = torch.rand(*context.shape[:-1], 1, device=context.device) < _HIDDEN
            return self.layers(local + context.masked_fill(hidden, 0))
        return self._read(local, context)

    def _halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first layer makes of filters, and what the embedding adds to that."""
        n = n_features(self.n_channels)
        local = F.linear(features[..., :n], self.first.weight[:, :n], self.first.bias)
        context = F.dropout(features[..., n:], _CONTEXT_DROPOUT, self.training)
        return local, F.linear(context, self.first.weight[:, n:])

    def _read(self, local: Tensor, context: Tensor) -> Tensor:
        """Mix what is said without the embedding and with it."""
        if not self.n_context:
            return self.layers(local)
        return mix(self.layers(local), self.layers(local + context), _CONTEXT_SHARE, dim=-1)

    @torch.inference_mode()
    def logits(
        self, features: np.ndarray, context: Sequence[Tile], rows: slice, columns: slice
    ) -> np.ndarray:
        """Score every pixel of a region.

        The first layer is linear, so it is applied to the coarse embedding before that is enlarged.

        Parameters
        ----------
        features
            Filter responses (h, w, F) of the region.
        context
            Embeddings of all tiles that overlap the region.
        rows, columns
            The region, in image pixels.

        Returns
        -------
        ndarray
            (K, h, w) float32.
        """
        device, n = self.mean.device, n_features(self.n_channels)
        weight, mean, std = self.first.weight, self.mean, self.std
        tiles = []
        for tile in context:
            values = (tile.values.to(device) - mean[n:, None, None]) / std[n:, None, None]
            hidden = torch.einsum("oc,chw->ohw", weight[:, n:], values)
            tiles.append(replace(tile, values=hidden.cpu()))
        parts = []
        for i in range(0, len(features), _STRIP):
            local = torch.from_numpy(features[i : i + _STRIP]).to(device)
            hidden = F.linear((local - mean[:n]) / std[:n], weight[:, :n], self.first.bias)
            seen = torch.zeros(())
            if tiles:
                strip = slice(rows.start + i, rows.start + i + len(local))
                seen = torch.from_numpy(blend(tiles, strip, columns)).movedim(0, -1)
            parts.append(self._read(hidden, seen.to(device)).cpu().numpy())
        return np.concatenate(parts).transpose(2, 0, 1)


def mix(logits: Tensor, detail: Tensor, share: float, dim: int = -3) -> Tensor:
    """Logits of the mixture ``share * softmax(detail) + (1 - share) * softmax(logits)``.

    A mixture, unlike a sum of logits, lets the surer of the two decide: an overconfident head
    cannot overrule a sure detail branch whose share is above one half.

    Parameters
    ----------
    logits, detail
        Class scores (..., K, H, W) of the head and of the detail branch.
    share
        Of the detail branch, in [0, 1].
    dim
        That of the classes.
    """
    mixture = share * detail.softmax(dim) + (1 - share) * logits.softmax(dim)
    return mixture.clamp_min(1e-9).log()


def fit(
    branch: DetailBranch,
    features: Tensor,
    target: Tensor,
    steps: int,
    seed: int = 0,
    surroundings: Tensor | None = None,
    counts: Tensor | None = None,
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
        Optimiser steps of at most 2,048 random pixels.
    seed
        Of the pixel draw.
    surroundings
        (M, F) float32, features of any pixels, labelled or not, for the standardisation and for
        what a forest teaches. A filter that says the same on all strokes may still vary beyond
        them; scaled by the strokes alone it would drown the rest there.
    counts
        (K,) labelled pixels per class, of which `target` is a part that may favour rare classes;
        without them thin structures would be painted too thick.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = target.bincount(minlength=branch.n_classes)
    counts = drawn if counts is None else counts.to(drawn.device)
    known, opinion = features, target
    if surroundings is not None:
        known = torch.cat([features, surroundings])
        rows = torch.randperm(len(surroundings), generator=generator)[:_TREE_PIXELS]
        surroundings = surroundings[rows]
        n = n_features(branch.n_channels)  # by the embedding it would know strokes by their place
        opinion = forest_opinion(features[:, :n], target, counts, surroundings[:, :n], seed)
    branch.mean.copy_(known.mean(0))
    branch.std.copy_(known.std(0, unbiased=False).clamp_min(1e-6))
    weights = class_weights(counts, drawn)
    optimiser = torch.optim.AdamW(branch.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _LEARNING_RATE, total_steps=max(2, steps)
    )
    branch.train()
    try:
        for step in range(steps):
            pick = torch.randint(len(target), (min(_BATCH, len(target)),), generator=generator)
            with torch.random.fork_rng():  # dropout draws from the global state
                torch.manual_seed(seed * steps + step)
                logits = branch(features[pick])
                loss = F.cross_entropy(logits, target[pick], weights, label_smoothing=_SMOOTHING)
                if surroundings is not None:
                    pick = torch.randint(len(surroundings), (_TAUGHT,), generator=generator)
                    loss = loss + _TEACHING * F.cross_entropy(
                        branch(surroundings[pick]), opinion[pick]
                    )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            yield float(loss.detach())
    finally:
        branch.eval()


def forest_opinion(
    features: Tensor, target: Tensor, counts: Tensor, elsewhere: Tensor, seed: int
) -> Tensor:
    """Class probabilities (M, K) that a random forest on labelled pixels gives to other pixels.

    Parameters
    ----------
    features, target
        (N, F) and (N,) int64; rows are drawn so that classes occur as often as in `counts`.
    counts
        (K,) labelled pixels per class.
    elsewhere
        (M, F).
    seed
        Of the draw and of the trees.
    """
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
