"""Adapt Segment Anything models to a few strokes, in napari and without it."""

# No `from __future__ import annotations` here: its name would hide the module of that name.
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names are imported when first used, as torch takes seconds and napari reads the version only.
_HOMES = {
    "Adapter": "adapter_file",
    "ClassInfo": "config",
    "LabelledImage": "annotations",
    "MethodConfig": "config",
    "ModelConfig": "config",
    "RunControl": "events",
    "TrainConfig": "config",
    "adapt": "training",
    "load_backbone": "backbones",
    "predict": "prediction",
    "read_image": "files",
    "read_labels": "files",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
