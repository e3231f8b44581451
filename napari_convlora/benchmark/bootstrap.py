"""How sure a difference in mean IoU is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from napari_convlora.evaluation.metrics import mean_ious

_DRAWS = 2000


def bootstrap_differences(
    ours: np.ndarray, theirs: np.ndarray, draws: int = _DRAWS, seed: int = 0
) -> np.ndarray:
    """Paired bootstrap of a difference in mean IoU, over seeds and images.

    Every draw takes seeds and images with replacement, the same ones for both systems, sums the
    images' confusion matrices, and averages the mean IoU over the seeds (Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13).

    Parameters
    ----------
    ours, theirs : (S, I, K, K)
        Confusion matrices by seed and image.
    draws, seed
        How many draws, and of which generator.

    Returns
    -------
    (draws,) float64
        `ours` minus `theirs`.
    """
    rng = np.random.default_rng(seed)
    n_seeds, n_images = ours.shape[:2]
    # How often a seed or an image is drawn is all that matters.
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), draws)
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), draws)

    def value(matrices: np.ndarray) -> np.ndarray:
        by_seed = mean_ious(np.einsum("di,sikl->dskl", images.astype(np.float64), matrices))
        return np.sum(by_seed * seeds, 1) / n_seeds

    return value(ours) - value(theirs)


def bootstrap_mean(draws: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Bootstrap of the mean over sets: draws sets with replacement, then one draw of each.

    Parameters
    ----------
    draws
        `bootstrap_differences` (D,) of each set.
    seed
        Of the generator.

    Returns
    -------
    (D,) float64
    """
    by_set = np.stack(draws)
    n_sets, n_draws = by_set.shape
    chosen = np.random.default_rng(seed).integers(n_sets, size=(n_sets, n_draws))
    return by_set[chosen, np.arange(n_draws)].mean(0)
