from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder
from napari_convlora.peft.sam_adapter import high_pass


def wave(frequency: int, height: int, width: int) -> torch.Tensor:
    x = torch.arange(width) * (2 * torch.pi * frequency / width)
    return torch.cos(x).expand(1, 3, height, width)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(4, 40), width=st.integers(4, 40), level=st.floats(-2, 2))
def test_high_pass_ignores_brightness_and_is_never_negative(
    height: int, width: int, level: float
) -> None:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = high_pass(images)
    assert found.shape == images.shape
    assert found.min() >= 0
    torch.testing.assert_close(high_pass(images + level), found, atol=1e-4, rtol=1e-4)


def test_high_pass_keeps_fine_waves_and_removes_coarse_ones() -> None:
    # a quarter of a 32 x 32 spectrum is a square of 16 frequencies: -8..7
    for frequency in range(17):
        image = wave(frequency, 32, 32)
        found = high_pass(image)
        if frequency < 8:
            assert found.abs().max() < 1e-5
        elif frequency > 8:
            torch.testing.assert_close(found, image.abs(), atol=1e-5, rtol=1e-5)


def test_high_pass_treats_images_and_channels_alone() -> None:
    images = torch.randn(3, 3, 16, 24)
    alone = torch.stack([high_pass(c[None, None])[0, 0] for i in images for c in i])
    torch.testing.assert_close(high_pass(images).flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@torch.no_grad()
def test_hints_are_added_to_the_input_of_each_adapted_block(kind: str) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    side = backbone.spec.image_size
    images, inputs = torch.rand(1, 3, side, side), []
    for block in backbone.encoder.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    backbone(images)
    frozen = inputs.copy()
    inputs.clear()
    encoder = adapt_encoder("sam_adapter", backbone.encoder, 1, MethodConfig())
    for layer in encoder.up.values():
        layer.bias.fill_(1.0)  # with weights of zero, every hint is one
    encoder(images)
    assert torch.equal(inputs[0], frozen[0])
    torch.testing.assert_close(inputs[1], frozen[1] + 1)
    assert not torch.allclose(inputs[2], frozen[2])


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@torch.no_grad()
def test_hints_see_what_the_filter_leaves_of_the_image(kind: str) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    side = backbone.spec.image_size
    torch.manual_seed(0)  # whichever tests came before
    encoder = adapt_encoder("sam_adapter", backbone.encoder, 0, MethodConfig())
    for layer in encoder.up.values():
        layer.weight.normal_()
    encoder.token_hint.weight.zero_()  # only the filtered image is left
    smooth, fine = wave(1, side, side), wave(side // 2, side, side)

    def effect(images: torch.Tensor) -> torch.Tensor:
        changed = encoder(images)
        kernel = encoder.image_hint.weight.clone()
        encoder.image_hint.weight.zero_()
        without = encoder(images)
        encoder.image_hint.weight.copy_(kernel)
        return (changed - without).abs().max()

    assert effect(smooth) < 1e-4
    assert effect(fine) > 1e-3
