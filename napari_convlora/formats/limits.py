"""What is refused whatever the format: too large, damaged, lossy."""

from __future__ import annotations

from pathlib import Path

from napari_convlora.errors import InputError

MAX_BYTES = 4_000_000_000
"""Decoded size beyond which a file is refused before anything is allocated."""


def damaged(path: Path) -> InputError:
    """Return what to raise of a file that ends early or cannot be decoded."""
    return InputError(
        f"'{path.name}' is damaged or truncated; copy it again or save it again as PNG or TIFF."
    )


def check_bytes(path: Path, size: int) -> None:
    """Raise an `InputError` if a file would decode to more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise InputError(
            f"'{path.name}' would take {size / 1e9:.1f} GB once opened, more than the "
            f"{MAX_BYTES / 1e9:.0f} GB allowed; crop it or split it into several files."
        )


def refuse_lossy(path: Path) -> None:
    """Raise an `InputError`: labels were compressed as if they were a photograph."""
    raise InputError(
        f"'{path.name}' is a JPEG, whose compression changes class ids; "
        "export the labels again as PNG or TIFF."
    )
