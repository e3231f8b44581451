from __future__ import annotations

import pytest
import torch
from torch import nn

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder
from napari_convlora.peft.conv_lora import ConvLoRALinear, ExpertLinear
from tests.peft.test_conv_lora import literal_expert

SCALES = (1, 2, 3, 5)


def make_layer(scales: tuple[int, ...] = SCALES) -> ExpertLinear:
    layer = ExpertLinear(nn.Linear(6, 9), 3, 6, scales)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.expert_bias)
    return layer


def test_every_scale_adds_its_answer_to_the_low_rank_map() -> None:
    layer = make_layer()
    x = torch.randn(2, 7, 8, 6)
    z = (x @ layer.lora_A.T).permute(0, 3, 1, 2)
    total = z.clone()
    for weight, bias, scale in zip(layer.expert_weight, layer.expert_bias, SCALES, strict=True):
        total = total + literal_expert(z, weight, bias, scale)
    expected = layer.base(x) + 2 * total.permute(0, 2, 3, 1) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_without_a_gate_nothing_is_drawn_at_random() -> None:
    layer, x = make_layer().train(), torch.randn(3, 5, 5, 6)
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_conv_lora_with_every_expert_at_full_weight_is_multi_scale_fusion() -> None:
    config = MethodConfig(rank=3, alpha=6, scales=SCALES, top_k=4, faithful=True)
    gated, layer = ConvLoRALinear(nn.Linear(6, 9), config), make_layer()
    gated.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 5, 5, 6)
    torch.testing.assert_close(gated.eval()(x), layer(x))


@pytest.mark.parametrize(("method", "scales"), [("multi_scale", (1, 3, 4)), ("fixed_scale", (5,))])
def test_settings_choose_the_experts(method: str, scales: tuple[int, ...]) -> None:
    encoder = random_backbone("vit").encoder
    adapt_encoder(method, encoder, 2, MethodConfig(scales=(1, 3, 4), scale=5, rank=2))
    for i, block in enumerate(encoder.blocks):
        qkv = block.attn.qkv
        assert type(qkv) is (ExpertLinear if i >= 2 else nn.Linear)
        if isinstance(qkv, ExpertLinear):
            assert qkv.scales == scales
            assert qkv.expert_weight.shape == (len(scales), 2, 2, 3, 3)
