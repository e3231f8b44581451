"""The detail branch: two small perceptrons on each pixel, which see detail as well as context.

SAM's tokens span 4 to 16 pixels and lose texture and thin structure; a bank of Gaussian, gradient
and Hessian features (scikit-image's) at full resolution has them. What an object is, filters cannot
tell; SAM's embedding before any adaptation often can. One perceptron reads the filters alone, the
other one both. Fitted on the labelled pixels in seconds, they are also a round's first preview.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from skimage.feature import multiscale_basic_features
from torch import Tensor, nn

from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.planes import LazyPlane, check_finite
from napari_convlora.images.tiles import Tile, blend

SIGMA_MAX = 16.0
HALO = 48
"""Pixels around a region that its filters can see, to 3 sigma."""

SCALES, KINDS = 6, 4
"""Layout of a channel's filters: at each scale intensity, gradient and two eigenvalues."""

_WIDTH = 128
_STRIP = 64
"""Rows scored at a time, to save memory."""

_DROPOUT = 0.1
_CONTEXT_DROPOUT = 0.5
"""Share of the embedding's channels that a step of training lacks, beside every other pixel that
does without it at all: what it says of three images is easily known by heart."""

CONTEXT_SHARES = (0.75, 0.5, 0.25)
"""How much what is said with the embedding may count beside what is said without. Spots on a leaf
are best found by filters, organs by the embedding. The first holds until labels choose."""


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
    return SCALES * KINDS * n_channels


class _ChannelDropout(nn.Module):
    """Dropout of the same channels for all pixels of a step: as good, and nearly free."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        """Drop channels of `values` (..., C)."""
        if not self.training:
            return values
        return values * F.dropout(values.new_ones(values.shape[-1]), self.share)


def _deeper_layers(n_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        _ChannelDropout(_DROPOUT),
        nn.Linear(_WIDTH, _WIDTH),
        nn.ReLU(),
        _ChannelDropout(_DROPOUT),
        nn.Linear(_WIDTH, n_classes),
    )


class DetailBranch(nn.Module):
    """Per-pixel perceptrons on standardised filter responses, without and with SAM's embedding.

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
        () in [0, 1], how much its probabilities count beside the head's.
    context_share
        () in [0, 1], how much in these what is said with the embedding counts.
    """

    mean: Tensor
    std: Tensor
    share: Tensor
    context_share: Tensor

    def __init__(self, n_channels: int, n_context: int, n_classes: int) -> None:
        super().__init__()
        self.n_channels, self.n_context, self.n_classes = n_channels, n_context, n_classes
        n_inputs = n_features(n_channels) + n_context
        self.register_buffer("mean", torch.zeros(n_inputs))
        self.register_buffer("std", torch.ones(n_inputs))
        self.register_buffer("share", torch.tensor(1.0))
        self.register_buffer("context_share", torch.tensor(CONTEXT_SHARES[0]))
        self.filters = nn.Linear(n_features(n_channels), _WIDTH)
        self.filter_layers = _deeper_layers(n_classes)
        self.first = nn.Linear(n_inputs, _WIDTH)
        self.context_dropout = _ChannelDropout(_CONTEXT_DROPOUT)
        self.layers = _deeper_layers(n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Score `features` (..., F), filter responses first; logits are (..., K)."""
        return self._mix(*self.readings(features))

    def readings(self, features: Tensor) -> list[Tensor]:
        """Return what is said without the embedding, and with it if there is one.

        In training every other row does without the embedding in the second reading, too.
        """
        n = n_features(self.n_channels)
        local, context = features[..., :n], features[..., n:]
        scaled = self._scaled(local)
        alone = self._alone(scaled)
        if not self.n_context:
            return [alone]
        hidden = self._local(scaled)
        if self.training:
            hidden[::2] += self._context(context[::2])
        else:
            hidden = hidden + self._context(context)
        return [alone, self.layers(hidden)]

    def _scaled(self, features: Tensor) -> Tensor:
        """Standardise filter responses (..., F)."""
        n = n_features(self.n_channels)
        return (features - self.mean[:n]) / self.std[:n]

    def _alone(self, scaled: Tensor) -> Tensor:
        """Return what standardised filter responses (..., F) say by themselves."""
        return self.filter_layers(self.filters(scaled))

    def _local(self, scaled: Tensor) -> Tensor:
        """Return what the first layer makes of standardised filter responses (..., F)."""
        weight = self.first.weight[:, : n_features(self.n_channels)]
        return F.linear(scaled, weight, self.first.bias)

    def _context(self, embedding: Tensor) -> Tensor:
        """Return what an embedding (..., n_context) adds to that."""
        n = n_features(self.n_channels)
        known = self.context_dropout(embedding - self.mean[n:])
        return F.linear(known, self.first.weight[:, n:] / self.std[n:])

    def _mix(self, alone: Tensor, with_context: Tensor | None = None) -> Tensor:
        """Mix what is said without the embedding and with it."""
        if with_context is None:
            return alone
        return mix(alone, with_context, self.context_share, dim=-1)

    @torch.inference_mode()
    def at(self, features: np.ndarray) -> np.ndarray:
        """Score single pixels (N, F), filter responses first, and return their logits (K, N)."""
        return self(torch.from_numpy(features).to(self.mean.device)).T.cpu().numpy()

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
        device = self.mean.device
        tiles = []
        for tile in context:
            values = self._context(tile.values.to(device).movedim(0, -1))
            tiles.append(replace(tile, values=values.movedim(-1, 0).cpu()))
        parts = []
        for i in range(0, len(features), _STRIP):
            scaled = self._scaled(torch.from_numpy(features[i : i + _STRIP]).to(device))
            said = [self._alone(scaled)]
            if tiles:
                strip = slice(rows.start + i, rows.start + i + len(scaled))
                seen = torch.from_numpy(blend(tiles, strip, columns)).movedim(0, -1)
                said.append(self.layers(self._local(scaled) + seen.to(device)))
            parts.append(self._mix(*said).cpu().numpy())
        return np.concatenate(parts).transpose(2, 0, 1)


def mix(logits: Tensor, detail: Tensor, share: float | Tensor, dim: int = -3) -> Tensor:
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
