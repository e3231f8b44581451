"""State of one round: data, model, cached features and running scores."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_convlora import __version__
from napari_convlora.backbones import Backbone
from napari_convlora.config import ClassInfo, ModelConfig, TrainConfig
from napari_convlora.control import RunControl
from napari_convlora.devices import choose_device
from napari_convlora.errors import AdapterError
from napari_convlora.images.normalise import Normalizer
from napari_convlora.images.resample import auto_pixel_scale
from napari_convlora.images.tiles import Tile, corners, tile_pixels
from napari_convlora.labels.annotations import LabelledImage, check_annotations, check_images
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.detail_branch import DetailBranch
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.training.dataset import TrainingSet, training_set
from napari_convlora.training.detail_samples import detail_block, view_detail
from napari_convlora.training.losses import class_weights
from napari_convlora.training.memory_plan import MemoryPlan
from napari_convlora.training.processes import ALONE, Team
from napari_convlora.training.views import View, view_image, view_pool

_DETAIL_BYTES = 1024**3
"""Detail logits kept, beyond which those of large images are computed again."""

_ALIKE = 0.05
"""Contrast and scale that differ by no more than this part are the same to the detail branch."""

_PREVIEW_REST = 6.0
"""After a preview, train at least this many times as long as it took."""


def _mirrored(index: int) -> float:
    """Return the van der Corput sequence: the binary digits of `index` after the point."""
    return int(f"{index:032b}"[::-1], 2) / 2**32


def _spread(n_places: int, n_planes: int) -> deque[tuple[int, int]]:
    """Return image and plane of what is seen edge-on, so ordered that any few are spread evenly."""
    # Of a large image, every part is a plane.
    planes = [(i, 0) for i in range(n_places)] or [(0, p) for p in range(n_planes)]
    return deque(planes[i] for i in sorted(range(len(planes)), key=_mirrored))


def _scales(
    images: Sequence[LabelledImage], start: Adapter | None, tile: int
) -> tuple[Normalizer, float]:
    """Return how values and sizes of images are brought to the model's."""
    if start is not None:
        return start.normalizer, start.pixel_scale
    shapes = [image.image.shape[1:3] for image in images]
    return Normalizer.fit([image.image for image in images]), auto_pixel_scale(shapes, tile)


