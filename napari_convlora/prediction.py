"""Tiled prediction: overlapping tiles, logits blended with a smooth window."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from scipy.special import softmax

from napari_convlora.adapter_file import Adapter
from napari_convlora.backbones import Backbone
from napari_convlora.config import DeviceName
from napari_convlora.data import (
    FeatureCache,
    Normalizer,
    blend_window,
    crop,
    resize,
    tile_starts,
    to_rgb,
)
from napari_convlora.detail import DetailBranch, mix, region_features
from napari_convlora.devices import choose_device
from napari_convlora.events import RunControl
from napari_convlora.model import SemanticSAM
from napari_convlora.planes import check_pixels

OVERLAP = 0.25
Y = TypeVar("Y")
R = TypeVar("R")
_DETAIL_BLOCK = 512


@dataclass(frozen=True)
class Progress:
    """`done` of `total` tiles."""

    done: int
    total: int


class Returning(Generic[Y, R]):
    """Iterate over a generator and keep what it returns in `value`."""

    value: R

    def __init__(self, generator: Generator[Y, None, R]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Y]:
        self.value = yield from self._generator


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Parameters
    ----------
    labels
        (P, H, W) uint8 class ids.
    probabilities
        (P, K, H, W) float32 in the order of the adapter's classes, summing to 1; None unless
        asked for.
    uncertainty
        (P, H, W) uint8 in per cent: 100 minus the lead of the likeliest class over the second;
        None unless asked for.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


def predict(
    adapter: Adapter,
    backbone: Backbone,
    image: np.ndarray,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    device: DeviceName = "auto",
    control: RunControl | None = None,
    cache: FeatureCache | None = None,
) -> Generator[Progress, None, Prediction | None]:
    """Predict one image plane by plane; yields progress and returns the result.

    Parameters
    ----------
    adapter, backbone
        The adapter and the backbone it was trained on.
    image
        (P, H, W, C), any numeric dtype.
    probabilities
        Whether to keep class probabilities as well.
    uncertainty
        Whether to say where the model hesitates between two classes.
    device
        Where to compute.
    control
        Its `stop` cancels; then the generator returns None.
    cache
        Frozen features kept between calls.

    Raises
    ------
    AdapterError
        If the adapter belongs to another backbone.
    InputError
        If the image cannot be used.
    """
    check_pixels(image)
    model = adapter.build(backbone, choose_device(device))
    ids = np.array([c.id for c in adapter.classes], np.uint8)
    labels = np.empty(image.shape[:3], np.uint8)
    doubts = np.empty(image.shape[:3], np.uint8) if uncertainty else None
    shares = []
    for index, plane in enumerate(image):
        steps = Returning(
            plane_logits(model, plane, adapter.normalizer, adapter.pixel_scale, cache=cache)
        )
        for step in steps:
            if control is not None and control.stopping:
                return None
            yield Progress(index * step.total + step.done, len(image) * step.total)
        logits = steps.value
        labels[index] = ids[logits.argmax(0)]
        if probabilities:
            shares.append(softmax(logits, axis=0))
        if doubts is not None:
            doubts[index] = margin_uncertainty(logits)
    return Prediction(labels, np.stack(shares) if probabilities else None, doubts)


def margin_uncertainty(logits: np.ndarray) -> np.ndarray:
    """Return (H, W) uint8 per cent from logits (K, H, W): 100 minus the lead of the best class."""
    second, best = np.partition(softmax(logits, axis=0), -2, axis=0)[-2:]
    return np.rint(100 * (1 - (best - second))).astype(np.uint8)


def sam_tiles(shape: tuple[int, int], side: int, overlap: float = OVERLAP) -> list[tuple[int, int]]:
    """Corners (top, left) of the tiles that cover an image of `shape`."""
    rows, columns = (tile_starts(extent, side, overlap) for extent in shape)
    return [(top, left) for top in rows for left in columns]


def plane_logits(
    model: SemanticSAM,
    plane: np.ndarray,
    normalizer: Normalizer,
    pixel_scale: float,
    *,
    cache: FeatureCache | None = None,
) -> Generator[Progress, None, np.ndarray]:
    """Score one plane; yields after every tile and returns logits (K, H, W) float32.

    Parameters
    ----------
    model
        In eval mode, on its device.
    plane
        (H, W, C), any numeric dtype, as read.
    normalizer, pixel_scale
        Those of training.
    cache
        Where the frozen features of the tiles are kept between calls.
    """
    height, width = plane.shape[:2]
    tile = model.backbone.spec.image_size
    side = max(1, round(tile / pixel_scale))
    corners = sam_tiles((height, width), side)
    window = blend_window(side)
    total: np.ndarray | None = None
    weight = np.zeros((height, width), np.float32)
    for done, (top, left) in enumerate(corners, 1):
        square = normalizer(np.asarray(crop(plane, top, left, side)))
        logits = _tile_logits(model, square, side, tile, cache)
        if total is None:
            total = np.zeros((len(logits), height, width), np.float32)
        y0, y1 = max(top, 0), min(top + side, height)
        x0, x1 = max(left, 0), min(left + side, width)
        inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        total[:, y0:y1, x0:x1] += logits[:, *inside] * window[inside]
        weight[y0:y1, x0:x1] += window[inside]
        yield Progress(done, len(corners))
    assert total is not None
    total /= weight
    if model.detail is not None:
        detail = detail_logits(model.detail, plane, normalizer)
        share = float(model.detail.share)
        total = mix(torch.from_numpy(total), torch.from_numpy(detail), share).numpy()
    return total


@torch.no_grad()
def _tile_logits(
    model: SemanticSAM, square: np.ndarray, side: int, tile: int, cache: FeatureCache | None
) -> np.ndarray:
    rgb = torch.from_numpy(np.ascontiguousarray(to_rgb(square))).movedim(-1, 0)
    features = model.cached_prefix(resize(rgb, tile), cache)
    logits = model.suffix(features[None]).logits[0]
    return resize(logits.float(), side).cpu().numpy()


def detail_logits(branch: DetailBranch, plane: np.ndarray, normalizer: Normalizer) -> np.ndarray:
    """Score one plane (H, W, C) with the detail branch alone; logits are (K, H, W) float32."""
    height, width = plane.shape[:2]
    rows = []
    for top in range(0, height, _DETAIL_BLOCK):
        row = []
        for left in range(0, width, _DETAIL_BLOCK):
            region = np.s_[top : top + _DETAIL_BLOCK, left : left + _DETAIL_BLOCK]
            row.append(branch.logits(region_features(plane, normalizer, *region)))
        rows.append(np.concatenate(row, axis=2))
    return np.concatenate(rows, axis=1)
