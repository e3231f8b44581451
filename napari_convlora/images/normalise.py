"""Channels and values: the linear map that brings pixels to 0..1, and three channels for SAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from napari_convlora.errors import InputError

_PERCENTILES = (0.1, 99.9)
_FIT_PIXELS = 1_000_000
_REMARK_PIXELS, _LEAST_INSIDE = 100_000, 0.1


@dataclass(frozen=True)
class Normalizer:
    """Linear map of every channel, fitted once and stored in the adapter.

    Parameters
    ----------
    low, high
        Pixel value per channel that becomes 0 and 1.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, images: Sequence[np.ndarray]) -> Normalizer:
        """Take the 0.1 and 99.9 percentile of every channel over all `images` (P, H, W, C)."""
        n_channels = images[0].shape[-1]
        share = _FIT_PIXELS // len(images)
        samples = []
        for image in images:
            _check_channels(image, n_channels)
            pixels = image.reshape(-1, n_channels)
            samples.append(np.asarray(pixels[:: max(1, len(pixels) // share)], np.float64))
        low, high = np.percentile(np.concatenate(samples), _PERCENTILES, axis=0)
        high = np.where(high > low, high, low + 1)
        return cls(tuple(map(float, low)), tuple(map(float, high)))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalise `image` (..., C) to float32 in [0, 1]; values beyond the ends are clipped."""
        _check_channels(image, len(self.low))
        if image.dtype.itemsize > 4 and image.dtype.kind == "f":  # may not fit into float32
            image = np.clip(image, self.low, self.high)
        low = np.asarray(self.low, np.float32)
        span = np.subtract(self.high, self.low).astype(np.float32)  # high may round to low
        return np.clip((image.astype(np.float32) - low) / span, 0, 1)

    def remark(self, image: np.ndarray) -> str:
        """Return a sentence if hardly a pixel of `image` (P, H, W, C) is in range, else ""."""
        _check_channels(image, len(self.low))
        pixels = image.reshape(-1, image.shape[-1])
        pixels = pixels[:: max(1, len(pixels) // _REMARK_PIXELS)]
        if ((pixels >= self.low) & (pixels <= self.high)).mean() > _LEAST_INSIDE:
            return ""
        return (
            f"Its values ({pixels.min():g} to {pixels.max():g}) lie outside of what the adapter "
            f"learnt from ({min(self.low):g} to {max(self.high):g}), so that it sees little; bring "
            "the image to the same scale, or annotate a part of it and adapt."
        )


def _check_channels(image: np.ndarray, expected: int) -> None:
    if image.shape[-1] != expected:
        raise InputError(
            f"The image has {image.shape[-1]} channels where {expected} are expected; "
            "use images with the same channels for training and prediction."
        )


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Three channels for SAM from (..., C): grey is repeated; of many, the first three count."""
    n_channels = image.shape[-1]
    if n_channels == 1:
        return np.repeat(image, 3, axis=-1)
    if n_channels == 2:
        return np.concatenate([image, image.mean(-1, keepdims=True)], axis=-1)
    return image[..., :3]
