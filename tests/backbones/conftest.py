from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def pattern() -> Tensor:
    """A deterministic image of waves, a cone and a chessboard, (1, 3, 256, 256) in [0, 1.1]."""
    axis = torch.linspace(0, 1, 256)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    waves = (6 * x + 3 * y).sin() * 0.5 + 0.5
    cone = ((x - 0.5) ** 2 + (y - 0.4) ** 2).sqrt()
    chessboard = ((x * 8).floor() + (y * 8).floor()) % 2
    return torch.stack([waves, cone, chessboard])[None]
