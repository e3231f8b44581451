"""What Conv-LoRA is compared with: a random forest, and a U-Net from scratch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from joblib import parallel_config

from napari_convlora.config import UNLABELLED, DeviceName
from napari_convlora.devices import choose_device
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.resample import crop
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.detail_branch import filter_bank
from napari_convlora.training.losses import VOID, class_weights, dense_loss

Predict = Callable[[np.ndarray], np.ndarray]
"""From an image (P, H, W, C) to class ids (P, H, W) uint8."""

_FOREST_PIXELS = 50_000
_PATCH = 256
_BATCH = 2
_LEARNING_RATE = 1e-3


def forest(images: Sequence[LabelledImage], seed: int) -> Predict:
    """Fit a random forest on the filter bank of the labelled pixels, as ilastik does.

    100 trees on intensity, gradient and Hessian features at six scales; at most 50,000 random
    labelled pixels (Berg et al., Nature Methods 2019).
    """
    from sklearn.ensemble import RandomForestClassifier

    normalizer = Normalizer.fit([image.image for image in images])
    features, labels = _labelled_pixels(images, normalizer, seed)
    trees = RandomForestClassifier(100, n_jobs=-1, random_state=seed)
    with parallel_config("threading"):  # a run's process may have none of its own
        trees.fit(features, labels)

    def predict(image: np.ndarray) -> np.ndarray:
        planes = [filter_bank(normalizer(plane)) for plane in image]
        with parallel_config("threading"):
            found = [trees.predict(p.reshape(-1, p.shape[-1])).reshape(p.shape[:2]) for p in planes]
        return np.stack(found).astype(np.uint8)

    return predict


def _labelled_pixels(
    images: Sequence[LabelledImage], normalizer: Normalizer, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) and ids (N,) of at most 50,000 labelled pixels."""
    rng = np.random.default_rng(seed)
    total = sum(np.count_nonzero(image.annotations) for image in images)
    features, labels = [], []
    for image in images:
        for plane, painted in zip(image.image, image.annotations, strict=True):
            chosen = painted != UNLABELLED
            chosen &= rng.random(chosen.shape) < _FOREST_PIXELS / max(total, 1)
            features.append(filter_bank(normalizer(plane))[chosen])
            labels.append(painted[chosen])
    return np.concatenate(features), np.concatenate(labels)


def unet(
    images: Sequence[LabelledImage], seed: int, seconds: float, device: DeviceName = "auto"
) -> Predict:
    """Train MONAI's BasicUNet from scratch on the labelled pixels.

    Cross-entropy and Dice over labelled pixels, square patches around them, drawn class by
    class, quarter turns and flips, AdamW with a cosine over the time given.

    Parameters
    ----------
    images
        Annotated images of equal channel count.
    seed
        Of the weights and the patches.
    seconds
        Wall clock of the training.
    device
        Where to train and predict.
    """
    from monai.inferers import sliding_window_inference
    from monai.networks.nets import BasicUNet

    begin = time.monotonic()
    place = choose_device(device)
    rng = np.random.default_rng(seed)
    normalizer = Normalizer.fit([image.image for image in images])
    ids = np.unique(np.concatenate([np.unique(image.annotations) for image in images]))
    ids = ids[ids != UNLABELLED]
    index = np.full(256, VOID, np.int64)
    index[ids] = np.arange(len(ids))
    pixels = [
        np.concatenate(
            [np.insert(np.argwhere(im.annotations == c), 0, i, 1) for i, im in enumerate(images)]
        )
        for c in ids
    ]
    longest = max(max(image.image.shape[1:3]) for image in images)
    side = min(_PATCH, 16 * math.ceil(longest / 16))  # the net halves four times
    weights = class_weights(torch.tensor([len(own) for own in pixels])).to(place)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = BasicUNet(2, images[0].image.shape[-1], len(ids)).to(place)
    optimiser = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    share = 0.0
    while share < 1:
        at = [own[rng.integers(len(own))] for own in (pixels[c] for c in _classes(rng, len(ids)))]
        drawn = [_patch(images[i], plane, row, column, side, rng) for i, plane, row, column in at]
        inputs = np.stack([normalizer(patch).transpose(2, 0, 1) for patch, _ in drawn])
        target = torch.from_numpy(np.stack([index[labels] for _, labels in drawn]))
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * share))
        dense_loss(net(torch.from_numpy(inputs).to(place)), target.to(place), weights).backward()
        optimiser.step()
        optimiser.zero_grad()
        share = (time.monotonic() - begin) / seconds
    net.eval()

    @torch.inference_mode()
    def predict(image: np.ndarray) -> np.ndarray:
        found = []
        for plane in image:
            inputs = torch.from_numpy(normalizer(plane).transpose(2, 0, 1))[None].to(place)
            logits = sliding_window_inference(
                inputs, (side, side), 1, net, 0.25, "gaussian", padding_mode="replicate"
            )
            found.append(ids[logits[0].argmax(0).cpu().numpy()])
        return np.stack(found).astype(np.uint8)

    return predict


def _classes(rng: np.random.Generator, n_classes: int) -> np.ndarray:
    """Draw the classes of a batch, different ones as far as there are."""
    return rng.choice(n_classes, _BATCH, replace=n_classes < _BATCH)


def _patch(
    image: LabelledImage, plane: int, row: int, column: int, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square (side, side, C) and its labels around a pixel, turned and flipped at random."""
    # Squares may reach over the edge, where the image is mirrored, but not with their centre:
    # in a small image the net would otherwise learn the places of the strokes by heart.
    top, left = (
        int(np.clip(at - rng.integers(side), -side // 2, extent - side // 2))
        for at, extent in zip((row, column), image.image.shape[1:3], strict=True)
    )
    square = crop(image.image[plane], top, left, side)
    labels = crop(image.annotations[plane], top, left, side, fill=UNLABELLED)
    turns, flip = int(rng.integers(4)), rng.choice((1, -1))
    return np.rot90(square, turns)[:, ::flip], np.rot90(labels, turns)[:, ::flip]
