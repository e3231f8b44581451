from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from napari_convlora.backbones import Backbone, tiny_vit_layers
from napari_convlora.backbones.testing import TINY, random_backbone
from napari_convlora.backbones.tiny_vit import build_tiny_vit
from napari_convlora.backbones.tiny_vit_layers import Attention, ConvBN, MBConv
from napari_convlora.errors import InputError

# The embedding of `pattern` at [0, ::32, 10, 20], its mean and its standard deviation, computed
# with LiteMedSAM's published source.
GOLDEN = [0.041186, 0.206548, -0.072058, -0.019816, -0.010701, 0.036438, -0.02132, 0.013344]
GOLDEN_MEAN, GOLDEN_STD = -0.00010681, 0.12189523


@torch.no_grad()
def test_litemedsam_agrees_with_its_reference(litemedsam: Backbone, pattern: Tensor) -> None:
    embedding = litemedsam.encoder(pattern)
    assert embedding.shape == (1, 256, 64, 64)
    torch.testing.assert_close(
        embedding[0, ::32, 10, 20], torch.tensor(GOLDEN), rtol=1e-4, atol=2e-5
    )
    assert embedding.mean().item() == pytest.approx(GOLDEN_MEAN, abs=1e-6)
    assert embedding.std().item() == pytest.approx(GOLDEN_STD, abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), batch=st.integers(1, 2))
def test_prefix_then_suffix_is_forward(h: int, w: int, batch: int) -> None:
    encoder = random_backbone("tiny").encoder
    images = torch.rand(batch, 3, 4 * h, 4 * w)
    whole = encoder(images)
    assert whole.shape == (batch, 32, h, w)
    assert whole.isfinite().all()
    assert len(encoder.blocks) == 4
    for split in range(len(encoder.blocks) + 1):
        torch.testing.assert_close(encoder.suffix(encoder.prefix(images, split), split), whole)


@torch.no_grad()
def test_mobilesam_has_a_token_per_16_px() -> None:
    encoder = build_tiny_vit("vit_t").encoder
    assert encoder(torch.rand(1, 3, 32, 64)).shape == (1, 256, 2, 4)
    with pytest.raises(InputError, match="multiples of 16 px"):
        encoder(torch.rand(1, 3, 36, 64))


def test_sides_must_be_multiples_of_the_stride() -> None:
    with pytest.raises(InputError, match=r"62 x 64 px.*multiples of 4 px"):
        random_backbone("tiny").encoder(torch.rand(1, 3, 62, 64))


def test_folded_normalisation_is_the_normalisation() -> None:
    conv = ConvBN(3, 8, 3, 2)
    conv.bn.running_mean = torch.randn(8)
    conv.bn.running_var = torch.rand(8) + 0.5
    nn.init.normal_(conv.bn.weight)
    nn.init.normal_(conv.bn.bias)
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(conv(x), conv.bn(conv.c(x)), rtol=1e-4, atol=1e-5)


def test_training_mode_never_changes_statistics_or_results() -> None:
    backbone = random_backbone("tiny")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    evaluated = backbone(images)
    backbone.train()
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(backbone(images), evaluated, rtol=0, atol=0)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_attention_bias_depends_on_the_distance_only() -> None:
    attention = Attention(dim=8, heads=2, window=3)
    nn.init.normal_(attention.attention_biases)
    bias = attention._bias()
    for first in range(9):
        for second in range(9):
            dy, dx = abs(first // 3 - second // 3), abs(first % 3 - second % 3)
            expected = attention.attention_biases[:, dy * 3 + dx]
            assert torch.equal(bias[0, :, first, second], expected)


def test_attention_splits_q_k_v_within_each_head() -> None:
    attention = Attention(dim=8, heads=2, window=2)
    nn.init.normal_(attention.attention_biases)
    x = torch.randn(3, 2, 2, 8)
    qkv = attention.qkv(attention.norm(x)).reshape(3, 4, 2, 3, 4)
    heads = []
    for head in range(2):
        q, k, v = qkv[:, :, head].unbind(2)
        weights = q @ k.transpose(1, 2) / 2 + attention._bias()[0, head]
        heads.append(weights.softmax(-1) @ v)
    expected = attention.proj(torch.cat(heads, -1)).reshape(3, 2, 2, 8)
    torch.testing.assert_close(attention(x), expected)


def test_qkv_sees_channel_last_windows() -> None:
    encoder = random_backbone("tiny").encoder
    shapes = []
    for block in encoder.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))  # type: ignore[union-attr]
    encoder(torch.rand(1, 3, 64, 64))
    # 32 x 32 tokens in windows of 4; 16 x 16 in windows of 6 (padded to 18) and of 4
    assert shapes == [(64, 4, 4, 16), (9, 6, 6, 16), (9, 6, 6, 16), (16, 4, 4, 32)]


@torch.no_grad()
def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_backbone("tiny").encoder
    images = torch.rand(2, 3, 52, 64)
    whole = encoder(images)
    monkeypatch.setattr(tiny_vit_layers, "_STRIP_BYTES", 1)
    torch.testing.assert_close(encoder(images), whole)


def test_gradients_equal_the_unstripped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_backbone("tiny").encoder
    images = torch.rand(1, 3, 32, 32)
    shift = torch.zeros(1, requires_grad=True)
    gradients = []
    for strip_bytes in (2**30, 1):
        monkeypatch.setattr(tiny_vit_layers, "_STRIP_BYTES", strip_bytes)
        # adapters sit behind a frozen prefix that is computed in strips
        features = encoder.prefix(images, 1) + shift
        loss = encoder.suffix(features, 1).square().sum()
        gradients += torch.autograd.grad(loss, shift)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs() > 0


def test_adapter_in_the_perceptron_sees_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert x.ndim == 4
            assert x.shape[1] == 16
            return super().forward(x)

    monkeypatch.setattr(tiny_vit_layers, "_STRIP_BYTES", 1)
    encoder = random_backbone("tiny").encoder
    mlp = encoder.blocks[-1].mlp
    mlp.fc1 = Adapted(TINY.dims[-1], 4 * TINY.dims[-1])  # type: ignore[union-attr]
    encoder(torch.rand(1, 3, 64, 64))


@torch.no_grad()
def test_inverted_bottleneck_matches_its_definition() -> None:
    block = MBConv(4)
    x = torch.randn(2, 4, 10, 6)
    hidden = F.gelu(block.conv1.bn(block.conv1.c(x)))
    hidden = F.gelu(block.conv2.bn(block.conv2.c(hidden)))
    expected = F.gelu(block.conv3.bn(block.conv3.c(hidden)) + x)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
