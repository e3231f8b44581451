"""SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823): scale and shift what every operation returns.

The operations are linear layers, layer normalisations and convolutions (with their batch
normalisation, where they have one) of the stem and the blocks. The neck is left alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import (
    METHODS,
    AdaptableEncoder,
    Method,
    adapted_modules,
    replace,
)

_SPREAD = 0.02
"""Deviation of the initial factors from one, and of the initial shifts from zero."""


def _weights(operation: Any) -> Any:
    """Return the module whose weight and bias come last in `operation`."""
    return getattr(operation, "bn", operation)


class ScaledShifted(nn.Module):
    """A frozen operation whose output y becomes ``gamma * y + beta``, channel by channel.

    gamma starts at N(1, 0.02) and beta at N(0, 0.02) as published, so it starts near the frozen
    operation, not at it. Over a whole encoder that adds up.

    Parameters
    ----------
    base
        The frozen operation.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        # linear layers and their normalisations have channels last, convolutions have them second
        self.axis = -1 if isinstance(base, (nn.Linear, nn.LayerNorm)) else 1
        bias = _weights(base).bias
        self.gamma = nn.Parameter(torch.empty_like(bias, requires_grad=True))
        self.beta = nn.Parameter(torch.empty_like(bias, requires_grad=True))
        nn.init.normal_(self.gamma, 1, _SPREAD)
        nn.init.normal_(self.beta, 0, _SPREAD)

    def forward(self, x: Tensor) -> Tensor:
        """Map what `base` takes to what it returns, scaled and shifted."""
        y: Tensor = self.base(x).movedim(self.axis, -1)
        return torch.addcmul(self.beta, self.gamma, y).movedim(-1, self.axis)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base operation with weights that scale and shift."""
        layer = copy.deepcopy(self.base)
        last = _weights(layer)
        rows = self.gamma.view(-1, *(1,) * (last.weight.ndim - 1))
        last.weight = nn.Parameter(rows * last.weight)
        last.bias = nn.Parameter(self.gamma * last.bias + self.beta)
        return layer


def _is_operation(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d)
    return isinstance(module, kinds) or isinstance(_weights(module), nn.BatchNorm2d)


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Put a `ScaledShifted` around every operation from `first_block` to the neck."""
    for part in adapted_modules(encoder, first_block):
        replace(part, _is_operation, ScaledShifted)
    return encoder


def _merge(encoder: nn.Module) -> None:
    """Replace every `ScaledShifted` by a plain operation."""
    replace(encoder, lambda m: isinstance(m, ScaledShifted), ScaledShifted.merged)


METHODS["ssf"] = Method("SSF", _inject, stem="adapted", merge=_merge)
