"""Deep visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119): learnt tokens per block.

The paper puts tokens before those of the image in every block and drops what becomes of them
after it. What remains of that is that image tokens also attend to the prompts. SAM attends within
windows and by relative position, so every window sees the prompts, and they have no position.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, width

_PATCH_VALUES = 3 * 16**2
"""Values in a patch, which the published initialisation depends on."""


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Give every block's attention ``config.prompts`` tokens of its own."""
    blocks = encoder.blocks
    for i in range(first_block, len(blocks)):
        dim = width(blocks[i])
        prompts = nn.Parameter(blocks[i].attn.proj.weight.new_empty(config.prompts, dim))
        bound = math.sqrt(6 / (_PATCH_VALUES + dim))
        nn.init.uniform_(prompts, -bound, bound)
        encoder.add_prompts(i, prompts)
    return encoder


METHODS["vpt"] = Method("VPT", _inject)
