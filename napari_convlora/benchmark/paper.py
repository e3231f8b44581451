"""The protocol of the Conv-LoRA paper (ICLR 2024, arXiv 2401.17868): train, select, test.

Training is dense: whole images squeezed into a square, AdamW with a learning rate that falls
linearly to zero, gradients of single images accumulated into batches, horizontal flips, and the
epoch that is best on the validation set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import sem
from torch import Tensor
from torch.utils.data import DataLoader

from napari_convlora import __version__
from napari_convlora.backbones import Backbone
from napari_convlora.benchmark import saliency
from napari_convlora.benchmark.paper_data import Pair, Pairs, SegmentationTask
from napari_convlora.config import ModelConfig
from napari_convlora.devices import mixed_precision
from napari_convlora.evaluation.metrics import balanced_error, confusion, scores
from napari_convlora.formats.opening import read_image
from napari_convlora.images.normalise import Normalizer
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.heads import HeadOutput
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.peft import METHODS
from napari_convlora.training.losses import (
    VOID,
    balanced_bce,
    class_weights,
    dense_loss,
    query_loss,
    structure_loss,
)

_SALIENCY = {
    "s_measure": saliency.s_measure,
    "e_measure": saliency.e_measure,
    "weighted_f": saliency.weighted_f_measure,
    "mae": saliency.mean_absolute_error,
}
BINARY_METRICS = (*_SALIENCY, "iou", "dice", "ber")
LOWER_IS_BETTER = ("mae", "ber")
_SIZED = 20


@dataclass(frozen=True)
class PaperConfig:
    """How the protocol is run.

    Parameters
    ----------
    size
        Side of the square that images are resized to, in pixels.
    epochs, patience
        At most so many epochs, and how many without progress end the training.
    lr, batch
        Peak learning rate, and images per optimiser step.
    metric
        Of the validation set, chooses the best epoch: one of `BINARY_METRICS`, or ``miou`` of
        class ids. ``ber`` also trains with the balanced cross-entropy, as the paper does.
    edge_bce
        See `losses.structure_loss`.
    workers
        Processes that read images.
    """

    size: int = 1024
    epochs: int = 30
    patience: int = 10
    lr: float = 1e-4
    batch: int = 4
    metric: str = "s_measure"
    edge_bce: bool = False
    workers: int = 0


@dataclass(frozen=True)
class PaperData:
    """The three splits, what their labels mean, and labelled training pixels per class (K,)."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    task: SegmentationTask
    counts: Tensor


@dataclass(frozen=True)
class Epoch:
    """One epoch is over: its 1-based number, mean loss and validation score, and the best yet."""

    number: int
    loss: float
    score: float
    best: float
    best_epoch: int


@dataclass(frozen=True)
class Evaluated:
    """Scores of a set of images.

    Parameters
    ----------
    summary
        Per metric: mean over images, or, for ``dataset_iou`` and ``miou``, of summed pixels.
    images
        One row per image: its path, and every metric of it.
    """

    summary: dict[str, float]
    images: list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """The best model of a run, in eval mode on its device, with its history."""

    model: SemanticSAM
    history: list[Epoch]
    seconds: float


