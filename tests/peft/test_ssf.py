from __future__ import annotations

import pytest
import torch
from torch import nn

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.backbones.tiny_vit_layers import ConvBN
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder
from napari_convlora.peft.ssf import ScaledShifted

OPERATIONS = {
    "linear": (lambda: nn.Linear(5, 7), (2, 4, 4, 5), -1),
    "norm": (lambda: nn.LayerNorm(5), (2, 4, 4, 5), -1),
    "conv": (lambda: nn.Conv2d(5, 7, 3), (2, 5, 6, 6), 1),
    "conv_bn": (lambda: ConvBN(5, 7, 3), (2, 5, 6, 6), 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_channels_are_scaled_and_shifted_and_that_can_be_merged(name: str) -> None:
    make, shape, axis = OPERATIONS[name]
    base = make()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    layer = ScaledShifted(base)
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    x = torch.randn(shape)
    expected = (layer.gamma * base(x).movedim(axis, -1) + layer.beta).movedim(-1, axis)
    torch.testing.assert_close(layer(x), expected)
    merged = layer.merged()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-4)
    for key, value in base.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_start_is_close_to_the_frozen_operation() -> None:
    torch.manual_seed(0)
    layer = ScaledShifted(nn.Linear(3, 20_000))
    for parameter, mean in ((layer.gamma, 1), (layer.beta, 0)):
        assert parameter.mean().item() == pytest.approx(mean, abs=1e-3)
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@pytest.mark.parametrize("first_block", [0, 2])
def test_the_neck_is_left_alone_and_the_stem_only_adapted_with_the_first_block(
    kind: str, first_block: int
) -> None:
    encoder = random_backbone(kind).encoder  # type: ignore[arg-type]
    adapt_encoder("ssf", encoder, first_block, MethodConfig())
    stem, _, neck = encoder.layout

    def wrapped(*modules: nn.Module) -> bool:
        return any(isinstance(m, ScaledShifted) for part in modules for m in part.modules())

    assert not wrapped(neck)
    assert all(wrapped(part) for part in stem) == (first_block == 0)
    assert [wrapped(b) for b in encoder.blocks] == [i >= first_block for i in range(4)]
