"""Conv-LoRA (Zhong et al., ICLR 2024, arXiv 2401.17868): LoRA with a mixture of convolutions.

Between LoRA's two projections, experts convolve the low-rank token map. The expert of scale s
enlarges the map s times, convolves it with a 3x3 kernel, applies GELU and shrinks it back; a gate
on the pooled map chooses which experts act (section 3.2 of the paper).

For odd s the enlarge-convolve-shrink chain is exactly one 5x5 convolution: shrinking samples the
centre sub-pixel, the 3x3 kernel reads sub-pixels at offsets -1/s, 0, 1/s around it, and bicubic
enlargement makes each of those a fixed combination of five tokens per axis. `collapse_kernels`
builds these kernels, so no enlarged map is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.lora import LoRALinear
from napari_convlora.peft.registry import METHODS, Method

_NOISE_FLOOR = 1e-2
_BALANCE_WEIGHT = 1e-2


def _cubic(distance: Tensor) -> Tensor:
    """Cubic convolution kernel with a = -0.75, the one `torch` uses for bicubic resizing."""
    a, t = -0.75, distance.abs()
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def sampling_taps(scale: int) -> Tensor:
    """Weights (3, 5) of five neighbouring tokens in the three sub-pixels a 3x3 kernel reads."""
    offsets = torch.arange(-1, 2, dtype=torch.float64)[:, None] / scale
    return _cubic(offsets - torch.arange(-2, 3, dtype=torch.float64)).float()


def collapse_kernels(weight: Tensor, taps: Tensor) -> Tensor:
    """3x3 kernels on enlarged maps as 5x5 kernels on the tokens.

    Parameters
    ----------
    weight
        Kernels (E, r, r, 3, 3).
    taps
        `sampling_taps` of each expert's scale, (E, 3, 5).

    Returns
    -------
    Tensor
        Kernels (E, r, r, 5, 5), linear in `weight`, so gradients pass through.
    """
    return torch.einsum("eoiuv,eus,evt->eoist", weight, taps, taps)


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

    taps: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, scales: Sequence[int]) -> None:
        super().__init__(base, rank, alpha)
        self.scales, n_experts = scales, len(scales)
        self.expert_weight = nn.Parameter(base.weight.new_empty(n_experts, rank, rank, 3, 3))
        self.expert_bias = nn.Parameter(base.weight.new_zeros(n_experts, rank))
        for kernel in self.expert_weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        # Scale 1 pads with zeros, odd scales repeat the border, even ones have no exact collapse
        # at the border: three groups, each one call.
        self._plain = [i for i, s in enumerate(scales) if s == 1]
        self._odd = [i for i, s in enumerate(scales) if s > 1 and s % 2]
        self._even = [i for i, s in enumerate(scales) if s % 2 == 0]
        taps = [sampling_taps(scales[i]) for i in self._odd]
        self.register_buffer(
            "taps", torch.stack(taps) if taps else torch.empty(0, 3, 5), persistent=False
        )

    def experts(self, z: Tensor) -> Tensor:
        """Every expert's answer to the low-rank map.

        Parameters
        ----------
        z
            Low-rank maps (N, r, H, W).

        Returns
        -------
        Tensor
            (E, N, r, H, W).
        """
        size = z.shape[-2:]
        answers: list[Tensor] = [z] * len(self.scales)
        if self._plain:
            out = self._convolve(z, self._weights(self._plain), self._plain, padding=1)
            for i, answer in zip(self._plain, out, strict=True):
                answers[i] = answer
        if self._odd:
            kernels = collapse_kernels(self._weights(self._odd), self.taps)
            out = self._convolve(F.pad(z, (2, 2, 2, 2), mode="replicate"), kernels, self._odd)
            for i, answer in zip(self._odd, out, strict=True):
                answers[i] = answer
        for i in self._even:
            large = F.interpolate(z, scale_factor=float(self.scales[i]), mode="bicubic")
            large = F.gelu(F.conv2d(large, self.expert_weight[i], self.expert_bias[i], padding=1))
            answers[i] = F.interpolate(large, size=size, mode="bicubic")
        return torch.stack(answers)

    def _weights(self, which: list[int]) -> Tensor:
        # Indexing with a list would copy the list to the GPU and wait for it, in every layer.
        return torch.stack([self.expert_weight[i] for i in which])

    def _convolve(
        self, z: Tensor, kernels: Tensor, which: list[int], padding: int = 0
    ) -> tuple[Tensor, ...]:
        bias = torch.cat([self.expert_bias[i] for i in which])
        out = F.gelu(F.conv2d(z, kernels.flatten(0, 1), bias, padding=padding))
        return out.chunk(len(which), dim=1)

    def combine(self, z: Tensor) -> Tensor:
        """Put the experts' answers to the low-rank maps `z` (N, r, H, W) together: their sum."""
        return self.experts(z).sum(0)

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

    def route(self, z: Tensor) -> Tensor:
        """Weight of every expert for each map, and the balance loss as a side effect.

        Parameters
        ----------
        z
            Low-rank maps (N, r, H, W).

        Returns
        -------
        Tensor
            (N, E); zero for experts that were not chosen.
        """
        pooled = z.mean((2, 3))
        clean = pooled @ self.gate
        noise = F.softplus(pooled @ self.gate_noise) + _NOISE_FLOOR
        logits = clean + torch.randn_like(clean) * noise if self.training else clean
        chosen = logits.topk(self.top_k, dim=1)
        weights = torch.zeros_like(logits).scatter(1, chosen.indices, chosen.values.softmax(1))
        self.balance_loss = self._balance(weights, clean, noise, logits) if self.training else None
        if self.faithful:
            return (weights > 0).to(z.dtype)
        if self.top_k == 1:
            # Value 1, gradient of log softmax: the gate learns which expert the task wants.
            share = logits.softmax(1).gather(1, chosen.indices)
            return torch.zeros_like(logits).scatter(1, chosen.indices, share / share.detach())
        return weights

    def _balance(self, weights: Tensor, clean: Tensor, noise: Tensor, logits: Tensor) -> Tensor:
        """Return importance plus load loss of top-k gating (Shazeer et al., 2017, appendix A)."""
        importance = squared_variation(weights.sum(0))
        n_experts = logits.shape[1]
        if self.top_k == n_experts:
            return _BALANCE_WEIGHT * importance
        ranked = logits.topk(self.top_k + 1, dim=1).values
        inside = logits > ranked[:, -1:]
        threshold = torch.where(inside, ranked[:, -1:], ranked[:, -2:-1])
        load = torch.special.ndtr((clean - threshold) / noise).sum(0)
        return _BALANCE_WEIGHT * (importance + squared_variation(load))

    def combine(self, z: Tensor) -> Tensor:
        """Weigh the experts' answers to `z` (N, r, H, W) by the gate."""
        return torch.einsum("ne,enrhw->nrhw", self.route(z), self.experts(z))


def inject(encoder: Any, first_block: int, config: MethodConfig) -> Any:
    """Replace every block's ``attn.qkv`` by a `ConvLoRALinear` around it."""
    for block in encoder.blocks[first_block:]:
        block.attn.qkv = ConvLoRALinear(block.attn.qkv, config)
    return encoder


METHODS["conv_lora"] = Method("Conv-LoRA", inject)
