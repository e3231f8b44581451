"""Parameter-efficient fine-tuning methods, one module each, behind one small registry.

A method is a function that changes an encoder's blocks in place. Whatever it adds has
``requires_grad=True``; everything else stays frozen, so "what is trained" needs no second list.
"""

from __future__ import annotations

from napari_convlora.peft import conv_lora, decoder_only, lora
from napari_convlora.peft.registry import METHODS, Method, adapt_blocks, balance_loss

__all__ = [
    "METHODS",
    "Method",
    "adapt_blocks",
    "balance_loss",
    "conv_lora",
    "decoder_only",
    "lora",
]
