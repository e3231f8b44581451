"""One object from clicks or a box, by SAM's own prompt encoder and mask decoder, both frozen."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_convlora.backbones import Backbone
from napari_convlora.data import FeatureCache, Normalizer, resize, to_rgb
from napari_convlora.prompts import Prompt, Window


class Prompter:
    """A frozen SAM that answers prompts.

    Parameters
    ----------
    backbone
        Its weights are shared, not copied, and never changed.
    device
        Where to compute.
    cache
        Where the embeddings of windows are kept; the next prompt in one takes no encoder.
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
    def embed(self, pixels: np.ndarray) -> Tensor:
        """Return the embedding (1, C, h, w) of a window, looked up by content.

        The longer side fills the model's input; what is left of the square is empty, as SAM was
        trained. Contrast is stretched in the window as it is in a plane.

        Parameters
        ----------
        pixels : (H, W, C)
            Any numeric dtype.
        """
        pixels = np.ascontiguousarray(pixels)
        digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
        spec = self.backbone.spec
        key = (spec.name, self.backbone.checkpoint_sha256, "prompt", pixels.shape, digest)
        embedding = self.cache.get(key)
        if embedding is None:
            rgb = np.ascontiguousarray(to_rgb(Normalizer.fit([pixels[None]])(pixels)))
            image = resize(torch.from_numpy(rgb).movedim(-1, 0), self._inner(pixels.shape))
            mean, std = (torch.tensor(v)[:, None, None] for v in (spec.pixel_mean, spec.pixel_std))
            image = self._pad((image - mean) / std)
            embedding = self.backbone(image[None].to(self.device))
            self.cache.put(key, embedding)
        return embedding.to(self.device)

    @torch.inference_mode()
    def mask(self, pixels: np.ndarray, window: Window, prompt: Prompt) -> np.ndarray:
        """Return the prompted object as a mask (H, W) of the window.

        Parameters
        ----------
        pixels : (H, W, C)
            Of the window.
        window
            Where it lies in the plane.
        prompt
            In pixels of the plane; all of it inside the window.
        """
        model: Any = self.backbone
        embedding = self.embed(pixels)
        size = tuple(embedding.shape[-2:])
        image_pe, _ = model.no_prompt(size)
        sparse, dense = model.prompt_encoder(
            points=self._points(prompt, window), boxes=self._box(prompt, window), masks=None
        )
        # A single click may mean a part or the whole: then the best of several masks is taken.
        logits, quality = model.mask_decoder(
            image_embeddings=embedding,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=prompt.box is None and len(prompt.clicks) == 1,
        )
        best = logits[:, int(quality[0].argmax())]
        inner = self._inner(pixels.shape)
        square = resize(best.float(), self.tile)[:, : inner[0], : inner[1]]
        mask: np.ndarray = (resize(square, pixels.shape[:2])[0] > 0).cpu().numpy()
        return mask

    def _inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of a window (H, W, ...) in the model's input."""
        height, width = shape[:2]
        return tuple(max(1, round(n * self.tile / max(height, width))) for n in (height, width))  # type: ignore[return-value]

    def _pad(self, image: Tensor) -> Tensor:
        return F.pad(image, (0, self.tile - image.shape[-1], 0, self.tile - image.shape[-2]))

    def _points(self, prompt: Prompt, window: Window) -> tuple[Tensor, Tensor] | None:
        if not prompt.clicks:
            return None
        at = [self._at(click.row, click.column, window) for click in prompt.clicks]
        signs = [int(click.positive) for click in prompt.clicks]
        return self._tensor([at]), self._tensor([signs])

    def _box(self, prompt: Prompt, window: Window) -> Tensor | None:
        box = prompt.box
        if box is None:
            return None
        corners = (box.top, box.left), (box.bottom, box.right)
        return self._tensor([[x for corner in corners for x in self._at(*corner, window)]])

    def _at(self, row: float, column: float, window: Window) -> tuple[float, float]:
        """Return x and y in the model's input, whose encoder adds half a pixel itself."""
        scale = self.tile / max(window.height, window.width)
        x, y = (column - window.left + 0.5) * scale, (row - window.top + 0.5) * scale
        return x - 0.5, y - 0.5

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)
