from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from napari_convlora.benchmark.sets import find_sets, open_set, read_sample
from napari_convlora.errors import InputError


def test_ids_become_classes_from_one_and_void_becomes_nothing(data: Path) -> None:
    assert find_sets(data) == ["stripes"]
    found = open_set(data / "stripes")
    assert found.classes == ("dark", "bright", "striped")
    sample = read_sample(found, "s2")
    assert sample.image.shape == (1, 48, 48, 1)
    assert not sample.truth[:, :4].any()
    assert sample.truth[0, 24, [2, 24, 46]].tolist() == [1, 2, 3]


def test_a_crop_keeps_the_centre(data: Path) -> None:
    found = open_set(data / "stripes")
    whole, cropped = read_sample(found, "s0"), read_sample(found, "s0", crop=20)
    assert (cropped.image == whole.image[:, 14:34, 14:34]).all()
    assert (cropped.truth == whole.truth[:, 14:34, 14:34]).all()


def test_without_meta_the_first_half_trains_and_every_id_is_a_class(data: Path) -> None:
    (data / "stripes" / "meta.json").unlink()
    found = open_set(data / "stripes")
    assert found.train == ("s0", "s1")
    assert found.test == ("s2", "s3")
    assert found.mask_ids == (0, 10, 20, 30)
    assert read_sample(found, "s0").truth.min() == 1


def test_a_class_that_only_sounds_like_void_is_kept(data: Path) -> None:
    meta = json.loads((data / "stripes" / "meta.json").read_text())
    meta["classes"]["0"] = "air / voids"
    (data / "stripes" / "meta.json").write_text(json.dumps(meta))
    assert open_set(data / "stripes").classes[0] == "air / voids"


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ('{"classes": {"0": "a", "1": "b"}}', "no split"),
        (
            '{"classes": {"0": "void", "1": "b"}, "suggested_split": {"train": [1], "test": [2]}}',
            "1",
        ),
        ('{"classes": ["a", "b"]}', "not understood"),
        ("{", "not understood"),
    ],
)
def test_a_set_that_cannot_be_used_says_why(data: Path, meta: str, says: str) -> None:
    (data / "stripes" / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=says):
        open_set(data / "stripes")


def test_masks_with_unknown_ids_and_missing_files_are_named(data: Path) -> None:
    found = open_set(data / "stripes")
    Image.fromarray(np.full((48, 48), 77, np.uint8)).save(data / "stripes" / "masks" / "s0.png")
    with pytest.raises(InputError, match="77"):
        read_sample(found, "s0")
    with pytest.raises(InputError, match="'s9'"):
        read_sample(found, "s9")
    with pytest.raises(InputError, match="images/"):
        open_set(data)
    with pytest.raises(InputError, match="no image sets"):
        find_sets(data / "absent")
