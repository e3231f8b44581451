"""Adapt Segment Anything models to a few strokes, in napari and without it."""

# No `from __future__ import annotations` here: its name would hide the module of that name.
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Names are imported when first used, as torch takes seconds and napari reads the version only.
_HOMES = {
    "Adapter": "model.adapter",
    "ClassInfo": "config",
    "LabelledImage": "labels.annotations",
    "MethodConfig": "config",
    "ModelConfig": "config",
    "RunControl": "control",
    "TrainConfig": "config",
    "adapt": "training",
    "default_classes": "labels.classes",
    "find_instances": "exports.instances",
    "load_backbone": "backbones",
    "predict": "prediction.predict",
    "read_image": "formats.opening",
    "read_labels": "formats.opening",
    "region_table": "exports.measurements",
    "save_instances": "exports.instances",
}

# What scripts import by the names that the first README gave, and where its content is now.
_FORMER = {
    "annotations": ("labels.annotations", "labels.classes"),
    "instances": ("exports.instances", "exports.measurements"),
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _FormerNames(MetaPathFinder, Loader):
    """Finds a module under the name that it had before."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        package, _dot, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        for home in _FORMER[module.__name__.rpartition(".")[2]]:
            found = vars(import_module(f"{__name__}.{home}"))
            vars(module).update({n: v for n, v in found.items() if not n.startswith("_")})


sys.meta_path.append(_FormerNames())
