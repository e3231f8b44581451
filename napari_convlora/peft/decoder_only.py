"""Decoder only: the encoder stays as it is, so its features are computed once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, Method


def inject(blocks: Sequence[nn.Module], config: MethodConfig) -> None:
    """Leave `blocks` unchanged."""


METHODS["decoder_only"] = Method("Decoder only", adapts_encoder=False, inject=inject)