class RoundState:
    """State of one round: data, model, optimiser and running scores."""

    def __init__(
        self,
        backbone: Backbone,
        images: Sequence[LabelledImage],
        classes: Sequence[ClassInfo],
        model_config: ModelConfig,
        config: TrainConfig,
        control: RunControl,
        cache: FeatureCache,
        start: Adapter | None = None,
        team: Team = ALONE,
        before: Adapter | None = None,
    ) -> None:
        self.team = team
        self.control, self.cache, self.config = control, cache, config
        self.backbone = backbone  # without the method, which `model` puts into a copy
        check_images(images)
        self.pixels = check_annotations(images, classes)
        self.classes = tuple(c for c in classes if self.pixels[c.id])
        self.ids = np.array([c.id for c in self.classes], np.uint8)
        self.device = choose_device(config.device)
        self.tile = backbone.spec.image_size
        self.normalizer, self.pixel_scale = _scales(images, start, self.tile)
        self.side = max(1, round(self.tile / self.pixel_scale))
        self.set_annotations(images)
        self.warm = start is not None
        if self.warm:  # its encoder is no longer the one whose embeddings are cached
            self.config = replace(config, decoder_share=0.0)
        self.model = self._build(model_config, start)
        self.before = None if before is None else self._detail_of(before)
        self.views = view_pool(self.data, self.side, config.views, config.seed)
        self.details, self.blind = FeatureCache(_DETAIL_BYTES), list[DetailBranch]()
        self.plan = MemoryPlan(self.device, config.batch, config.decoder_batch)
        self.peak_memory = 0
        self.tiles_per_plane, self.seconds_per_tile = 0, 0.0  # of the last preview
        self.start = time.monotonic()
        self._in_turn = _spread(len(control.places), len(images[0].image))

    def _build(self, model_config: ModelConfig, start: Adapter | None) -> SemanticSAM:
        """Return a new model, or the one to go on from."""
        spec, n_channels = self.backbone.spec, len(self.normalizer.low)
        first = model_config.first_block
        if first is None:
            first = 0 if self.config.preset == "full" else spec.fast_first_block
        model_config = replace(model_config, first_block=first)
        if start is not None:
            _check_start(start, model_config, self.classes, self.data.images[0].image.shape[3])
            return start.build(self.backbone, self.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            model = SemanticSAM(self.backbone, model_config, len(self.classes), n_channels)
            return model.to(self.device)

    def _detail_of(self, adapter: Adapter) -> DetailBranch | None:
        """Return an adapter's detail branch; None if it was fitted to something else."""
        own, new = adapter.normalizer, self.normalizer
        detail = self.model.detail
        if (
            detail is None
            or adapter.backbone_sha256 != self.model.backbone.checkpoint_sha256
            # None: as the checkpoint says, which is what this round does.
            or adapter.pixel_mean not in (None, self.model.backbone.spec.pixel_mean)
            or adapter.pixel_std not in (None, self.model.backbone.spec.pixel_std)
            # An id may have been given away and taken again; a name tells.
            or [(c.id, c.name) for c in adapter.classes] != [(c.id, c.name) for c in self.classes]
            or len(own.low) != len(new.low)
            or not math.isclose(adapter.pixel_scale, self.pixel_scale, rel_tol=_ALIKE)
        ):
            return None
        ends = np.array([own.low, own.high]) - np.array([new.low, new.high])
        if (abs(ends) > _ALIKE * np.subtract(new.high, new.low)).any():
            return None
        branch, prefix = copy.deepcopy(detail).eval(), "detail."
        state = {n[len(prefix) :]: t for n, t in adapter.state.items() if n.startswith(prefix)}
        if {n: t.shape for n, t in state.items()} != {
            n: t.shape for n, t in branch.state_dict().items()
        }:
            return None
        branch.load_state_dict(state)
        return branch

    def set_annotations(self, images: Sequence[LabelledImage]) -> None:
        """Learn from these annotations of the images from now on."""
        self.data: TrainingSet = training_set(
            images, [c.id for c in self.classes], self.config.seed
        )
        self.weights = class_weights(self.data.counts()).to(self.device)
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)

    def move(self, device: torch.device) -> None:
        """Go on elsewhere."""
        self.device = device
        self.weights = self.weights.to(device)
        for module in (self.model, *self.blind, *filter(None, [self.before])):
            module.to(device)

    def elapsed(self) -> float:
        """Seconds the round has run, pauses not counted."""
        return time.monotonic() - self.start

    def next_preview(self, began: float) -> float:
        """When to show the next preview, so that previews take a small share of the time."""
        if self.config.preview_seconds is None:
            return math.inf
        now = time.monotonic()
        return now + max(self.config.preview_seconds, _PREVIEW_REST * (now - began))

    def visible(self) -> Iterator[tuple[int, int]]:
        """Image and plane that previews show; the first where there is no such plane.

        Planes that are seen edge-on come in turn, and go on where they were left.
        """
        image, plane = self.control.visible
        images = self.data.images
        if plane is None:
            for _ in range(len(self._in_turn)):
                self._in_turn.rotate(-1)
                yield self._in_turn[-1]
            return
        there = 0 <= image < len(images) and 0 <= plane < len(images[image].image)
        yield (image, plane) if there else (0, 0)

    def share(self, step: int, elapsed: float) -> float:
        """How much of the round is over, in [0, 1], by steps or by the seconds `elapsed`."""
        share = step / self.config.max_steps
        if self.config.max_minutes is not None:
            share = max(share, elapsed / (60 * self.config.max_minutes))
        return min(1.0, share)

    def features(self, view: View) -> Tensor:
        """Frozen features (without batch axis) of a view."""
        return self.model.cached_prefix(self._pixels(view), self.cache)

    def embedding(self, view: View) -> Tensor:
        """Embedding (without batch axis) of a view, before the encoder has trained."""
        return self.model.cached_embedding(self._pixels(view), self.cache, self.config.seed)

    def _pixels(self, view: View) -> Tensor:
        return view_image(self.data, view, self.normalizer, self.tile)

    def detail(self, view: View) -> Tensor:
        """Out-of-fold detail logits (K, tile, tile) of a view."""
        shape = self.data.target[view.image].shape[1:]
        return view_detail(view, shape, self.tile, self.detail_block).to(self.device)

    def detail_block(self, where: tuple[int, int, int, int]) -> np.ndarray:
        """Out-of-fold detail logits of a block, computed once for all views that show it."""
        logits = self.details.get(where)
        if logits is None:
            assert self.model.detail is not None
            block = detail_block(
                self.data, where, self.normalizer, self.model.detail, self.blind, self.context
            )
            logits = torch.from_numpy(block)
            self.details.put(where, logits)
        return logits.numpy()

    def context(self, image: int, plane: int, rows: slice, columns: slice) -> list[Tile]:
        """Frozen embeddings of the tiles around a region, for the detail branch."""
        pixels = self.data.images[image].image[plane]
        found = []
        for corner in corners(pixels.shape[:2], self.side, rows, columns):
            shown = tile_pixels(pixels, corner, self.side, self.tile, self.normalizer)
            context = self.model.cached_context(shown, self.cache).cpu()
            found.append(Tile(*corner, self.side, context))
        return found

    def renew_blind(self, detail: DetailBranch) -> None:
        """Make untrained branches like `detail`, to be blind to one fold each."""
        self.details = FeatureCache(_DETAIL_BYTES)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.blind = [
                DetailBranch(detail.n_channels, detail.n_context, detail.n_classes).to(self.device)
                for _ in range(self.data.n_folds)
            ]

    def adapter(
        self, steps: int, reason: str, score: float | None, compared: dict[str, Any]
    ) -> Adapter:
        """Return what was learnt so far; `compared` says how it does beside the installed one."""
        return Adapter(
            backbone_name=self.model.backbone.spec.name,
            backbone_sha256=self.model.backbone.checkpoint_sha256,
            pixel_mean=self.model.backbone.spec.pixel_mean,
            pixel_std=self.model.backbone.spec.pixel_std,
            model=self.model.config,
            classes=self.classes,
            normalizer=self.normalizer,
            pixel_scale=self.pixel_scale,
            state=self.model.adapter_state(),
            summary={
                "preset": self.config.preset,
                "steps": steps,
                "seconds": round(self.elapsed(), 1),
                "ended_by": reason,
                "score": score,
                "held_out": self.data.holds_out,
                "labelled_pixels": {str(k): v for k, v in self.pixels.items()},
                "seed": self.config.seed,
                "start": "installed" if self.warm else "base",
                "hint": self.before is not None,
                "peak_memory": self.peak_memory,
                "cache": {"memory": self.cache.nbytes, "disk": self.cache.disk_bytes},
                "threads": torch.get_num_threads(),
                "compared": compared,
            },
            version=__version__,
        )


def _check_start(
    start: Adapter, wanted: ModelConfig, classes: Sequence[ClassInfo], n_channels: int
) -> None:
    """Raise an `AdapterError` unless a round with these settings can go on from `start`."""
    if start.model != wanted:
        odd = "method or head settings"
    elif [c.id for c in start.classes] != [c.id for c in classes]:
        odd = "annotated classes"
    elif len(start.normalizer.low) != n_channels:
        odd = "image channels"
    else:
        return
    raise AdapterError(
        f"The installed adapter has other {odd} than this round would; fit from the base instead."
    )
