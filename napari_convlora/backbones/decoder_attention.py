"""SAM's mask decoder attends between a few tokens and thousands of places: projected tokens only.

``segment_anything`` projects every place of the map to a query, or to a key and a value, and back.
With n tokens and h heads, ``n * h`` vectors take the place of those projections' columns, as
``(t Wq) (x Wk)' = (t Wq Wk') x'`` and ``a (x Wv) Wo = (a x) Wv Wo``. The result is the same up to
rounding, with a fraction of the operations when there are few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecoderAttention(nn.Module):
    """Multi-head attention of the mask decoder's transformer.

    Parameters
    ----------
    base
        `Attention` of `segment_anything`'s transformer; its layers are shared.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.num_heads = base.num_heads
        self.scale = (base.internal_dim // base.num_heads) ** -0.5
        self.q_proj, self.k_proj = base.q_proj, base.k_proj
        self.v_proj, self.out_proj = base.v_proj, base.out_proj

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q (B, n, C) to k and v, each (B, m, C); the result is (B, n, C)."""
        few, many = sorted((q.shape[1], k.shape[1]))
        if few == many or few * self.num_heads >= self.q_proj.out_features:
            return self._projected(q, k, v)
        return self._from_tokens(q, k, v) if few == q.shape[1] else self._to_tokens(q, k, v)

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as `segment_anything` does, by a fused kernel."""
        q, k, v = (
            self._heads(x).transpose(1, 2) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        out: Tensor = self.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return out

    def _from_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Few queries: each head's query goes through the key projection, not the keys.

        The bias of the keys changes all scores of a query alike, so softmax does not see it.
        """
        queries = self._heads(self.q_proj(q))
        queries = torch.einsum("bnhd,hdc->bhnc", queries, self._rows(self.k_proj))
        scores = queries.flatten(1, 2) @ k.transpose(1, 2) * self.scale
        read = (scores.softmax(-1) @ v).unflatten(1, (self.num_heads, -1))
        read = torch.einsum("bhnc,hdc->bnhd", read, self._rows(self.v_proj)).flatten(2)
        out: Tensor = self.out_proj(read + self.v_proj.bias)
        return out

    def _to_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Few keys: they go through the query projection, and their values to the output."""
        keys = self._heads(self.k_proj(k))
        constant = torch.einsum("bmhd,hd->bhm", keys, self._heads(self.q_proj.bias)).flatten(1)
        keys = torch.einsum("bmhd,hdc->bhmc", keys, self._rows(self.q_proj)).flatten(1, 2)
        scores = (q @ keys.transpose(1, 2) + constant[:, None]) * self.scale
        weights = scores.unflatten(-1, (self.num_heads, -1)).softmax(-1).flatten(2)
        columns = self.out_proj.weight.unflatten(1, (self.num_heads, -1))
        values = torch.einsum("bmhd,chd->bhmc", self._heads(self.v_proj(v)), columns).flatten(1, 2)
        return weights @ values + self.out_proj.bias

    def _heads(self, x: Tensor) -> Tensor:
        """Split the last axis into heads: (..., D) to (..., h, d)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _rows(self, layer: nn.Linear) -> Tensor:
        """Weights of a projection by head (h, d, C)."""
        return layer.weight.unflatten(0, (self.num_heads, -1))
