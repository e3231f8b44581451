"""TinyViT, the image encoder of MobileSAM and LiteMedSAM, for maps of any size.

The architecture is that of "TinyViT: Fast Pretraining Distillation for Small Vision Transformers"
(https://arxiv.org/abs/2207.10666) as MobileSAM (https://arxiv.org/abs/2306.14289) and LiteMedSAM
use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from napari_convlora.backbones.base import Encoder, Layout, SamParts
from napari_convlora.backbones.sam import build_decoder
from napari_convlora.backbones.tiny_vit_layers import (
    LayerNorm2d,
    MBConv,
    PatchEmbed,
    PatchMerging,
    Stage,
    TinyViTBlock,
)


@dataclass(frozen=True)
class TinyViTSize:
    """Sizes of a TinyViT encoder; the defaults are those of the published checkpoints.

    Parameters
    ----------
    patch_stride
        4: two 3 x 3 convolutions of stride 2 (MobileSAM); 1: two 1 x 1 (LiteMedSAM).
    image_size
        Side in pixels of the square it was pretrained on.
    dims, depths, heads, windows
        One value per stage; the first stage is convolutional and uses no heads and windows.
    out_dim
        Channels of the embedding and of the mask decoder.
    """

    patch_stride: Literal[1, 4]
    image_size: int
    dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    windows: tuple[int, int, int, int] = (7, 7, 14, 7)
    out_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    mask_in_chans: int = 16

    @property
    def stride(self) -> int:
        """Image pixels per embedding token."""
        return 4 * self.patch_stride  # two of the three mergings halve the map


TINY_SIZES: dict[str, TinyViTSize] = {
    "vit_t": TinyViTSize(patch_stride=4, image_size=1024),
    "litemedsam": TinyViTSize(patch_stride=1, image_size=256),
}


class TinyViT(Encoder):
    """TinyViT image encoder; see `Encoder` for what it promises."""

    channel_axis = 1

    def __init__(self, size: TinyViTSize) -> None:
        super().__init__()
        self.stride = size.stride
        self.stem_stride = 2 * size.patch_stride  # the first merging halves the map
        self.patch_embed = PatchEmbed(size.dims[0], size.patch_stride)
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(size.dims, size.depths, strict=True)):
            blocks: list[nn.Module] = [
                TinyViTBlock(dim, size.heads[i], size.windows[i]) if i else MBConv(dim)
                for _ in range(depth)
            ]
            # the last merging only widens: SAM wants a token per 16 px, not per 32
            merging = PatchMerging(dim, size.dims[i + 1], 2 if i < 2 else 1) if i < 3 else None
            self.layers.append(Stage(blocks, merging))
        self.neck = nn.Sequential(
            nn.Conv2d(size.dims[-1], size.out_dim, 1, bias=False),
            LayerNorm2d(size.out_dim),
            nn.Conv2d(size.out_dim, size.out_dim, 3, padding=1, bias=False),
            LayerNorm2d(size.out_dim),
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """Attention blocks of all stages in order."""
        return [step for step in self.layout.steps if isinstance(step, TinyViTBlock)]

    @property
    def layout(self) -> Layout:
        """The convolutional first stage is part of the stem; see `Encoder.layout`."""
        stages: list[Any] = list(self.layers)
        first, *others = ([*stage.blocks, stage.downsample] for stage in stages)
        steps = [step for stage in others for step in stage if step is not None]
        return Layout([self.patch_embed, *first], steps, self.neck)

    def stem(self, images: Tensor) -> Tensor:
        """Return the map before the first block, (B, C, h, w); see `Encoder.stem`."""
        return super().stem(images.contiguous(memory_format=torch.channels_last))

    def suffix(self, features: Tensor, split: int) -> Tensor:
        """Return the embedding; see `Encoder.suffix`."""
        return super().suffix(features.contiguous(memory_format=torch.channels_last), split)

    def add_prompts(self, index: int, prompts: nn.Parameter) -> None:
        """Give the block's attention further keys; see `Encoder.add_prompts`."""
        block: Any = self.blocks[index]
        block.attn.prompts = prompts

    def narrow_block(self, index: int, reduction: int) -> TinyViTBlock:
        """Return a narrower, new block; see `Encoder.narrow_block`."""
        block: Any = self.blocks[index]
        heads = block.attn.heads
        dim = heads * max(1, block.attn.qkv.in_features // heads // reduction)
        return TinyViTBlock(dim, heads, block.window)


def build_tiny_vit(size: Literal["vit_t", "litemedsam"] | TinyViTSize) -> SamParts:
    """Build a SAM with a TinyViT encoder and uninitialised (random) weights."""
    if isinstance(size, str):
        size = TINY_SIZES[size]
    prompt_encoder, mask_decoder = build_decoder(
        image_size=size.image_size,
        stride=size.stride,
        dim=size.out_dim,
        heads=size.decoder_heads,
        mlp_dim=size.decoder_mlp_dim,
        mask_in_chans=size.mask_in_chans,
    )
    return SamParts(TinyViT(size), prompt_encoder, mask_decoder)
