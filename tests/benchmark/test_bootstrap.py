from __future__ import annotations

import numpy as np

from napari_convlora.benchmark.bootstrap import bootstrap_differences, bootstrap_mean


def two_systems(n_images: int, n_seeds: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrices of systems that err on about 10 and 15 per cent of each of two classes."""
    rng = np.random.default_rng(0)

    def matrices(rate: float) -> np.ndarray:
        wrong = rng.binomial(200, rng.normal(rate, 0.02, (n_seeds, n_images, 2)).clip(0, 1))
        right = 200 - wrong
        return np.stack(
            [
                np.stack([right[..., 0], wrong[..., 0]], -1),
                np.stack([wrong[..., 1], right[..., 1]], -1),
            ],
            -2,
        )

    return matrices(0.10), matrices(0.15)


def test_the_interval_holds_the_true_difference_and_narrows_with_more_images() -> None:
    truth = 0.9 / 1.1 - 0.85 / 1.15
    widths = []
    for n_images in (6, 24, 96):
        low, high = np.percentile(bootstrap_differences(*two_systems(n_images)), (2.5, 97.5))
        assert low < truth < high
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_a_system_does_not_differ_from_itself_and_pairs_cancel() -> None:
    ours, _ = two_systems(8)
    assert not bootstrap_differences(ours, ours).any()
    # All of the second system's errors moved in step: the images' spread must not count.
    better = ours + np.eye(2, dtype=np.int64) * 5
    draws = bootstrap_differences(better, ours)
    assert draws.min() > 0


def test_the_mean_over_sets_is_less_sure_when_sets_disagree() -> None:
    rng = np.random.default_rng(0)
    agree = np.stack([rng.normal(2, 0.1, 2000) for _ in range(4)])
    disagree = agree + np.array([[-3.0], [3.0], [-3.0], [3.0]])
    assert np.ptp(np.percentile(bootstrap_mean(agree), (2.5, 97.5))) < 0.5
    low, high = np.percentile(bootstrap_mean(disagree), (2.5, 97.5))
    assert low < 0 < 2 < high
