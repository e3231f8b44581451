"""The napari side and all there is of Qt: panel, layers, tools; nothing is trained here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"ConvLoRAWidget": "panel"}

__all__ = ["ConvLoRAWidget"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
