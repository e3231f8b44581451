"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): train the biases, nothing else.

The biases are those of the encoder's linear layers, convolutions and normalisations, the neck's
included. Tables of relative positions are no biases in this sense.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, adapted_modules


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Replace every bias from `first_block` to the neck by a trained copy."""
    for part in [*adapted_modules(encoder, first_block), encoder.layout.neck]:
        for module in part.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                # a copy: other models share the frozen one
                module.bias = nn.Parameter(bias.detach().clone())
    return encoder


def _merge(encoder: nn.Module) -> None:
    """Do nothing: trained biases already are the layers' own."""


METHODS["bitfit"] = Method("BitFit", _inject, stem="adapted", merge=_merge)
