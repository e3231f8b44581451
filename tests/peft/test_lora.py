from __future__ import annotations

import pytest
import torch
from torch import nn

from napari_convlora.peft import merge
from napari_convlora.peft.lora import LoRALinear


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


@pytest.mark.parametrize("scaling", [0.0, 3.0])
def test_merged_layer_is_plain_and_leaves_the_frozen_one_alone(scaling: float) -> None:
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=2 * scaling)
    nn.init.normal_(layer.lora_B)
    frozen = layer.base.weight.clone()
    x = torch.randn(3, 4, 4, 5)
    model = nn.Sequential(layer)
    expected = model(x)
    merge("lora", model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(layer.base.weight, frozen)
