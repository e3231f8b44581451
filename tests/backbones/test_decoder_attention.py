from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from napari_convlora.backbones.decoder_attention import DecoderAttention
from napari_convlora.backbones.sam import modeling
from napari_convlora.backbones.testing import random_backbone


def gradients(attention: nn.Module, inputs: list[Tensor], signal: Tensor) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    attention.zero_grad()
    (attention(*inputs) * signal).sum().backward()
    found = dict(zip("qkv", (x.grad for x in inputs), strict=True))
    found |= {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in attention.named_parameters()
    }
    return found


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 12),
    keys=st.integers(1, 12),
    batch=st.integers(1, 2),
    rate=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_segment_anything(
    queries: int, keys: int, batch: int, rate: int, seed: int
) -> None:
    torch.manual_seed(seed)
    official = modeling().transformer.Attention(16, num_heads=2, downsample_rate=rate)
    for parameter in official.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DecoderAttention(copy.deepcopy(official))
    inputs = [torch.randn(batch, queries, 16), *torch.randn(2, batch, keys, 16)]
    signal = torch.randn(batch, queries, 16)
    torch.testing.assert_close(ours(*inputs), official(*inputs), rtol=1e-5, atol=1e-5)
    expected = gradients(official, inputs, signal)
    for name, gradient in gradients(ours, inputs, signal).items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5)


def test_every_attention_of_a_decoder_is_of_this_kind() -> None:
    decoder = random_backbone("vit").mask_decoder
    kinds = [type(m) for m in decoder.modules() if hasattr(m, "out_proj")]
    assert kinds == [DecoderAttention] * 7  # two blocks of three, and the last look at the map
