"""One object from clicks or a box, by SAM's own prompt encoder and mask decoder, both frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.backbones import Backbone
from napari_convlora.images.normalise import Normalizer, to_rgb
from napari_convlora.images.planes import check_contrast
from napari_convlora.images.resample import resize
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.prediction.prompts import Prompt, Window

_SIZES = 5
"""Boxes that are tried around a click by a model that knows boxes only."""

_HALF_SIDES = (-1.6, -0.5)
"""Exponents of ten: half a side of the smallest and the largest, in sides of the model's input."""

_AGAIN = 2
"""Masks that are asked for again."""


class Prompter:
    """A frozen SAM that answers prompts.

    Parameters
    ----------
    backbone
        Its weights are shared, not copied, and never changed.
    device
        Where to compute.
    cache
        Where embeddings of windows are kept; the next prompt in one needs no encoder.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.backbone = backbone.sharing_copy().to(self.device)
        self.cache = cache if cache is not None else FeatureCache()
        self.tile = backbone.spec.image_size

    @torch.inference_mode()
    def mask(self, pixels: np.ndarray, window: Window, prompt: Prompt) -> np.ndarray:
        """Return the prompted object as a mask (H, W) of the window.

        A model that was trained on clicks is asked as it was trained. One that knows boxes only
        (LiteMedSAM) answers a click by the best of several boxes around it; then positive clicks
        add what they find to the object, and negative ones take it away.

        Parameters
        ----------
        pixels : (H, W, C)
            Of the window; any numeric dtype.
        window
            Where it lies in the plane.
        prompt
            In pixels of the plane; all of it inside the window.

        Raises
        ------
        InputError
            The pixels are all the same, or not all finite.
        """
        key, embedding = self._embed(pixels)
        scale = self.tile / max(window.height, window.width)
        box = None
        if prompt.box is not None:
            corners = (prompt.box.top, prompt.box.left), (prompt.box.bottom, prompt.box.right)
            box = torch.tensor([[x for at in corners for x in _xy(*at, window, scale)]])
        clicks = [_xy(click.row, click.column, window, scale) for click in prompt.clicks]
        signs = [click.positive for click in prompt.clicks]
        if self.backbone.spec.clicks or not clicks:
            logits = self._asked_at_once(embedding, clicks, signs, box)
        else:
            logits = self._asked_by_boxes(key, embedding, clicks, signs, box)
        inner = self._inner(pixels.shape)
        square = resize(logits[None].float(), self.tile)[:, : inner[0], : inner[1]]
        mask: np.ndarray = (resize(square, pixels.shape[:2])[0] > 0).cpu().numpy()
        return mask

    def _embed(self, pixels: np.ndarray) -> tuple[Hashable, Tensor]:
        """Return the embedding (1, C, h, w) of a window, and the key by which it was looked up.

        The longer side fills the model's input; what is left of the square is empty, as SAM was
        trained. Contrast is stretched in the window as it is in a plane.
        """
        pixels = np.ascontiguousarray(pixels)
        check_contrast(pixels[None], "What lies around the prompt")
        digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
        spec = self.backbone.spec
        key = (spec.name, self.backbone.checkpoint_sha256, "prompt", pixels.shape, digest)
        embedding = self.cache.get(key)
        if embedding is None:
            rgb = np.ascontiguousarray(to_rgb(Normalizer.fit([pixels[None]])(pixels)))
            image = resize(torch.from_numpy(rgb).movedim(-1, 0), self._inner(pixels.shape))
            mean, std = (torch.tensor(v)[:, None, None] for v in (spec.pixel_mean, spec.pixel_std))
            image = (image - mean) / std
            beyond = (0, self.tile - image.shape[-1], 0, self.tile - image.shape[-2])
            embedding = self.backbone(F.pad(image, beyond)[None].to(self.device))
            self.cache.put(key, embedding)
        return key, embedding.to(self.device)

    def _inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of a window (H, W, ...) in the model's input."""
        height, width = (max(1, round(n * self.tile / max(shape[:2]))) for n in shape[:2])
        return height, width

    def _decode(
        self,
        embedding: Tensor,
        points: Any = None,
        boxes: Tensor | None = None,
        several: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits (N, M, h, w) and the quality (N, M) that SAM expects of them."""
        model: Any = self.backbone
        image_pe, _ = model.no_prompt(tuple(embedding.shape[-2:]))
        boxes = None if boxes is None else boxes.to(self.device)
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=None)
        logits, quality = model.mask_decoder(
            image_embeddings=embedding,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        return logits, quality

    def _asked_at_once(
        self, embedding: Tensor, clicks: list, signs: list[bool], box: Tensor | None
    ) -> Tensor:
        points = None
        if clicks:
            places = torch.tensor([clicks], dtype=torch.float32, device=self.device)
            points = places, torch.tensor([signs], dtype=torch.float32, device=self.device)
        # A single click may mean a part or the whole: then SAM offers several masks.
        single = box is None and len(clicks) == 1
        logits, quality = self._decode(embedding, points, box, several=single)
        return logits[0, int(quality[0].argmax())]

    def _asked_by_boxes(
        self,
        key: Hashable,
        embedding: Tensor,
        clicks: list[tuple[float, float]],
        signs: list[bool],
        box: Tensor | None,
    ) -> Tensor:
        """Join the masks of box and positive clicks, without those of negative ones."""
        total = torch.full((1, 1), -1.0, device=self.device)
        if box is not None:
            total = self._decode(embedding, boxes=box)[0][0, 0]
        for click, sign in zip(clicks, signs, strict=True):
            if bool(_at(total, click, self.tile) > 0) == sign:
                continue  # it is as the click says
            logits, quality = self._around(key, embedding, click)
            fits = sum(
                ((_at(logits, place, self.tile) > 0) == (other == sign)).int()
                for place, other in zip(clicks, signs, strict=True)
            )
            best = logits[int((fits + quality).argmax())]  # quality is at most about 1
            total = torch.maximum(total, best) if sign else torch.minimum(total, -best)
        return total

    def _around(
        self, key: Hashable, embedding: Tensor, click: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, h, w) of masks at a click and the quality (N,) to expect of them.

        Boxes of several sizes are asked for; the best masks are asked for again by the boxes
        around them, and those that stay the same are worth most.
        """
        keys = (key, click, "logits"), (key, click, "quality")
        logits, quality = map(self.cache.get, keys)
        if logits is None or quality is None:
            half = torch.logspace(*_HALF_SIDES, steps=_SIZES)[:, None] * self.tile
            centre = torch.tensor([click])
            boxes = torch.cat([centre - half, centre + half], 1).clamp(0, self.tile - 1)
            first, hopes = (x[:, 0] for x in self._decode(embedding, boxes=boxes))
            best = hopes.topk(_AGAIN).indices.tolist()
            boxes = torch.stack([_box_around(first[i], boxes[i], self.tile) for i in best])
            logits, quality = (x[:, 0] for x in self._decode(embedding, boxes=boxes))
            one, other = logits > 0, first[best] > 0
            quality = quality * (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)
            for name, value in zip(keys, (logits, quality), strict=True):
                self.cache.put(name, value)
        return logits.to(self.device), quality.to(self.device)


def _xy(row: float, column: float, window: Window, scale: float) -> tuple[float, float]:
    """Return a place in the model's input; SAM's prompt encoder adds the half pixel itself."""
    return (column - window.left + 0.5) * scale - 0.5, (row - window.top + 0.5) * scale - 0.5


def _at(logits: Tensor, place: tuple[float, float], tile: int) -> Tensor:
    """Return the values of (..., h, w) logits at a place in the model's input."""
    x, y = (int((v + 0.5) * n / tile) for v, n in zip(place, logits.shape[:-3:-1], strict=True))
    return logits[..., min(y, logits.shape[-2] - 1), min(x, logits.shape[-1] - 1)]


def _box_around(logits: Tensor, box: Tensor, tile: int) -> Tensor:
    """Return the box around a mask (h, w) in the model's input; `box` if there is no mask."""
    rows, columns = (logits > 0).nonzero(as_tuple=True)
    if not len(rows):
        return box
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return torch.stack(edges).cpu() * (tile / logits.shape[-1])
