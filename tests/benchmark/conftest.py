"""Small image sets on disk: three classes that a glance tells apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from napari_convlora.labels.annotations import LabelledImage


@pytest.fixture
def data(tmp_path: Path, scene: Callable[..., tuple[LabelledImage, np.ndarray]]) -> Path:
    """A folder with the set ``stripes``: four images; mask ids 10, 20, 30 and 0 = void."""
    folder = tmp_path / "data" / "stripes"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(4):
        labelled, truth = scene(48, 48, seed=number)
        masks = (10 * truth[0]).astype(np.uint8)
        masks[:4] = 0
        Image.fromarray((255 * labelled.image[0, ..., 0]).astype(np.uint8)).save(
            folder / "images" / f"s{number}.png"
        )
        Image.fromarray(masks).save(folder / "masks" / f"s{number}.png")
    meta = {
        "classes": {"0": "void", "10": "dark", "20": "bright", "30": "striped"},
        "suggested_split": {"train": ["s0", "s1"], "test": ["s2", "s3"]},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder.parent
