from __future__ import annotations

import pytest
import torch
from torch import nn

from napari_convlora.backbones import Backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder
from napari_convlora.peft.lst import LadderSide


@pytest.fixture(params=["vit", "tiny"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


def ladder(backbone: Backbone, first_block: int = 0, reduction: int = 4) -> LadderSide:
    encoder = adapt_encoder("lst", backbone.encoder, first_block, MethodConfig(reduction=reduction))
    nn.init.normal_(encoder.up.weight)
    return encoder


def images_for(backbone: Backbone) -> torch.Tensor:
    return torch.rand(2, 3, backbone.spec.image_size, backbone.spec.image_size)


def test_no_gradient_enters_the_frozen_blocks(backbone: Backbone) -> None:
    encoder = ladder(backbone).train()
    seen = []
    for block in backbone.encoder.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    images = images_for(backbone).requires_grad_()
    # even if the features and the frozen weights wanted one
    backbone.encoder.requires_grad_(True)
    encoder(images).square().mean().backward()
    assert seen == [False] * 4
    assert images.grad is None
    grads = [p.grad for block in backbone.encoder.blocks for p in block.parameters()]
    assert all(grad is None for grad in grads)
    assert all(p.grad is not None for p in encoder.sides.parameters())


def test_the_frozen_output_is_the_base_the_side_network_adds_to(backbone: Backbone) -> None:
    encoder, images = ladder(backbone), images_for(backbone)
    with torch.no_grad():
        assert not torch.allclose(encoder(images), backbone.encoder(images), atol=1e-3)
        encoder.up.weight.zero_()
        assert torch.equal(encoder(images), backbone.encoder(images))


def test_gates_start_in_the_middle_and_choose_between_ladder_and_rung(backbone: Backbone) -> None:
    encoder, images = ladder(backbone), images_for(backbone)
    assert torch.equal((encoder.gates / 0.1).sigmoid(), torch.full((4,), 0.5))
    with torch.no_grad():
        encoder.gates.fill_(-100)  # rungs only: what came before the last block is forgotten
        expected = encoder(images)
        encoder.enter.weight.normal_()
        for down in encoder.downs[:-1]:
            down.weight.normal_()  # type: ignore[operator, union-attr]
        torch.testing.assert_close(encoder(images), expected)
        encoder.gates.fill_(100)  # ladder only: rungs have no effect
        expected = encoder(images)
        for down in encoder.downs:
            down.weight.normal_()  # type: ignore[operator, union-attr]
        torch.testing.assert_close(encoder(images), expected)
        encoder.enter.weight.normal_()
        assert not torch.allclose(encoder(images), expected, atol=1e-3)


@pytest.mark.parametrize("reduction", [1, 4, 1000])
def test_the_side_network_is_narrower_by_the_asked_factor(
    backbone: Backbone, reduction: int
) -> None:
    wide = [block.attn.proj.out_features for block in backbone.encoder.blocks]  # type: ignore[union-attr]
    encoder = ladder(backbone, 1, reduction)
    narrow = [side.attn.proj.out_features for side in encoder.sides]  # type: ignore[union-attr]
    # both test backbones have two heads, and a head is one channel wide at least
    assert narrow == [max(2, dim // reduction) for dim in wide[1:]]  # type: ignore[operator]
    assert encoder(images_for(backbone)).isfinite().all()
