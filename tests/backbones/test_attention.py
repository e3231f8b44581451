from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from napari_convlora.backbones import attention
from napari_convlora.backbones.attention import MapAttention
from napari_convlora.backbones.sam import modeling


def pair(window: int, grid: int = 5) -> tuple[Any, Any]:
    """A block of `segment_anything` and the same with our attention; both random throughout."""
    torch.manual_seed(0)
    official = modeling().image_encoder.Block(
        dim=16, num_heads=2, use_rel_pos=True, window_size=window, input_size=(grid, grid)
    )
    for parameter in official.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(official)
    ours.attn = MapAttention(ours.attn, window, modeling().image_encoder.get_rel_pos)
    ours.window_size = 0
    return official, ours


def gradients(block: Any, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    block.zero_grad()
    (block(x) * signal).sum().backward()
    return {"input": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    batch=st.integers(1, 2),
    window=st.sampled_from([0, 3, 4]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_segment_anything(
    h: int, w: int, batch: int, window: int, seed: int
) -> None:
    official, ours = pair(window)
    torch.manual_seed(seed)
    x, signal = torch.randn(2, batch, h, w, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), official(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), official(x), rtol=1e-5, atol=1e-5)
    expected = gradients(official, x, signal)
    for name, gradient in gradients(ours, x, signal).items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("n_bytes", [1, 3000])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_map_is_attended_to_part_by_part_with_the_same_result(
    window: int, n_bytes: int, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair(window)
    if adapted:
        ours.attn.qkv = nn.Sequential(ours.attn.qkv)
    x = torch.randn(2, 7, 6, 16)
    with torch.no_grad():
        whole = ours(x)
        monkeypatch.setattr(attention, "_SCORE_BYTES", n_bytes)
        torch.testing.assert_close(ours(x), whole)


def test_no_matrix_of_all_pairs_is_kept_for_the_backward_pass() -> None:
    _, ours = pair(0)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(1, 24, 24, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    assert max(kept) < (24 * 24) ** 2 // 4
