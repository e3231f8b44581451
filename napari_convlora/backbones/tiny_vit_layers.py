"""The layers of TinyViT, with the parameter names of MobileSAM's and LiteMedSAM's checkpoints.

Maps are (B, C, H, W) tensors in channels-last memory, so that convolutions and linear layers share
them without copies.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STRIP_BYTES = 2**23
"""Size of an expanded map that stays in a processor's cache; larger ones are made in strips."""


class ConvBN(nn.Module):
    """Convolution followed by batch normalisation with its stored statistics.

    The normalisation is folded into the convolution at each call: it costs microseconds, saves a
    pass over the map, and neither the statistics nor the state dict can ever change.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_dim, out_dim, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_dim)
        self.bn.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H', W')."""
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        return F.conv2d(
            x,
            self.c.weight * scale[:, None, None, None],
            bn.bias - bn.running_mean * scale,
            self.c.stride,
            self.c.padding,
            groups=self.c.groups,
        )

    def train(self, mode: bool = True) -> ConvBN:
        """Set the mode of this module but leave its batch normalisation in evaluation mode."""
        super().train(mode)
        self.bn.eval()
        return self


class PatchEmbed(nn.Module):
    """Two convolutions that turn an image into the first map."""

    def __init__(self, dim: int, stride: Literal[1, 4]) -> None:
        super().__init__()
        kernel, step = (3, 2) if stride == 4 else (1, 1)
        self.seq = nn.Sequential(
            ConvBN(3, dim // 2, kernel, step), nn.GELU(), ConvBN(dim // 2, dim, kernel, step)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H / stride, W / stride)."""
        x: Tensor = self.seq(images)
        return x


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise 3 x 3, project, residual, GELU."""

    def __init__(self, dim: int, expand: int = 4) -> None:
        super().__init__()
        self.hidden = dim * expand
        self.conv1 = ConvBN(dim, dim * expand)
        self.conv2 = ConvBN(dim * expand, dim * expand, 3, groups=dim * expand)
        self.conv3 = ConvBN(dim * expand, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        rows = _STRIP_BYTES // (4 * self.hidden * x.shape[3])
        if not _strips_help(x) or rows >= x.shape[2]:
            return self._rows(x, 0, x.shape[2])
        out = torch.empty_like(x)
        rows = max(rows, 4)
        for i in range(x.shape[0]):
            for top in range(0, x.shape[2], rows):
                bottom = min(top + rows, x.shape[2])
                out[i : i + 1, :, top:bottom] = self._rows(x[i : i + 1], top, bottom)
        return out

    def _rows(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """Compute output rows ``top..bottom``, which depend on one more row on either side."""
        first = max(top - 1, 0)
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x[:, :, first : bottom + 1]))))
        hidden = hidden[:, :, top - first : bottom - first]
        return F.gelu(self.conv3(hidden) + x[:, :, top:bottom])


class PatchMerging(nn.Module):
    """Change the channels and, with ``stride`` 2, halve the map."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, out_dim)
        self.conv2 = ConvBN(out_dim, out_dim, 3, stride, groups=out_dim)
        self.conv3 = ConvBN(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H / stride, W / stride)."""
        merged: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return merged


class Attention(nn.Module):
    """Multi-head attention in one window, with a learned bias per |dy|, |dx|."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.prompts: nn.Parameter | None
        self.register_parameter("prompts", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, window, window, C) to the same shape."""
        n, h, w, c = x.shape
        q, k, v = self._project(x)
        bias = self._bias().to(q.dtype)
        if self.prompts is not None:
            _, more_k, more_v = self._project(self.prompts[None, None])
            k = torch.cat([k, more_k.expand(n, -1, -1, -1)], dim=2)
            v = torch.cat([v, more_v.expand(n, -1, -1, -1)], dim=2)
            bias = F.pad(bias, (0, len(self.prompts)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, h, w, c))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of (N, h, w, C), (N, heads, h * w, d) each."""
        n, h, w, _ = x.shape
        # q, k and v lie side by side within each head
        qkv = self.qkv(self.norm(x)).reshape(n, h * w, self.heads, -1).transpose(1, 2)
        return qkv.chunk(3, dim=-1)

    def _bias(self) -> Tensor:
        """Additive bias of each pair of window positions, (1, heads, window**2, window**2)."""
        side = self.window
        position = torch.arange(side, device=self.attention_biases.device)
        distance = (position[:, None] - position).abs()
        table = self.attention_biases.view(self.heads, side, side)
        pairs: Tensor = table[:, distance][:, :, :, distance]  # (heads, y, y', x, x')
        return pairs.permute(0, 1, 3, 2, 4).reshape(1, self.heads, side**2, side**2)


class Mlp(nn.Module):
    """LayerNorm and two linear layers."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        rows = max(1, _STRIP_BYTES // (4 * x.shape[0] * x.shape[2] * 4 * x.shape[3]))
        # an adapter in place of a linear layer may need to see the whole map
        if _strips_help(x) and type(self.fc1) is type(self.fc2) is nn.Linear:
            starts = range(0, x.shape[1], rows)
            return torch.cat([self._rows(x[:, i : i + rows]) for i in starts], dim=1)
        return self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


def _strips_help(x: Tensor) -> bool:
    """Whether memory traffic is the bottleneck and no gradient makes us keep the map anyway."""
    return x.device.type == "cpu" and not x.requires_grad


class TinyViTBlock(nn.Module):
    """Window attention, depthwise 3 x 3 convolution, perceptron."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.local_conv = ConvBN(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self._attend(tokens)
        mixed: Tensor = self.local_conv(tokens.permute(0, 3, 1, 2))
        tokens = mixed.permute(0, 2, 3, 1)
        out: Tensor = tokens + self.mlp(tokens)
        return out.permute(0, 3, 1, 2)

    def _attend(self, tokens: Tensor) -> Tensor:
        """Attend within windows of (B, H, W, C); padding takes part, as in pretraining."""
        b, h, w, c = tokens.shape
        side = self.window
        rows, columns = -(-h // side), -(-w // side)
        padded = F.pad(tokens, (0, 0, 0, columns * side - w, 0, rows * side - h))
        windows: Tensor = padded.view(b, rows, side, columns, side, c).transpose(2, 3)
        windows = self.attn(windows.reshape(-1, side, side, c))
        windows = windows.view(b, rows, columns, side, side, c).transpose(2, 3)
        return windows.reshape(b, rows * side, columns * side, c)[:, :h, :w]


class Stage(nn.Module):
    """Blocks, then merging in every stage but the last."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class LayerNorm2d(nn.LayerNorm):
    """Normalise the channels of each pixel of a (B, C, H, W) map."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
