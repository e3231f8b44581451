"""Bottleneck adapters (Houlsby et al., ICML 2019, arXiv 1902.00751).

Each block gets two, on what attention and perceptron return, before it is added to their input.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, width


class Adapted(nn.Module):
    """A frozen module followed by a trained bottleneck, ``y + Up(GELU(Down y))``.

    ``Up`` starts at zero, so an untrained one returns exactly what `base` returns.

    Parameters
    ----------
    base
        The frozen module, returning maps (..., C).
    dim, bottleneck
        C, and the width of the bottleneck.
    """

    def __init__(self, base: nn.Module, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to the same shape."""
        y: Tensor = self.base(x)
        return y + self.up(F.gelu(self.down(y)))


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Put a bottleneck behind the attention and the perceptron of every block."""
    for block in encoder.blocks[first_block:]:
        dim = width(block)
        block.attn = Adapted(block.attn, dim, config.bottleneck)
        block.mlp = Adapted(block.mlp, dim, config.bottleneck)
    return encoder


METHODS["adapter"] = Method("Adapter", _inject)
