"""Frozen Segment Anything models: what there is, loading, running in halves; never trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from napari_convlora.backbones.base import Backbone, Encoder, SamParts
from napari_convlora.backbones.checkpoints import (
    Progress,
    checkpoint_path,
    fetch,
    find_checkpoint,
    sha256,
)
from napari_convlora.backbones.registry import REGISTRY, BackboneName, BackboneSpec
from napari_convlora.backbones.sam import VIT_SIZES, build_vit
from napari_convlora.backbones.state_dict import assign, detect, read_state
from napari_convlora.backbones.tiny_vit import build_tiny_vit
from napari_convlora.errors import WeightsError

__all__ = [
    "REGISTRY",
    "Backbone",
    "BackboneName",
    "BackboneSpec",
    "Encoder",
    "available_backbones",
    "checkpoint_path",
    "fetch",
    "find_checkpoint",
    "load_backbone",
]


def available_backbones() -> dict[str, Path | None]:
    """Return every known backbone with its checkpoint on this computer, ``None`` if absent."""
    return {name: find_checkpoint(name) for name in REGISTRY}


def load_backbone(
    name_or_path: str | Path = "litemedsam",
    *,
    download: bool = False,
    progress: Progress | None = None,
) -> Backbone:
    """Load a frozen SAM onto the CPU.

    Parameters
    ----------
    name_or_path
        A name in the registry, or any checkpoint of one of its architectures: the official ones,
        MedSAM, micro-sam's generalists. The architecture is recognised from the tensors; what
        they do not tell, how pixels were normalised, from the SHA-256 or the published name of
        the file, or from a name in the registry before its path: ``medsam:tuned.pth``. Else that
        of the architecture's first checkpoint is assumed.
    download, progress
        For a name whose checkpoint is not on this computer; see `fetch`.

    Raises
    ------
    WeightsError
        The checkpoint is absent, damaged, unsafe, not what its name promises, or no SAM.
    """
    name, colon, file = str(name_or_path).partition(":")
    row = REGISTRY.get(name)
    if row is not None and not colon:
        path = checkpoint_path(row.name, download=download, progress=progress)
    else:
        path = Path(file if row is not None else name_or_path).expanduser()
        if not path.is_file():
            raise WeightsError(
                f"There is no backbone or checkpoint file called {str(name_or_path)!r}; the known "
                f"backbones are {', '.join(REGISTRY)}."
            )
    state = read_state(path)
    digest = sha256(path)
    expected = None if colon else row
    if expected is not None and expected.sha256 not in (None, digest):
        raise WeightsError(
            f"{path} is not the published checkpoint of {expected.title} (SHA-256 {digest}, "
            f"expected {expected.sha256}); delete it and get it again, or load it by its path."
        )
    architecture = detect(state, path)
    if row is not None and row.architecture != architecture:
        raise WeightsError(
            f"{path} has the architecture of {REGISTRY[architecture].title}, not that of "
            f"{row.title}; load it by its path alone."
        )
    with torch.device("meta"):  # random initialisation of ViT-H would take half a minute
        parts, image_size = _build(architecture, state)
    assign(parts, state, path)
    spec = _spec_of_file(row, architecture, path, digest, image_size)
    return Backbone(spec, parts, digest)


def _build(architecture: str, state: dict[str, torch.Tensor]) -> tuple[SamParts, int]:
    """Build a recognised architecture; return it with the image size it was trained on."""
    if architecture not in VIT_SIZES:
        tiny = cast('Literal["vit_t", "litemedsam"]', architecture)
        return build_tiny_vit(tiny), REGISTRY[architecture].image_size
    size = VIT_SIZES[architecture]
    position = state.get("image_encoder.pos_embed")
    if position is not None and position.ndim == 4:  # fine-tunes at 256 or 512 px exist
        size = replace(size, image_size=position.shape[1] * size.patch_size)
    return build_vit(size), size.image_size


def _spec_of_file(
    row: BackboneSpec | None, architecture: str, path: Path, digest: str, image_size: int
) -> BackboneSpec:
    """Describe a file by the registry row of its hash, else of what the user called it (`row`).

    Failing both, by the row of the name of the file, where nobody states a hash, or of its
    architecture.
    """
    for spec in REGISTRY.values():
        if spec.sha256 == digest:
            return spec
        unhashed = spec.sha256 is None and spec.architecture == architecture
        if row is None and unhashed and spec.file_name == path.name:
            row = spec
    row = row or REGISTRY[architecture]
    return replace(
        row,
        title=f"{path.stem} (as {row.title})",
        url=None,
        file_name=path.name,
        sha256=None,
        size_bytes=None,
        licence="not stated",
        image_size=image_size,
        note=f"Loaded from a file; the normalisation of {row.title} is assumed.",
    )
