"""Blocks come out as if the whole plane had been scored at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from napari_convlora.backbones import Backbone
from napari_convlora.errors import InputError
from napari_convlora.events import Progress
from napari_convlora.images.normalise import to_rgb
from napari_convlora.images.planes import lazy_planes
from napari_convlora.images.regions import BLOCK, plan_blocks
from napari_convlora.images.resample import crop, resize
from napari_convlora.images.tiles import blend_window, tile_starts
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.detail_branch import DetailBranch, mix, region_features
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.prediction.predict import ready_scorer
from napari_convlora.prediction.region_scorer import BlockLogits, Scorer
from tests.conftest import make_scene

# Without shrinking, which would take minutes.
slow = settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))


@torch.no_grad()
def whole_plane(scorer: Scorer, plane: np.ndarray) -> np.ndarray:
    """Logits (K, H, W) the plain way: every tile enlarged and added to a sum."""
    model, side = scorer.model, scorer.side
    height, width = plane.shape[:2]
    total = np.zeros((model.detail.n_classes, height, width))
    context = np.zeros((model.detail.n_context, height, width))
    weight = np.zeros((height, width))
    window = blend_window(side, slice(None), slice(None))
    for top in tile_starts(height, side, 0.25):
        for left in tile_starts(width, side, 0.25):
            square = to_rgb(scorer.normalizer(crop(plane, top, left, side)))
            rgb = torch.from_numpy(np.ascontiguousarray(square)).movedim(-1, 0)
            pixels = resize(rgb, model.backbone.spec.image_size)[None]
            logits = resize(model(pixels)[0], side).numpy()
            frozen = model.frozen((pixels - model.image_mean) / model.image_std)
            seen = interpolate(frozen, (side, side), mode="bilinear")[0].numpy()
            y0, y1, x0, x1 = (
                max(top, 0),
                min(top + side, height),
                max(left, 0),
                min(left + side, width),
            )
            part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
            total[:, y0:y1, x0:x1] += logits[:, *part] * window[part]
            context[:, y0:y1, x0:x1] += seen[:, *part] * window[part]
            weight[y0:y1, x0:x1] += window[part]
    filters = np.concatenate(
        [  # 512 px at a time, as blocks are
            np.concatenate(
                [
                    region_features(
                        plane, scorer.normalizer, slice(y, y + BLOCK), slice(x, x + BLOCK)
                    )
                    for x in range(0, width, BLOCK)
                ],
                axis=1,
            )
            for y in range(0, height, BLOCK)
        ]
    )
    features = np.concatenate([filters, (context / weight).transpose(1, 2, 0)], axis=-1)
    own = model.detail(torch.from_numpy(features.astype(np.float32))).movedim(-1, 0)
    mean = torch.from_numpy((total / weight).astype(np.float32))
    return mix(mean, own, float(model.detail.share)).numpy()


def shake(detail: DetailBranch, seed: int) -> None:
    """Let the branch read every input, and count as much as the head."""
    generator = torch.Generator().manual_seed(seed)
    detail.first.weight.data = torch.randn(detail.first.weight.shape, generator=generator) / 8
    detail.mean.normal_(generator=generator)
    detail.share.fill_(0.5)


def assemble(scorer: Scorer, blocks: list) -> np.ndarray:
    """Logits (K, H, W) of the first plane from blocks in any order."""
    total = np.empty(0)
    for step in scorer.score(blocks):
        if isinstance(step, BlockLogits):
            if not total.size:
                total = np.full((len(step.logits), *scorer.image.shape[1:3]), np.nan, np.float32)
            total[:, step.block.rows, step.block.columns] = step.logits
    return total


@slow
@given(
    size=st.tuples(st.integers(2, 600), st.integers(2, 600)),
    scale=st.sampled_from([0.25, 0.6, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_whole_plane_in_any_order(
    adapter: Adapter, backbone: Backbone, size: tuple[int, int], scale: float, seed: int
) -> None:
    scene = make_scene(*(max(n, 3) for n in size), seed=seed)[0].image[:, : size[0], : size[1]]
    if scale == 3.0:
        scene = scene[:, :150, :150]  # many small tiles
    scorer = ready_scorer(replace(adapter, pixel_scale=scale), backbone, scene, device="cpu")
    shake(scorer.model.detail, seed)
    blocks = plan_blocks(scene.shape)
    logits = assemble(scorer, blocks)
    # The head's output is enlarged in one step rather than two, so tiles differ a little.
    np.testing.assert_allclose(logits, whole_plane(scorer, scene[0]), atol=0.05)
    # Bit for bit, each by itself: backwards, with nothing kept, and read lazily.
    for block in reversed(blocks):
        fresh = replace(scorer, image=lazy_planes(scene), tiles=FeatureCache(0))
        *_, last = fresh.score([block])
        assert np.array_equal(last.logits, logits[:, block.rows, block.columns])


def test_tiles_that_blocks_share_are_computed_once(adapter: Adapter, backbone: Backbone) -> None:
    image = make_scene(1100, 530)[0].image
    scorer = ready_scorer(replace(adapter, pixel_scale=0.25), backbone, image, device="cpu")
    progress = [s for s in scorer.score(plan_blocks(image.shape)) if isinstance(s, Progress)]
    tiles = len(tile_starts(1100, 256, 0.25)) * len(tile_starts(530, 256, 0.25))
    assert [p.done for p in progress] == list(range(1, tiles + 1))
    assert progress[-1].total == tiles
    assert scorer.tiles.nbytes == len(scorer.tiles) == 0  # and forgotten when all is done


def test_a_worker_keeps_the_tiles_that_its_next_block_shares(
    adapter: Adapter, backbone: Backbone
) -> None:
    image = make_scene(530, 1100)[0].image
    scorer = ready_scorer(replace(adapter, pixel_scale=0.25), backbone, image, device="cpu")
    first, second, *_ = plan_blocks(image.shape)
    list(scorer.score([first], keep_tiles=True))
    computed = [s for s in scorer.score([second], keep_tiles=True) if isinstance(s, Progress)]
    shared = set(scorer.corners(first)) & set(scorer.corners(second))
    assert len(computed) == len(scorer.corners(second)) - len(shared)
    assert shared


def test_only_windows_of_a_lazy_image_are_read(adapter: Adapter, backbone: Backbone) -> None:
    class Source:
        shape, dtype = (4096, 4096), np.dtype(np.float32)
        largest = 0

        def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
            size = [len(range(*k.indices(4096))) for k in key]
            self.largest = max(self.largest, size[0] * size[1])
            return np.random.default_rng(0).random(size, np.float32)

    source = Source()
    scorer = ready_scorer(replace(adapter, pixel_scale=0.25), backbone, lazy_planes(source))
    list(scorer.score(plan_blocks(scorer.image.shape)[9:11]))
    assert 0 < source.largest <= (512 + 2 * 48) ** 2


def test_a_nan_in_a_lazy_image_is_named(adapter: Adapter, backbone: Backbone) -> None:
    image = np.random.default_rng(0).random((600, 600))
    image[550, 20] = np.nan
    scorer = ready_scorer(adapter, backbone, lazy_planes(image), device="cpu")
    with pytest.raises(InputError, match=r"has 1 NaN or infinite values"):
        list(scorer.score(plan_blocks((1, 600, 600))))
