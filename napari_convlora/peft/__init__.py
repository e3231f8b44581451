"""Methods such as Conv-LoRA with its noisy gate, one module each; no loss, no loop.

A method is a function that changes an encoder. Whatever it adds has ``requires_grad=True``;
everything else stays frozen, so "what is trained" needs no second list.
"""

from __future__ import annotations

from napari_convlora.peft import (
    adapter,
    bitfit,
    conv_lora,
    decoder_only,
    fixed_scale,
    lora,
    lst,
    multi_scale,
    sam_adapter,
    ssf,
    vpt,
)
from napari_convlora.peft.registry import (
    METHODS,
    Method,
    adapt_encoder,
    balance_loss,
    find_method,
    merge,
)

__all__ = [
    "METHODS",
    "Method",
    "adapt_encoder",
    "adapter",
    "balance_loss",
    "bitfit",
    "conv_lora",
    "decoder_only",
    "find_method",
    "fixed_scale",
    "lora",
    "lst",
    "merge",
    "multi_scale",
    "sam_adapter",
    "ssf",
    "vpt",
]
