"""Tiny backbones of the real classes with random weights: for tests and dry runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from napari_convlora.backbones.base import Backbone
from napari_convlora.backbones.registry import REGISTRY
from napari_convlora.backbones.sam import ViTSize, build_vit
from napari_convlora.backbones.tiny_vit import TinyViTSize, build_tiny_vit

VIT = ViTSize(
    embed_dim=32,
    depth=4,
    heads=2,
    global_blocks=(1, 3),
    image_size=128,
    window=4,
    out_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=64,
    mask_in_chans=4,
)
TINY = TinyViTSize(
    patch_stride=1,
    image_size=64,
    dims=(8, 16, 16, 32),
    depths=(1, 1, 2, 1),
    heads=(1, 2, 2, 2),
    windows=(4, 4, 6, 4),
    out_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=64,
    mask_in_chans=4,
)


def random_backbone(kind: Literal["vit", "tiny"] = "tiny", seed: int = 0) -> Backbone:
    """Build a backbone that runs in milliseconds.

    Parameters
    ----------
    kind
        ``vit``: 4 blocks, 128 px, 16 px per token; ``tiny``: 4 attention blocks, 64 px, 4 px per
        token. Both embed into 32 channels, not 256.
    seed
        Of the weights; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "vit":
            parts = build_vit(VIT)
            spec = replace(REGISTRY["vit_b"], image_size=VIT.image_size)
        else:
            parts = build_tiny_vit(TINY)
            spec = replace(REGISTRY["litemedsam"], image_size=TINY.image_size)
        for part in parts:
            _fill(part)
    spec = replace(
        spec,
        name=f"random_{kind}",
        title="Random weights",
        url=None,
        file_name="",
        sha256=None,
        size_bytes=None,
        licence="",
        fast_first_block=2,
        note="Random weights for tests.",
    )
    return Backbone(spec, parts)


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Give values to what starts at zero, so that every parameter matters to the output."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            assert child.running_mean is not None
            assert child.running_var is not None
            child.running_mean.normal_(std=0.1)
            child.running_var.uniform_(0.5, 1.5)
