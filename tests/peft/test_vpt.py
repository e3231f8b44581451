from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from napari_convlora.backbones import Backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder


@pytest.fixture(params=["vit", "tiny"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


def plain_bias(attn: Any, q: Tensor, h: int, w: int) -> Tensor:
    """Position bias of a window, (heads, h * w, h * w), with loops."""
    heads = len(q)
    bias = torch.zeros(heads, h * w, h * w)
    for i in range(h * w):
        for j in range(h * w):
            dy, dx = i // w - j // w, i % w - j % w
            if hasattr(attn, "attention_biases"):
                bias[:, i, j] = attn.attention_biases[:, abs(dy) * attn.window + abs(dx)]
            else:
                rows = (len(attn.rel_pos_h) - 1) // 2 + dy, (len(attn.rel_pos_w) - 1) // 2 + dx
                bias[:, i, j] = q[:, i] @ (attn.rel_pos_h[rows[0]] + attn.rel_pos_w[rows[1]])
    return bias


@torch.no_grad()
def test_prompts_are_keys_without_position_that_ask_nothing(backbone: Backbone) -> None:
    encoder = backbone.encoder
    block: Any = encoder.blocks[0]
    attn = block.attn
    adapt_encoder("vpt", encoder, 0, MethodConfig(prompts=3))
    prompted, tiny = block.attn, hasattr(attn, "attention_biases")
    prompts = nn.init.normal_(prompted.prompts)
    side, heads, norm = (
        (block.window, attn.heads, attn.norm)
        if tiny
        else (attn.window, attn.num_heads, block.norm1)
    )
    dim = prompts.shape[1]
    x = torch.randn(2, side, side, dim)
    # SAM's blocks normalise before their attention, TinyViT's attention does it itself
    tokens = (norm(x) if tiny else x).flatten(1, 2)
    tokens = torch.cat([tokens, norm(prompts).expand(2, -1, -1)], dim=1)
    qkv = attn.qkv(tokens)
    expected = []
    for window in qkv:
        if tiny:  # q, k and v lie side by side within each head
            q, k, v = window.reshape(-1, heads, 3, dim // heads).permute(2, 1, 0, 3)
        else:
            q, k, v = window.reshape(-1, 3, heads, dim // heads).permute(1, 2, 0, 3)
        q = q[:, : side**2]
        scores = q @ k.transpose(1, 2) / (dim // heads) ** 0.5
        scores[..., : side**2] += plain_bias(attn, q, side, side)
        out = scores.softmax(-1) @ v
        expected.append(attn.proj(out.transpose(0, 1).reshape(side, side, dim)))
    torch.testing.assert_close(prompted(x), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_each_block_has_prompts_of_its_own_within_the_published_bound(backbone: Backbone) -> None:
    encoder = adapt_encoder("vpt", backbone.encoder, 1, MethodConfig(prompts=50))
    prompts = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert len(prompts) == 3
    assert all(name.endswith(".prompts") for name in prompts)
    for value in prompts.values():
        bound = (6 / (3 * 16**2 + value.shape[1])) ** 0.5
        assert 0.9 * bound < value.abs().max() <= bound
