from __future__ import annotations

import pytest
import torch

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@pytest.mark.parametrize("first_block", [0, 2])
def test_biases_from_the_first_block_to_the_neck_are_trained(kind: str, first_block: int) -> None:
    encoder = random_backbone(kind).encoder  # type: ignore[arg-type]
    before = {id(p) for block in encoder.blocks[:first_block] for p in block.parameters()}
    kept = {name for name, p in encoder.named_parameters() if id(p) in before}
    adapt_encoder("bitfit", encoder, first_block, MethodConfig())
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert all(name.endswith(".bias") for name in trained)
    left = {n for n, _ in encoder.named_parameters() if n.endswith(".bias")} - trained
    assert bool(left) == bool(first_block)
    assert not trained & kept
    assert any("neck" in name for name in trained)
    assert any("patch_embed" in name for name in trained) == (first_block == 0)


def test_the_shared_biases_are_copied_before_they_are_trained() -> None:
    encoder = random_backbone("vit").encoder
    shared = encoder.blocks[0].attn.qkv.bias  # type: ignore[union-attr]
    value = shared.clone()  # type: ignore[operator]
    adapt_encoder("bitfit", encoder, 0, MethodConfig())
    ours = encoder.blocks[0].attn.qkv.bias  # type: ignore[union-attr]
    assert torch.equal(ours, value)  # type: ignore[arg-type]
    with torch.no_grad():
        ours.add_(1)  # type: ignore[operator]
    assert torch.equal(shared, value)  # type: ignore[arg-type]
