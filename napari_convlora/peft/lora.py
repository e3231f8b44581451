"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) on the fused qkv projection."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, replace


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update, ``W0 x + alpha / r * B A x``.

    ``B`` starts at zero, so an untrained layer returns exactly what `base` returns.

    Parameters
    ----------
    base
        The frozen layer, d inputs and k outputs.
    rank, alpha
        Low-rank dimension r, and the numerator of the scaling.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def mix(self, z: Tensor) -> Tensor:
        """Transform the low-rank map `z` (N, H, W, r); the identity for plain LoRA."""
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., d) to (..., k)."""
        z = self.mix(F.linear(x, self.lora_A))
        return torch.add(self.base(x), F.linear(z, self.lora_B), alpha=self.scaling)


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Replace every block's ``attn.qkv`` by a `LoRALinear` around it."""
    for block in encoder.blocks[first_block:]:
        block.attn.qkv = LoRALinear(block.attn.qkv, config.rank, config.alpha)
    return encoder


@torch.no_grad()
def _merged(layer: LoRALinear) -> nn.Linear:
    plain: nn.Linear = copy.deepcopy(layer.base)
    plain.weight += layer.scaling * layer.lora_B @ layer.lora_A
    return plain


def _merge(encoder: nn.Module) -> None:
    """Replace every `LoRALinear` by a plain linear layer."""
    replace(encoder, lambda m: type(m) is LoRALinear, _merged)


METHODS["lora"] = Method("LoRA", _inject, merge=_merge)
