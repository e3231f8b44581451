from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder
from napari_convlora.peft.adapter import Adapted


def test_untrained_bottleneck_changes_nothing() -> None:
    layer = Adapted(nn.Linear(5, 5), 5, 2)
    x = torch.randn(3, 4, 4, 5)
    assert torch.equal(layer(x), layer.base(x))


def test_bottleneck_acts_on_what_the_frozen_module_returns() -> None:
    layer = Adapted(nn.Linear(5, 5), 5, 2)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    x = torch.randn(3, 5)
    y = layer.base(x)
    hidden = F.gelu(y @ layer.down.weight.T + layer.down.bias)
    torch.testing.assert_close(layer(x), y + hidden @ layer.up.weight.T + layer.up.bias)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@pytest.mark.parametrize("bottleneck", [1, 5])
def test_every_block_gets_two_of_the_asked_width(kind: str, bottleneck: int) -> None:
    encoder = random_backbone(kind).encoder.requires_grad_(False)  # type: ignore[arg-type]
    dims = [block.attn.proj.out_features for block in encoder.blocks]  # type: ignore[union-attr]
    adapt_encoder("adapter", encoder, 1, MethodConfig(bottleneck=bottleneck))
    found = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert found == sum(2 * (2 * d * bottleneck + bottleneck + d) for d in dims[1:])  # type: ignore[operator]
