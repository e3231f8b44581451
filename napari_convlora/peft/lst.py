"""Ladder side-tuning (Sung et al., NeurIPS 2022, arXiv 2206.06522): a small network alongside.

The encoder runs as it is, and no gradient enters its blocks. A side network of narrow blocks climbs
along: ``y_i = Block_i(g_i y_{i-1} + (1 - g_i) Down_i h_i)`` with the encoder's block outputs h_i
and learnt gates ``g_i = sigmoid(a_i / 0.1)`` (section 3.2).

The published model widens y at the end and forgets h. Here the widened y is added to h and starts
at zero, as SAM's neck and decoder expect the map they were trained with. The side network starts
from random weights instead of pruned ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method, pool_tokens, width

_TEMPERATURE = 0.1


class LadderSide(nn.Module):
    """A frozen encoder with a trained side network along blocks ``first_block`` and later.

    Parameters
    ----------
    encoder
        The frozen `backbones.Encoder`.
    first_block
        Block at which the side network starts.
    reduction
        How many times narrower its heads are.
    """

    def __init__(self, encoder: AdaptableEncoder, first_block: int, reduction: int) -> None:
        super().__init__()
        self.encoder, self.first_block = encoder, first_block
        dims = [width(block) for block in encoder.blocks[first_block:]]
        indices = range(first_block, len(encoder.blocks))
        sides = [encoder.narrow_block(i, reduction) for i in indices]
        narrow = [width(side) for side in sides]
        self.sides = nn.ModuleList(sides)
        self.enter = nn.Linear(dims[0], narrow[0], bias=False)
        self.downs = nn.ModuleList(
            nn.Linear(dim, small, bias=False) for dim, small in zip(dims, narrow, strict=True)
        )
        # between the stages of a hierarchical encoder the side network changes its width as well
        self.moves = nn.ModuleList(
            nn.Linear(old, new, bias=False) if old != new else nn.Identity()
            for old, new in zip([narrow[0], *narrow], narrow, strict=False)
        )
        self.gates = nn.Parameter(torch.zeros(len(dims)))
        self.up = nn.Linear(narrow[-1], dims[-1], bias=False)
        nn.init.zeros_(self.up.weight)

    def prefix(self, images: Tensor, split: int) -> Tensor:
        """See `backbones.Encoder.prefix`."""
        features: Tensor = self.encoder.prefix(images, split)
        return features

    def suffix(self, features: Tensor, split: int) -> Tensor:
        """Run blocks and side network; `split` must be ``first_block``."""
        axis = self.encoder.channel_axis
        x = features.detach()
        y = self.enter(x.movedim(axis, -1))
        gates = (self.gates / _TEMPERATURE).sigmoid()
        rungs = zip(gates, self.downs, self.moves, self.sides, strict=True)
        blocks = self.encoder.blocks
        for step in self.encoder.suffix_steps(split):
            with torch.no_grad():
                x = step(x)
            if step in blocks:
                gate, down, move, side = next(rungs)
                h = x.movedim(axis, -1)
                y = gate * move(pool_tokens(y, h)) + (1 - gate) * down(h)
                y = self.encoder.run_step(side, y.movedim(-1, axis)).movedim(axis, -1)
        embedding: Tensor = self.encoder.embed(x + self.up(y).movedim(-1, axis))
        return embedding

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images as (B, C, H / stride, W / stride)."""
        return self.suffix(self.prefix(images, self.first_block), self.first_block)


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> LadderSide:
    """Put a side network along the blocks from `first_block` on."""
    return LadderSide(encoder, first_block, config.reduction)


METHODS["lst"] = Method("Ladder side-tuning", _inject)
