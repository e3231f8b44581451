"""What a model says about an image: class ids and probabilities, whole or block by block."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from napari_convlora.backbones import Backbone
from napari_convlora.config import DeviceName
from napari_convlora.control import RunControl
from napari_convlora.devices import choose_device
from napari_convlora.events import Progress
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.planes import Planes, check_pixels
from napari_convlora.images.regions import Block, is_large, plan_blocks
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.prediction.region_scorer import Scorer


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


@dataclass(frozen=True, eq=False)
class BlockPrediction:
    """What a model says about a block.

    Parameters
    ----------
    block
        Where it lies.
    labels
        (h, w) uint8 class ids.
    probabilities
        (K, h, w) float32; None unless asked for.
    uncertainty
        (h, w) uint8; None unless asked for.
    """

    block: Block
    labels: np.ndarray
    probabilities: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


def predict(
    adapter: Adapter,
    backbone: Backbone,
    image: Planes,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    device: DeviceName = "auto",
    control: RunControl | None = None,
    cache: FeatureCache | None = None,
) -> Generator[Progress, None, Prediction | None]:
    """Predict one image; yields progress and returns the result.

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
    labels = np.zeros(image.shape[:3], np.uint8)
    n_planes, *size = image.shape[:3]
    shares = np.empty((n_planes, len(adapter.classes), *size) if probabilities else 0, np.float32)
    doubts = np.zeros_like(labels) if uncertainty else None
    scorer = ready_scorer(adapter, backbone, image, device=device, cache=cache)
    for step in predict_blocks(
        scorer,
        adapter,
        plan_blocks(image.shape),
        probabilities=probabilities,
        uncertainty=uncertainty,
        control=control,
    ):
        if isinstance(step, Progress):
            yield step
            continue
        at = step.block
        labels[at.index] = step.labels
        if step.probabilities is not None:
            shares[at.plane, :, at.rows, at.columns] = step.probabilities
        if doubts is not None and step.uncertainty is not None:
            doubts[at.index] = step.uncertainty
    if control is not None and control.stopping:
        return None
    return Prediction(labels, shares if probabilities else None, doubts)


def ready_scorer(
    adapter: Adapter,
    backbone: Backbone,
    image: Planes,
    *,
    device: DeviceName = "auto",
    cache: FeatureCache | None = None,
) -> Scorer:
    """Check `image` and bring it together with the model; parameters and errors as `predict`.

    A large image leaves `cache` alone, which could not hold its features anyway.
    """
    check_pixels(image)
    model = adapter.build(backbone, choose_device(device))
    if cache is None or is_large(image.shape):
        return Scorer(model, image, adapter.normalizer, adapter.pixel_scale)
    return Scorer(model, image, adapter.normalizer, adapter.pixel_scale, cache)


def predict_blocks(
    scorer: Scorer,
    adapter: Adapter,
    blocks: Sequence[Block],
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    control: RunControl | None = None,
    keep_tiles: bool = False,
) -> Iterator[Progress | BlockPrediction]:
    """Predict `blocks` of an image of any size; yields progress, and every block once it is done.

    Parameters
    ----------
    scorer, adapter
        What `prepare` returned, and what it was made from.
    blocks
        Those to predict, in this order; see `blocks.plan`.
    probabilities, uncertainty
        Whether to return class probabilities, and their uncertainty, as well.
    control
        Its `stop` ends the generator.
    keep_tiles
        Whether further calls will ask for the neighbours of `blocks`.
    """
    ids = np.array([c.id for c in adapter.classes], np.uint8)
    for step in scorer.score(blocks, keep_tiles):
        if control is not None and control.stopping:
            return
        if isinstance(step, Progress):
            yield step
        else:
            shares = softmax(step.logits, axis=0) if probabilities else None
            doubts = margin_uncertainty(step.logits) if uncertainty else None
            yield BlockPrediction(step.block, ids[step.logits.argmax(0)], shares, doubts)


def margin_uncertainty(logits: np.ndarray) -> np.ndarray:
    """Return (H, W) uint8 per cent from logits (K, H, W): 100 minus the lead of the best class."""
    second, best = np.partition(softmax(logits, axis=0), -2, axis=0)[-2:]
    return np.rint(100 * (1 - (best - second))).astype(np.uint8)


def plane_logits(
    model: SemanticSAM,
    plane: np.ndarray,
    normalizer: Normalizer,
    pixel_scale: float,
    *,
    cache: FeatureCache,
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
    scorer = Scorer(model, plane[None], normalizer, pixel_scale, cache)
    total = np.empty(0, np.float32)
    for step in scorer.score(plan_blocks((1, *plane.shape))):
        if isinstance(step, Progress):
            yield step
            continue
        at = step.block
        if not total.size:
            total = np.empty((len(step.logits), *plane.shape[:2]), np.float32)
        total[:, at.rows, at.columns] = step.logits
    return total
