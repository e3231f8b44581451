"""Conv-LoRA (Zhong et al., ICLR 2024, arXiv 2401.17868): LoRA with a mixture of convolutions.

Between LoRA's two projections, experts convolve the low-rank token map. The expert of scale s
enlarges the map s times, convolves it with a 3x3 kernel, applies GELU and shrinks it back; a gate
on the pooled map chooses which experts act (section 3.2 of the paper).

No enlarged map is formed. Shrinking reads one sub-pixel of a token per axis if s is odd and four if
it is even, so only those are computed. What the 3x3 kernel reads around them is a fixed linear
function of the tokens, and separable: with W the kernel and X a map, the sub-pixels are the sum
over the nine taps (u, v) of ``W[u, v] C_u X C_v'``, and the result is ``S gelu(...) S'``. The small
matrices C and S come from the definition itself, so borders are exact too. Each map is multiplied
with those of the experts chosen for it, which are gathered without waiting for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.lora import LoRALinear
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method

_NOISE_FLOOR = 1e-2
_BALANCE_WEIGHT = 1e-2


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training as well
def axis_operators(
    scales: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Enlarge-and-read and shrink along an axis of `size` tokens, as matrices.

    Returns
    -------
    tuple of Tensor
        ``C`` (E, P * size, 3 * size): what the three taps of a kernel read around each of the P
        sub-pixels of a token (1 if all scales are odd, else 4), zero beyond the enlarged map.
        ``S`` (E, size, P * size): tokens from their sub-pixels.
    """
    n_phases = 4 if any(scale % 2 == 0 for scale in scales) else 1
    margin, token = 3, torch.arange(size)
    read, shrink = [], []
    for scale in scales:
        tokens, pixels = (torch.eye(n, dtype=torch.float64) for n in (size, scale * size))
        enlarged = F.interpolate(tokens[None, None], (scale * size, size), mode="bicubic")[0, 0]
        shrunk = F.interpolate(pixels[None, None], (size, scale * size), mode="bicubic")[0, 0]
        enlarged = F.pad(enlarged, (0, 0, margin, margin))
        shrunk = F.pad(shrunk, (margin, margin))
        phase = torch.arange(n_phases)[:, None] + (scale - n_phases) // 2 + margin
        at = scale * token + phase
        read.append(enlarged[at[:, :, None] + torch.arange(-1, 2)].flatten(2).flatten(0, 1))
        shrink.append(shrunk[token, at])
    return torch.stack(read).to(device, dtype), torch.stack(shrink).to(device, dtype)


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of `values` (E,): 0 when all experts are used alike."""
    if len(values) == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)


class ExpertLinear(LoRALinear):
    """A frozen linear layer plus a LoRA update whose low-rank map experts add to, without a gate.

    Parameters
    ----------
    base
        The frozen layer, d inputs and k outputs.
    rank, alpha
        As for `LoRALinear`.
    scales
        One expert for each, all at least 1.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, scales: Sequence[int]) -> None:
        super().__init__(base, rank, alpha)
        self.scales, n_experts = tuple(scales), len(scales)
        self.expert_weight = nn.Parameter(base.weight.new_empty(n_experts, rank, rank, 3, 3))
        self.expert_bias = nn.Parameter(base.weight.new_zeros(n_experts, rank))
        for kernel in self.expert_weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def answers(self, z: Tensor, chosen: Tensor) -> Tensor:
        """Answers of chosen experts to the low-rank maps.

        Parameters
        ----------
        z
            Low-rank maps (N, r, H, W).
        chosen
            Indices (N, k), int64, of the experts that act on each map.

        Returns
        -------
        Tensor
            (N, k, r, H, W).
        """
        z, picked = z.repeat_interleave(chosen.shape[1], 0), chosen.flatten()
        n, r, height, width = z.shape
        weight = self.expert_weight.index_select(0, picked)
        bias = self.expert_bias.index_select(0, picked)
        (read_rows, shrink_rows), (read_columns, shrink_columns) = (
            [
                matrix.index_select(0, picked)
                for matrix in axis_operators(self.scales, size, weight.device, weight.dtype)
            ]
            for size in (height, width)
        )
        # Letters: i, o channels; h, x tokens before, g, w after; p, q their sub-pixels; u, v taps.
        side = shrink_columns.shape[1] * width  # q w
        taps = read_columns.unflatten(2, (3, width)).permute(0, 3, 2, 1)  # x v (q w)
        out = z.reshape(n, r * height, width) @ taps.flatten(2)  # (i h) (v q w)
        out = out.view(n, r, height, 3, side).transpose(2, 3).reshape(n, 3 * r, height * side)
        kernel = weight.permute(0, 3, 1, 2, 4).reshape(n, 3 * r, 3 * r)  # (u o) (i v)
        out = (kernel @ out).view(n, 3, r, height, side)
        out = out.transpose(2, 3).reshape(n, 3 * height, r * side)  # (u h) (o q w)
        out = torch.baddbmm(bias.repeat_interleave(side, 1)[:, None], read_rows, out)
        out = F.gelu(out).view(n, -1, height, r, side) * shrink_rows[:, :, :, None, None]
        out = out.sum(1) * shrink_columns.flatten(1)[:, None, None]
        out = out.view(*chosen.shape, height, r, -1, width).sum(-2)
        return out.transpose(2, 3)

    def combine(self, z: Tensor) -> Tensor:
        """Put the experts' answers to the low-rank maps `z` (N, r, H, W) together: their sum."""
        every = torch.arange(len(self.scales), device=z.device).expand(len(z), -1)
        return self.answers(z, every).sum(1)

    def mix(self, z: Tensor) -> Tensor:
        """Add the experts' answers to the low-rank map `z` (N, H, W, r)."""
        if z.ndim != 4:
            raise ValueError(f"Experts need token maps (N, H, W, C), got shape {tuple(z.shape)}")
        maps = z.permute(0, 3, 1, 2)
        return (maps + self.combine(maps)).permute(0, 2, 3, 1)


