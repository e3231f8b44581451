"""Decoder only: the encoder stays as it is, so its features are computed once."""

from __future__ import annotations

from typing import Any

from napari_convlora.config import MethodConfig
from napari_convlora.peft.registry import METHODS, AdaptableEncoder, Method


def _inject(encoder: AdaptableEncoder, first_block: int, config: MethodConfig) -> Any:
    """Return `encoder` unchanged."""
    return encoder


METHODS["decoder_only"] = Method("Decoder only", _inject, adapts_encoder=False)
