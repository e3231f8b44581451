"""Read a checkpoint from a stranger: never run it, recognise it, refuse it in one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from napari_convlora.backbones.base import SamParts
from napari_convlora.backbones.checkpoints import MAX_BYTES
from napari_convlora.errors import WeightsError
from napari_convlora.files.atomic import check_no_device

_MODULES = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_WRAPPERS = ("model", "model_state", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "sam.", "model.")
_OTHER_HEADS = (
    "image_encoder.norm_head.",  # MobileSAM keeps TinyViT's ImageNet classifier
    "image_encoder.head.",
    "mask_decoder.hf_",  # HQ-SAM adds a high-quality head to SAM's own
    "mask_decoder.compress_vit_feat.",
    "mask_decoder.embedding_encoder.",
    "mask_decoder.embedding_maskfeature.",
)
_VIT_BY_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_TINY_BY_KERNEL = {3: "vit_t", 1: "litemedsam"}


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a SAM checkpoint under their official names.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or anything ``torch.load(weights_only=True)`` accepts.

    Returns
    -------
    dict
        Names that begin with ``image_encoder.``, ``prompt_encoder.`` or ``mask_decoder.``, without
        the heads of other methods; floating-point tensors as float32.

    Raises
    ------
    WeightsError
        The file is absent, too large, damaged, unsafe, or holds no SAM.
    """
    check_no_device(path, WeightsError)
    if not path.is_file():
        raise WeightsError(f"There is no checkpoint file {path}.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise WeightsError(
            f"{path} has {size} bytes, more than the {MAX_BYTES} any checkpoint we know needs."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = {}
    for name, value in _unwrap(content).items():
        name = _official_name(str(name))
        wanted = name.startswith(_MODULES) and not name.startswith(_OTHER_HEADS)
        if wanted and isinstance(value, Tensor):
            state[name] = value.float() if value.is_floating_point() else value
    if not state:
        raise WeightsError(f"{path} holds no Segment Anything model.")
    return state


def detect(state: dict[str, Tensor], path: Path) -> str:
    """Return the registry name of the architecture the tensors belong to."""
    vit = state.get("image_encoder.patch_embed.proj.weight")
    tiny = state.get("image_encoder.patch_embed.seq.0.c.weight")
    found = None
    if vit is not None and vit.ndim == 4:
        found = _VIT_BY_WIDTH.get(vit.shape[0])
    elif tiny is not None and tiny.ndim == 4:
        found = _TINY_BY_KERNEL.get(tiny.shape[-1])
    if found is None:
        raise WeightsError(
            f"{path} is not a SAM of a known architecture; ViT-B, ViT-L, ViT-H, MobileSAM and "
            "LiteMedSAM checkpoints can be loaded."
        )
    return found


def assign(parts: SamParts, state: dict[str, Tensor], path: Path) -> None:
    """Make the tensors of a checkpoint the weights of a model, which may be on the meta device.

    Raises
    ------
    WeightsError
        A tensor is missing, surplus or of another shape.
    """
    modules = dict(zip(_MODULES, parts, strict=True))
    surplus = set(state)
    wrong: list[str] = []
    for module_name, module in modules.items():
        prefix = parts.encoder.state_prefix if module is parts.encoder else ""
        own = {}
        for key, expected in module.state_dict().items():
            name = module_name + key.removeprefix(prefix)
            surplus.discard(name)
            value = state.get(name)
            if value is None and name.endswith("num_batches_tracked"):
                value = torch.tensor(0)  # some exporters drop it, and nothing reads it
            if value is None:
                wrong.append(f"{name} is missing")
            elif value.shape != expected.shape:
                wrong.append(f"{name} is {tuple(value.shape)}, not {tuple(expected.shape)}")
            else:
                own[key] = value
        if not wrong:
            module.load_state_dict(own, assign=True)
    # a surplus tensor in the encoder means layers we do not have: features would be wrong
    wrong += [f"{name} is unknown" for name in sorted(surplus)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path} does not fit its architecture: {'; '.join(wrong[:3])}{more}.")


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as exc:
        raise WeightsError(f"{path} is damaged or no safetensors file ({exc}).") from exc


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        with path.open("rb") as file:
            is_pickle = file.read(2).startswith((b"PK", b"\x80"))  # torch's zip, or a bare pickle
        if not is_pickle:
            raise WeightsError(_damaged(path)) from exc
        raise WeightsError(
            f"{path} contains more than tensors and was not opened, because it could run code; "
            "ask its author for a .safetensors file or a plain state dict."
        ) from exc
    except Exception as exc:  # torch raises nearly anything for a damaged file
        raise WeightsError(_damaged(path)) from exc


def _damaged(path: Path) -> str:
    return f"{path} is damaged, incomplete or no checkpoint; delete it and download it again."


def _unwrap(content: Any) -> dict[Any, Any]:
    """Return the state dict inside the dictionaries people wrap it in."""
    for _ in range(3):
        inner = [content[key] for key in _WRAPPERS if isinstance(content, dict) and key in content]
        inner = [value for value in inner if isinstance(value, dict)]
        if not inner:
            break
        content = inner[0]
    return content if isinstance(content, dict) else {}


def _official_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name