class ConvLoRALinear(ExpertLinear):
    """A frozen linear layer plus a Conv-LoRA update on a token map.

    Training leaves the routing loss in `balance_loss` (a scalar tensor); in eval mode it is None
    and the gate adds no noise.

    Parameters
    ----------
    base
        The frozen layer, d inputs and k outputs.
    config
        Rank, alpha, scales, experts per map, and whether to reproduce the released layer.
        There, the chosen expert acts with weight exactly 1, so the task's gradient never reaches
        the gate and only the balance loss trains it. By default the gate is trained by the task
        as well: a softmax over the chosen experts, or straight-through when only one is chosen.
    """

    def __init__(self, base: nn.Linear, config: MethodConfig) -> None:
        super().__init__(base, config.rank, config.alpha, config.scales)
        self.top_k, self.faithful = config.top_k, config.faithful
        shape = config.rank, len(config.scales)
        self.gate = nn.Parameter(base.weight.new_zeros(shape))
        self.gate_noise = nn.Parameter(base.weight.new_zeros(shape))
        self.balance_loss: Tensor | None = None

    def train(self, mode: bool = True) -> ConvLoRALinear:
        """Set the mode, and forget the routing loss of the last pass with its graph."""
        super().train(mode)
        self.balance_loss = None
        return self

    def route(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for each map; leaves the balance loss as a side effect.

        Parameters
        ----------
        z
            Low-rank maps (N, r, H, W).

        Returns
        -------
        tuple of Tensor
            Indices (N, k) of the chosen experts, and the weights (N, k) of their answers.
        """
        pooled = z.mean((2, 3))
        clean = pooled @ self.gate
        noise = F.softplus(pooled @ self.gate_noise) + _NOISE_FLOOR
        logits = clean + torch.randn_like(clean) * noise if self.training else clean
        values, chosen = logits.topk(self.top_k, dim=1)
        weights = values.softmax(1)
        self.balance_loss = None
        if self.training:
            shares = torch.zeros_like(logits).scatter(1, chosen, weights)
            self.balance_loss = self._balance(shares, clean, noise, logits)
        if self.faithful:
            return chosen, torch.ones_like(weights)
        if self.top_k == 1:
            # Value 1, gradient of log softmax: the gate learns which expert the task wants.
            share = logits.softmax(1).gather(1, chosen)
            return chosen, share / share.detach()
        return chosen, weights

    def _balance(self, shares: Tensor, clean: Tensor, noise: Tensor, logits: Tensor) -> Tensor:
        """Return importance plus load loss of top-k gating (Shazeer et al., 2017, appendix A)."""
        importance = squared_variation(shares.sum(0))
        n_experts = logits.shape[1]
        if self.top_k == n_experts:
            return _BALANCE_WEIGHT * importance
        ranked = logits.topk(self.top_k + 1, dim=1).values
        inside = logits > ranked[:, -1:]
        threshold = torch.where(inside, ranked[:, -1:], ranked[:, -2:-1])
        load = torch.special.ndtr((clean - threshold) / noise).sum(0)
        return _BALANCE_WEIGHT * (importance + squared_variation(load))

    def combine(self, z: Tensor) -> Tensor:
        """Weigh the answers of the chosen experts to `z` (N, r, H, W) by the gate."""
        chosen, weights = self.route(z)
        return (self.answers(z, chosen) * weights[:, :, None, None, None]).sum(1)


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Replace every block's ``attn.qkv`` by a `ConvLoRALinear` around it."""
    for block in encoder.blocks[first_block:]:
        block.attn.qkv = ConvLoRALinear(block.attn.qkv, config)
    return encoder


METHODS["conv_lora"] = Method("Conv-LoRA", _inject)
