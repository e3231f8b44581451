"""Prompts on tiny random backbones, and what they are worth on real weights."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.measure import label, regionprops

import napari_convlora
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.errors import InputError
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.prediction.prompter import Prompter
from napari_convlora.prediction.prompts import Box, Click, Prompt, choose_window

SAMPLES = Path(napari_convlora.__file__).parent / "widget" / "samples"
CLICK = Prompt((Click(3, 4), Click(5, 1, positive=False)))
BOX = Prompt(box=Box(1, 1, 6, 7))


@pytest.fixture(scope="module", params=["tiny", "vit"])
def prompter(request):
    """The tiny one knows boxes only, as LiteMedSAM, the other one clicks as well."""
    prompter = Prompter(random_backbone(request.param))
    assert prompter.backbone.spec.clicks == (request.param == "vit")
    return prompter


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(8, 90), st.integers(8, 90), st.integers(1, 5)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    prompt=st.sampled_from([CLICK, BOX, replace(CLICK, box=BOX.box)]),
)
def test_a_mask_has_the_shape_of_its_window(prompter, shape, dtype, prompt):
    pixels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    window = choose_window(shape[:2], prompt.bounds, prompter.tile)
    mask = prompter.mask(pixels, window, prompt)
    assert mask.shape == shape[:2]
    assert mask.dtype == bool


def test_the_encoder_runs_once_per_window(monkeypatch):
    prompter = Prompter(random_backbone())
    pixels = np.random.default_rng(0).random((40, 50, 1))
    window = choose_window((40, 50), BOX.bounds, prompter.tile)
    calls = []
    forward = type(prompter.backbone).forward
    monkeypatch.setattr(
        type(prompter.backbone), "forward", lambda *a: calls.append(1) or forward(*a)
    )
    for prompt in (BOX, CLICK, BOX):
        prompter.mask(pixels, window, prompt)
    assert len(calls) == 1
    prompter.mask(pixels + np.eye(40, 50)[..., None], window, BOX)  # other pixels, same place
    assert len(calls) == 2


def test_without_room_in_the_cache_answers_are_the_same():
    pixels = np.random.default_rng(0).random((40, 50, 1))
    masks = []
    for size in (2**30, 0):
        prompter = Prompter(random_backbone(), cache=FeatureCache(size))
        window = choose_window((40, 50), CLICK.bounds, prompter.tile)
        masks += [prompter.mask(pixels, window, CLICK) for _ in range(2)]
    assert all((mask == masks[0]).all() for mask in masks)


def test_pixels_in_which_nothing_can_be_found_are_refused(prompter):
    window = choose_window((20, 20), BOX.bounds, prompter.tile)
    for pixels in (np.zeros((20, 20, 1)), np.full((20, 20, 3), np.nan)):
        with pytest.raises(InputError, match="around the prompt"):
            prompter.mask(pixels, window, BOX)


@pytest.fixture(scope="module")
def nuclei(litemedsam):
    """A prompter, an image, and the six largest nuclei or clusters of them."""
    image, truth = (np.array(Image.open(SAMPLES / f"nuclei{end}.png")) for end in ("", "_truth"))
    regions = label(truth == 2)
    largest = sorted(regionprops(regions), key=lambda region: -region.area)[:6]
    return Prompter(litemedsam), image, [regions == region.label for region in largest]


def find(nuclei, prompt):
    prompter, image, _ = nuclei
    window = choose_window(image.shape[:2], prompt.bounds, prompter.tile)
    mask = np.zeros(image.shape[:2], bool)
    mask[window.region] = prompter.mask(image[window.region], window, prompt)
    return mask


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def around(mask):
    rows, columns = np.nonzero(mask)
    return Box(rows.min() - 0.5, columns.min() - 0.5, rows.max() + 0.5, columns.max() + 0.5)


def test_boxes_find_objects(nuclei):
    found = [iou(find(nuclei, Prompt(box=around(mask))), mask) for mask in nuclei[2]]
    assert np.mean(found) > 0.65
    shifted = [iou(find(nuclei, Prompt(box=around(np.roll(m, 60, 1)))), m) for m in nuclei[2]]
    assert np.mean(shifted) < 0.4


def test_a_negative_click_takes_away_and_a_positive_one_adds(nuclei):
    one, other = nuclei[2][:2]
    box = around(one)
    first = find(nuclei, Prompt(box=box))
    at = Click(*map(float, np.argwhere(other)[len(np.argwhere(other)) // 2]))
    more = find(nuclei, Prompt((at,), box))
    assert more[round(at.row), round(at.column)]
    assert (more & first).sum() == first.sum()
    inner = np.argwhere(first)[first.sum() // 2]
    away = Click(float(inner[0]), float(inner[1]), positive=False)
    assert not find(nuclei, Prompt((away,), box))[tuple(inner)]


def test_a_later_prompt_is_answered_within_a_second(nuclei):
    masks = nuclei[2]
    find(nuclei, Prompt(box=around(masks[0])))
    start = time.perf_counter()
    find(nuclei, Prompt(box=around(masks[1])))
    assert time.perf_counter() - start < 1
