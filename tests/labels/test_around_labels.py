from __future__ import annotations

import numpy as np
import pytest

from napari_convlora.images import regions
from napari_convlora.images.planes import lazy_planes
from napari_convlora.images.regions import Block
from napari_convlora.labels.around_labels import labelled_parts


def test_of_a_large_image_only_what_lies_around_labels_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions, "LARGE", 10**6)
    image = np.arange(9000 * 9000, dtype=np.float32).reshape(1, 9000, 9000, 1)
    labels = np.zeros((1, 9000, 9000), np.uint8)
    labels[0, 1500:1510, 1700] = 1
    labels[0, 2500, 2400] = 2  # near the first: one part
    labels[0, 8999, 8999] = 2
    parts = labelled_parts(lazy_planes(image[0, ..., 0]), labels, "big")
    assert [where for where, _ in parts] == [
        Block(0, 512, 1024, 2560, 2048),
        Block(0, 8192, 8192, 808, 808),
    ]
    for where, part in parts:
        np.testing.assert_array_equal(part.image[0], image[0, where.rows, where.columns])
        np.testing.assert_array_equal(part.annotations[0], labels[0, where.rows, where.columns])
    assert sum((part.annotations > 0).sum() for _, part in parts) == 12


def test_strokes_in_a_chain_or_a_ring_read_little_and_are_learnt_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions, "LARGE", 10**6)
    image = np.broadcast_to(np.uint8(0), (12000, 12000))
    labels = np.zeros((1, 12000, 12000), np.uint8)
    for i in range(500, 11900, 1400):
        labels[0, i : i + 10, i : i + 10] = 1  # a chain from corner to corner
    for i in range(2000, 6000, 500):
        for row, column in ((2000, i), (6000, i), (i, 2000), (i, 6000)):
            labels[0, row, column] = 2  # a ring
    labels[0, 3000:3004, 5000] = 3  # in the ring
    parts = labelled_parts(lazy_planes(image), labels)
    seen = np.zeros_like(labels)
    for where, part in parts:
        here = seen[0, where.rows, where.columns]
        assert not (here * part.annotations[0]).any()  # no label twice
        here += part.annotations[0]
        assert max(part.image.shape[1:3]) <= 4096
    np.testing.assert_array_equal(seen, labels)
    assert sum(part.image.size for _, part in parts) < 0.6 * image.size


def test_of_a_small_lazy_image_everything_is_read() -> None:
    image = np.random.default_rng(0).random((2, 30, 40))
    ((where, part),) = labelled_parts(lazy_planes(image), np.zeros((2, 30, 40), int))
    np.testing.assert_array_equal(part.image[..., 0], image)
    assert where == Block(0, 0, 0, 30, 40)
