from __future__ import annotations

import pytest
import torch
from torch import nn

from napari_convlora.backbones.sam import build_vit
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ConvLoRAError, MethodConfig
from napari_convlora.peft import METHODS, adapt_blocks, balance_loss
from napari_convlora.peft.lora import LoRALinear

PAPER = MethodConfig(rank=3, alpha=32, scales=tuple(range(1, 9)))


def trained(module: nn.Module) -> dict[str, int]:
    return {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}


def test_untrained_layer_is_the_frozen_one() -> None:
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=4)
    x = torch.randn(3, 4, 4, 5)
    assert torch.equal(layer(x), layer.base(x))


def test_update_is_the_scaled_product_of_both_matrices() -> None:
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=6)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5)
    expected = x @ (layer.base.weight + 3 * layer.lora_B @ layer.lora_A).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


def test_only_the_update_is_trained() -> None:
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    layer(torch.randn(3, 5)).sum().backward()
    assert set(trained(layer)) == {"lora_A", "lora_B"}
    assert layer.base.weight.grad is None
    assert layer.lora_A.grad is not None


def test_rank_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(5, 7), rank=0, alpha=1)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_method_leaves_an_untrained_encoder_unchanged(kind: str, method: str) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    images = torch.rand(1, 3, backbone.spec.image_size, backbone.spec.image_size)
    with torch.no_grad():
        expected = backbone(images)
        adapt_blocks(method, backbone.encoder.blocks[2:], MethodConfig())
        assert torch.equal(backbone.eval()(images), expected)
    assert bool(trained(backbone)) == METHODS[method].adapts_encoder
    assert balance_loss(backbone) == 0.0


def test_method_touches_only_the_blocks_it_is_given() -> None:
    backbone = random_backbone("vit")
    adapt_blocks("lora", backbone.encoder.blocks[3:], MethodConfig())
    assert all("blocks.3." in name for name in trained(backbone))
    assert trained(backbone)


@pytest.mark.parametrize(
    ("size", "lora", "extra"),
    [("vit_b", 110_592, 8_640), ("vit_l", 294_912, 17_280), ("vit_h", 491_520, 23_040)],
)
def test_trainable_parameters_are_the_papers(size: str, lora: int, extra: int) -> None:
    counts = {}
    for method in ("decoder_only", "lora", "conv_lora"):
        with torch.device("meta"):
            encoder = build_vit(size).encoder.requires_grad_(False)  # type: ignore[arg-type]
            adapt_blocks(method, encoder.blocks, PAPER)
        counts[method] = sum(trained(encoder).values())
    assert counts == {"decoder_only": 0, "lora": lora, "conv_lora": lora + extra}


def test_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ConvLoRAError, match=r"'magic'.*conv_lora"):
        adapt_blocks("magic", [], MethodConfig())