def train(
    backbone: Backbone,
    model_config: ModelConfig,
    data: PaperData,
    config: PaperConfig,
    seed: int,
    device: torch.device,
) -> Generator[Epoch, None, Trained]:
    """Train one model; yields after every epoch and returns the model of the best one.

    Parameters
    ----------
    backbone, model_config
        What is trained.
    data, config
        On what, and how.
    seed
        Of torch's global generator, which this function sets, of the order and of the flips.
    device
        Where. On CUDA with bfloat16, training runs in mixed precision; scores never do.
    """
    start = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SemanticSAM(backbone, model_config, data.task.n_classes).to(device)
    # A frozen encoder sees every image twice at most: as it is and flipped.
    cache = None if METHODS[model_config.method].adapts_encoder else FeatureCache()
    optimiser = torch.optim.AdamW(_groups(model), lr=config.lr)
    total = config.epochs * math.ceil(len(data.train) / config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    weights = class_weights(data.counts).to(device)
    loader = DataLoader(
        Pairs(data.train, data.task, config.size),
        batch_size=None,
        shuffle=True,
        num_workers=config.workers,
        generator=torch.Generator().manual_seed(seed),
    )
    sign = -1 if config.metric in LOWER_IS_BETTER else 1
    history: list[Epoch] = []
    best, best_epoch, best_state = math.nan, 0, model.adapter_state()
    for number in range(1, config.epochs + 1):
        model.train()
        losses = []
        for i, (pixels, target) in enumerate(loader):
            if rng.random() < 0.5:
                pixels, target = pixels.flip(-1), target.flip(-1)
            with mixed_precision(device):
                features = model.cached_prefix(pixels, cache).float()
                output = model.suffix(features[None])
            loss = _loss(output, target[None].to(device), weights, data.task, config)
            # The last batch of an epoch may be smaller.
            share = min(config.batch, len(loader) - i // config.batch * config.batch)
            ((loss + model.balance_loss()) / share).backward()
            losses.append(float(loss.detach()))
            if (i + 1) % config.batch == 0 or i + 1 == len(loader):
                torch.nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
        model.eval()
        scored = evaluate_pairs(model, data.val, data.task, config, (config.metric,), cache)
        score = scored.summary[config.metric]
        if best_epoch == 0 or sign * score > sign * best:
            best, best_epoch, best_state = score, number, model.adapter_state()
        history.append(Epoch(number, float(np.mean(losses)), score, best, best_epoch))
        yield history[-1]
        if number - best_epoch >= config.patience:
            break
    model.load_adapter_state(best_state)
    return Trained(model, history, time.monotonic() - start)


def _groups(model: SemanticSAM) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; biases and norms go without."""
    named = model.trained().items()
    free = [p for name, p in named if name.endswith("bias") or p.ndim < 2]
    decayed = [p for name, p in named if not (name.endswith("bias") or p.ndim < 2)]
    return [{"params": decayed, "weight_decay": 1e-4}, {"params": free, "weight_decay": 0.0}]


def _loss(
    output: HeadOutput, target: Tensor, weights: Tensor, task: SegmentationTask, config: PaperConfig
) -> Tensor:
    """Loss of the paper for the head's output at full size; `target` is (1, H, W)."""
    logits = _enlarge(output.logits, target.shape[-1])
    if output.masks is not None:
        masks = _enlarge(output.masks, target.shape[-1])
        assert output.queries is not None
        return query_loss(HeadOutput(logits, masks, output.queries.float()), target)
    if not task.binary:
        return dense_loss(logits, target, weights)
    mask = logits[:, 1] - logits[:, 0]
    if config.metric == "ber":
        return balanced_bce(mask, target)
    return structure_loss(mask, target, config.edge_bce)


def _enlarge(maps: Tensor, size: int | Sequence[int]) -> Tensor:
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return F.interpolate(maps.float(), shape, mode="bilinear", align_corners=False)


def evaluate_pairs(
    model: SemanticSAM,
    pairs: list[Pair],
    task: SegmentationTask,
    config: PaperConfig,
    metrics: Sequence[str] = BINARY_METRICS,
    cache: FeatureCache | None = None,
    native: bool = False,
) -> Evaluated:
    """Score `model`, in eval mode, on `pairs`.

    Parameters
    ----------
    model, pairs, task, config
        As in `train`.
    metrics
        Of masks; class ids have ``miou`` and ``pixel_accuracy`` only.
    cache
        Of frozen features.
    native
        Compare at the size of each label image, with the logits enlarged to it, instead of at
        ``config.size``.
    """
    ids = range(task.n_classes)
    total = np.zeros((task.n_classes, task.n_classes), np.int64)
    rows: list[dict[str, Any]] = []
    loader = DataLoader(
        Pairs(pairs, task, config.size), batch_size=None, num_workers=config.workers
    )
    for pair, (pixels, target) in zip(pairs, loader, strict=True):
        truth = task.read(pair.label) if native else target.numpy()
        with torch.no_grad():
            features = model.cached_prefix(pixels, cache).float()
            logits = _enlarge(model.suffix(features[None]).logits, config.size)
            shares = _enlarge(logits, truth.shape).softmax(1)[0].cpu().numpy()
        matrix = confusion(shares.argmax(0), truth, ids, ignore=VOID)
        total += matrix
        row: dict[str, Any] = {"image": str(pair.image)}
        if task.binary:
            row |= _mask_scores(shares[1], truth == 1, matrix, metrics)
        else:
            row["miou"] = scores(matrix, ids).mean_iou
        rows.append(row)
    found = scores(total, ids)
    if not task.binary:
        return Evaluated({"miou": found.mean_iou, "pixel_accuracy": found.pixel_accuracy}, rows)
    summary = {name: float(np.mean([row[name] for row in rows])) for name in metrics}
    return Evaluated(summary | {"dataset_iou": found.iou[1]}, rows)


def _mask_scores(
    share: np.ndarray, truth: np.ndarray, matrix: np.ndarray, metrics: Sequence[str]
) -> dict[str, float]:
    """Scores of one map (H, W); an image without object in which none is found counts 1."""
    found = scores(matrix, (0, 1))
    nothing = math.isnan(found.iou[1])
    overlaps = {
        "iou": 1.0 if nothing else found.iou[1],
        "dice": 1.0 if nothing else found.dice[1],
        "ber": balanced_error(matrix),
    }
    stretched = saliency.stretch(share)  # as in the implementation the paper used
    return {
        name: overlaps[name] if name in overlaps else _SALIENCY[name](stretched, truth)
        for name in metrics
    }


def to_adapter(trained: Trained, data: PaperData, config: PaperConfig, seed: int) -> Adapter:
    """Pack the trained model as an adapter file's content.

    Label value v becomes the class id v + 1, as 0 means unlabelled. Prediction keeps the aspect of
    an image, so that its masks differ a little from those scored here.
    """
    sides = [max(read_image(pair.image).shape[1:3]) for pair in data.train[:_SIZED]]
    best = trained.history[-1]
    backbone = trained.model.backbone
    return Adapter(
        backbone_name=backbone.spec.name,
        backbone_sha256=backbone.checkpoint_sha256,
        pixel_mean=backbone.spec.pixel_mean,
        pixel_std=backbone.spec.pixel_std,
        model=trained.model.config,
        classes=default_classes(data.task.n_classes),
        normalizer=Normalizer((0.0,) * 3, (255.0,) * 3),
        pixel_scale=config.size / float(np.median(sides)),
        state=trained.model.adapter_state(),
        summary={
            "preset": "paper",
            "steps": best.best_epoch * math.ceil(len(data.train) / config.batch),
            "seconds": round(trained.seconds, 1),
            "ended_by": "best epoch",
            "score": best.best,
            "metric": config.metric,
            "held_out": True,
            "seed": seed,
        },
        version=__version__,
    )


def mean_and_error(summaries: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean of every metric over runs, and its standard error; None for a single run."""
    return {
        name: {
            "mean": float(np.mean(values)),
            "standard_error": float(sem(values)) if len(values) > 1 else None,
        }
        for name in summaries[0]
        for values in [[summary[name] for summary in summaries]]
    }
