"""Multi-scale fusion, the Conv-LoRA paper's control without a gate: all experts add up."""

from __future__ import annotations

from typing import Any

from napari_convlora.config import MethodConfig
from napari_convlora.peft.conv_lora import ExpertLinear
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Replace every block's ``attn.qkv`` by an `ExpertLinear` with all of ``config.scales``."""
    for block in encoder.blocks[first_block:]:
        block.attn.qkv = ExpertLinear(block.attn.qkv, config.rank, config.alpha, config.scales)
    return encoder


METHODS["multi_scale"] = Method("Multi-scale", _inject)
