"""SAM's attention with decomposed relative positions, without matrices of all pairs of tokens.

``segment_anything`` adds a bias ``q . Rh[y - y'] + q . Rw[x - x']`` to the scores of every pair of
tokens, and forms several matrices of all pairs on the way: 805 MB each for a global block of ViT-B
at 1024 px. Two exact formulations do without:

*Additive*: the scores of a few windows, or of a few rows of queries, are added to their bias while
it is in the processor's cache. Fastest on a CPU, but autograd would keep all scores.

*Augmented*: ``rel_h(q), rel_w(q)`` appended to q, and one-hot rows and columns to k, so that their
product is the bias, and `scaled_dot_product_attention` does the rest. No matrix of pairs is ever
formed, also in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCORE_BYTES = 6 * 1024**2
"""Size of the scores computed at a time: they stay in cache, and memory is used again."""


class MapAttention(nn.Module):
    """Multi-head attention on a token map, in windows or as a whole.

    Parameters
    ----------
    base
        `Attention` of `segment_anything`; its layers and tables of relative positions are shared.
    window
        Side of a window in tokens; 0 attends to the whole map. Windows that reach beyond the map
        are filled up with zero tokens, which take part as in pretraining.
    interpolate
        `get_rel_pos` of `segment_anything`: relative positions (n, n, d) from a table.

    Attributes
    ----------
    prompts : Parameter or None
        Further tokens (p, C), put through `prompt_norm` (the block's own) and projected to keys and
        values that have no position.
    """

    def __init__(self, base: Any, window: int, interpolate: Any) -> None:
        super().__init__()
        self.num_heads, self.scale, self.window = base.num_heads, base.scale, window
        self.qkv, self.proj = base.qkv, base.proj
        self.rel_pos_h, self.rel_pos_w = base.rel_pos_h, base.rel_pos_w
        self._interpolate = interpolate
        self.prompts: nn.Parameter | None
        self.register_parameter("prompts", None)
        self.prompt_norm: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C), already normalised, to the same shape."""
        b, height, width, c = x.shape
        side = self.window
        if not side:
            maps: Tensor = self.proj(self._attend(self.qkv(x)))
            return maps
        inside, back = _window_places(height, width, side, x.device)
        # One zero token more fills the windows up. A linear layer works token by token and need not
        # project it again for every place; an adapter around it may need to see maps.
        tokens = F.pad(x.flatten(1, 2), (0, 0, 0, 1))
        parts: Iterable[Tensor]
        some = self._windows_at_once(x) * side**2
        if type(self.qkv) is nn.Linear:
            qkv = self.qkv(tokens)
            parts = (qkv.index_select(1, places) for places in inside.split(some))
        else:
            qkv = self.qkv(tokens.index_select(1, inside).view(-1, side, side, c))
            parts = qkv.view(b, -1, 3 * c).split(some, dim=1)
        windows = (self._attend(part.reshape(-1, side, side, 3 * c)) for part in parts)
        attended = torch.cat([part.reshape(b, -1, c) for part in windows], dim=1)
        out: Tensor = self.proj(attended.index_select(1, back).view(x.shape))
        return out

    def _windows_at_once(self, x: Tensor) -> int:
        """How many windows of each map (B, H, W, C) to attend within at a time."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return x.shape[1] * x.shape[2]
        pairs = self.window**4 * self.num_heads
        return max(1, _SCORE_BYTES // (x.element_size() * x.shape[0] * pairs))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attend within each of the maps (N, h, w, 3 * C); the result is (N, h, w, C)."""
        n, h, w, _ = qkv.shape
        q, k, v = qkv.view(n, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        grid = q.unflatten(2, (h, w))
        rel_h = self._interpolate(h, h, self.rel_pos_h).to(q.dtype)
        rel_w = self._interpolate(w, w, self.rel_pos_w).to(q.dtype)
        bias_h = torch.einsum("nahwd,hkd->nahwk", grid, rel_h)
        bias_w = torch.einsum("nahwd,wkd->nahwk", grid, rel_w)
        if self.prompts is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), self._more(len(q)), strict=True))
        training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        attend = self._additive if q.device.type == "cpu" and not training else self._augmented
        return attend(grid, k, v, bias_h, bias_w).transpose(1, 2).reshape(n, h, w, -1)

    def _additive(
        self, grid: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor
    ) -> Tensor:
        n, heads, h, w, _ = grid.shape
        row_bytes = grid.element_size() * n * heads * w * k.shape[2]
        step = max(1, _SCORE_BYTES // row_bytes)
        more = k.shape[2] - h * w
        # Their sum inherits their layout, and would be copied to be flattened; so would a pad of 0.
        bias_h, bias_w = (bias.flatten(0, 1).contiguous() for bias in (bias_h, bias_w))
        grid, k, v = (values.flatten(0, 1) for values in (grid, k, v))
        parts = []
        for top in range(0, h, step):
            some = slice(top, top + step)
            scores = bias_h[:, some, :, :, None] + bias_w[:, some, :, None, :]
            scores = scores.flatten(3).flatten(1, 2)
            if more:
                scores = F.pad(scores, (0, more))
            scores.baddbmm_(grid[:, some].flatten(1, 2), k.transpose(1, 2), alpha=self.scale)
            parts.append(scores.softmax(-1) @ v)
        return torch.cat(parts, dim=1).unflatten(0, (n, heads))

    def _augmented(
        self, grid: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor
    ) -> Tensor:
        h, w, d = grid.shape[2:]
        rows = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, 0)
        columns = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
        where = F.pad(torch.cat([rows, columns], dim=1), (0, 0, 0, k.shape[2] - h * w))
        k = torch.cat([k, where.expand(*k.shape[:2], -1, -1)], dim=-1)
        q = torch.cat([grid * self.scale, bias_h, bias_w], dim=-1).flatten(2, 3)
        # Values as wide as keys, as not every fused kernel takes others.
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, h + w)), scale=1.0)
        return out[..., :d]

    def _more(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, p, d) of the prompts."""
        assert self.prompts is not None
        assert self.prompt_norm is not None
        qkv = self.qkv(self.prompt_norm(self.prompts)[None, None])
        _, k, v = qkv.view(1, len(self.prompts), 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)


def _window_places(
    height: int, width: int, side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which token is where when a map is cut into windows, and where each token then is.

    Returns
    -------
    inside, back : Tensor
        Token of each place, window by window, ``height * width`` where the windows reach beyond the
        map; and place of each token (height * width,). Both int64.
    """
    index = torch.arange(height * width, device=device).view(height, width)
    index = F.pad(index, (0, -width % side, 0, -height % side), value=height * width)
    inside = index.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).flatten()
    return inside, inside.argsort()[: height * width]
