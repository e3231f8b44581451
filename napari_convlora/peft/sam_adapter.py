"""SAM-Adapter (Chen et al., ICCV workshops 2023, arXiv 2304.09148): hints from the image itself.

Every token gets a hint, the sum of a projection of its patch's embedding and of its patch in the
high-pass filtered image. A small layer of its own turns it, for each block, into what is added to
the block's input; the last layer is shared and starts at zero, so training starts at the frozen
encoder (the published one starts at random).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, pool_tokens, width

_REDUCTION = 32
"""How many times narrower than the encoder hints are."""

_LOW_SHARE = 0.25
"""Share of the spectrum, around frequency zero, that the high-pass filter takes out."""


def high_pass(images: Tensor) -> Tensor:
    """Absolute values of `images` without their low frequencies.

    Parameters
    ----------
    images
        (B, C, H, W), float.

    Returns
    -------
    Tensor
        (B, C, H, W), at least 0.
    """
    height, width = images.shape[-2:]
    half = int(math.sqrt(height * width * _LOW_SHARE) // 2)
    rows, columns = (
        torch.fft.fftfreq(n, 1 / n, device=images.device).round() for n in (height, width)
    )
    low = [(index >= -half) & (index < half) for index in (rows, columns)]
    spectrum = torch.fft.fft2(images.float())
    spectrum = spectrum.masked_fill(low[0][:, None] & low[1], 0)
    return torch.fft.ifft2(spectrum).real.abs()


class SAMAdapter(nn.Module):
    """A frozen encoder whose blocks ``first_block`` and later get hints from the image.

    Parameters
    ----------
    encoder
        The frozen `backbones.Encoder`.
    first_block
        First block that gets a hint.
    """

    def __init__(self, encoder: AdaptableEncoder, first_block: int) -> None:
        super().__init__()
        self.encoder, self.first_block = encoder, first_block
        dims = [width(block) for block in encoder.blocks]
        hidden = max(1, max(dims) // _REDUCTION)
        self.token_hint = nn.Linear(dims[0], hidden)
        self.image_hint = nn.Conv2d(3, hidden, encoder.stem_stride, encoder.stem_stride)
        dims = dims[first_block:]
        self.tune = nn.ModuleList(nn.Linear(hidden, hidden) for _ in dims)
        # shared by all blocks of a width, which are all blocks of a plain ViT
        self.up = nn.ModuleDict({str(dim): nn.Linear(hidden, dim) for dim in sorted(set(dims))})
        for layer in self.up.values():
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images as (B, C, H / stride, W / stride)."""
        encoder, axis = self.encoder, self.encoder.channel_axis
        patches = encoder.stem(images)
        image_hint = self.image_hint(high_pass(images)).movedim(1, -1)
        hint = self.token_hint(patches.movedim(axis, -1)) + image_hint
        x: Tensor = encoder.add_position(patches)
        adapted = list(encoder.blocks[self.first_block :])
        for step in encoder.layout.steps:
            if step in adapted:
                own = self.tune[adapted.index(step)](pool_tokens(hint, x.movedim(axis, -1)))
                x = x + self.up[str(x.shape[axis])](F.gelu(own)).movedim(-1, axis)
            x = encoder.run_step(step, x)
        embedding: Tensor = encoder.embed(x)
        return embedding


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> SAMAdapter:
    """Give hints to the blocks from `first_block` on."""
    return SAMAdapter(encoder, first_block)


METHODS["sam_adapter"] = Method("SAM-Adapter", _inject, stem="read")
