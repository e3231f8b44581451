"""The adapter: everything a round trained, with all that is needed to use it, in one file."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from napari_convlora.backbones import REGISTRY, Backbone
from napari_convlora.config import ClassInfo, HeadName, MethodConfig, MethodName, ModelConfig
from napari_convlora.errors import AdapterError, InputError
from napari_convlora.files.atomic import atomic_write, check_no_device
from napari_convlora.files.checked_json import number, whole
from napari_convlora.images.normalise import Normalizer
from napari_convlora.labels.classes import parse_classes
from napari_convlora.model.semantic_sam import SemanticSAM

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
_KEY = "napari_convlora"
_HASH_KEY = "napari_convlora_sha256"
_MAX_BYTES = 512 * 1024**2
MAX_HEADER = 1024**2
"""Bytes of a header at most."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Parameters
    ----------
    backbone_name, backbone_sha256
        Backbone it was trained on, and the hash of that checkpoint ("" for random weights).
    model
        Method, head and their settings.
    classes
        Class of every logit, in order.
    normalizer, pixel_scale
        How images are brought to the model, the same in training and prediction.
    state
        Trained tensors by name, float32 on the CPU.
    summary
        Training summary: steps, seconds, score and the like, JSON-compatible.
    version
        Version of the package that wrote it.
    pixel_mean, pixel_std
        How pixels were normalised for the backbone, per channel (RGB) in units of a [0, 1] image;
        None for as its checkpoint says.
    remark
        A sentence on the file it was read from, if there is something to say.
    """

    backbone_name: str
    backbone_sha256: str
    model: ModelConfig
    classes: tuple[ClassInfo, ...]
    normalizer: Normalizer
    pixel_scale: float
    state: dict[str, Tensor] = field(repr=False)
    summary: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    pixel_mean: tuple[float, float, float] | None = None
    pixel_std: tuple[float, float, float] | None = None
    remark: str = ""

    def fits(self, backbone: Backbone) -> bool:
        """Whether `backbone` is the one it was trained on, whatever that is called now."""
        if self.backbone_sha256:
            return backbone.checkpoint_sha256 == self.backbone_sha256
        return backbone.spec.name == self.backbone_name

    def build(self, backbone: Backbone, device: str | torch.device = "cpu") -> SemanticSAM:
        """Put the adapter on its backbone; the model is in eval mode on `device`.

        Raises
        ------
        AdapterError
            If `backbone` is not the one the adapter was trained on.
        """
        if not self.fits(backbone):
            raise AdapterError(
                f"This adapter was trained on {self.backbone_name} "
                f"(checkpoint {self.backbone_sha256[:12] or 'without hash'}), not on "
                f"{backbone.spec.name} ({backbone.checkpoint_sha256[:12] or 'without hash'}); "
                "load it together with the backbone it was trained on."
            )
        if self.pixel_mean is not None and self.pixel_std is not None:
            backbone = backbone.normalised_by(self.pixel_mean, self.pixel_std)
        n_channels = len(self.normalizer.low)
        model = SemanticSAM(backbone, self.model, len(self.classes), n_channels)
        model.load_adapter_state(self.state)
        return model.to(device).eval()

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, atomically.

        Raises
        ------
        InputError
            If the file cannot be written; an older file of that name stays whole.
        """
        path = Path(path)
        header = {
            "format": FORMAT_VERSION,
            "package": self.version,
            "backbone": {
                "name": self.backbone_name,
                "sha256": self.backbone_sha256,
                "pixel_mean": self.pixel_mean,
                "pixel_std": self.pixel_std,
            },
            "model": asdict(self.model),
            "classes": [asdict(c) for c in self.classes],
            "normalizer": asdict(self.normalizer),
            "pixel_scale": self.pixel_scale,
            "summary": self.summary,
        }
        text = json.dumps(header)
        state = {name: tensor.contiguous() for name, tensor in self.state.items()}
        content = safetensors.torch.save(state, {_KEY: text, _HASH_KEY: _sha256(text, state)})
        with atomic_write(path) as file:
            file.write(content)
        return path

    def detail_alone(self) -> Adapter | None:
        """Return a small adapter of the detail branch only, to teach another; None without one."""
        state = {n: tensor for n, tensor in self.state.items() if n.startswith("detail.")}
        model = replace(self.model, method="decoder_only")  # of the encoder there is nothing in it
        return replace(self, model=model, state=state) if state else None

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read an adapter file; nothing in it is ever executed.

        Raises
        ------
        AdapterError
            If the file is absent, no file, damaged, not an adapter, or of a newer format.
        """
        path = Path(path)
        check_no_device(path, AdapterError)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise AdapterError(
                f"There is no adapter file {path}; check the path and name."
            ) from error
        if size > _MAX_BYTES:
            raise AdapterError(f"{path.name} is too large for an adapter; choose another file.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                text, promised = metadata.get(_KEY), metadata.get(_HASH_KEY)
                if text is None:
                    raise AdapterError(
                        f"{path.name} holds tensors but is no napari-convlora adapter; "
                        "choose a file that was exported as an adapter."
                    )
                header = _parse_header(text, path.name)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{path.name} is damaged or is not an adapter file; export the adapter again."
            ) from error
        if promised is not None and promised != _sha256(text, state):
            raise AdapterError(
                f"{path.name} is damaged: its content is not what was written (its SHA-256 "
                "differs); copy or export it again."
            )
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise AdapterError(
                f"{path.name} is damaged: it holds values that are no numbers; export it again."
            )
        try:
            adapter = cls(state=state, **_from_header(header))
            _check_experts(adapter.model, size)
        except (KeyError, TypeError, ValueError, OverflowError, InputError) as error:
            raise AdapterError(
                f"The header of {path.name} is damaged ({error}); export the adapter again."
            ) from error
        if promised is None:
            remark = (
                f"{path.name} holds no SHA-256, as earlier versions wrote none, so damage to it "
                "would not be noticed; export it again to add one."
            )
            logger.warning(remark)
            adapter = replace(adapter, remark=remark)
        return adapter


def _sha256(text: str, state: dict[str, Tensor]) -> str:
    """Return a hash of everything an adapter file holds: its header, and its tensors by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parse_header(text: str, name: str) -> dict[str, Any]:
    try:
        header = json.loads(text) if len(text) <= MAX_HEADER else None
        version = int(header["format"])  # type: ignore[index]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"The header of {name} is damaged; export the adapter again.") from error
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{name} was written by a newer napari-convlora (adapter format {version}, this "
            f"version reads up to {FORMAT_VERSION}); update with "
            "`pip install --upgrade napari-convlora`."
        )
    return header  # type: ignore[return-value]


def _from_header(header: dict[str, Any]) -> dict[str, Any]:
    """Check every setting: a stranger's header may claim anything."""
    model = dict(header["model"])
    method = dict(model.pop("method_config"))
    method["scales"] = tuple(whole(s, 1, 64) for s in method["scales"])
    method["rank"] = whole(method["rank"], 1, 1024)
    method["top_k"] = whole(method["top_k"], 1, len(method["scales"]))
    method["alpha"] = number(method["alpha"], -1e6, 1e6)
    for name in ("scale", "bottleneck", "prompts", "reduction"):
        if name in method:  # older files lack them
            method[name] = whole(method[name], 1, 64 if name == "scale" else 1024)
    model["queries"] = whole(model["queries"], 1, 1024)
    if model["first_block"] is not None:
        model["first_block"] = whole(model["first_block"], 0, 1024)
    if model["method"] not in get_args(MethodName) or model["head"] not in get_args(HeadName):
        raise ValueError(f"unknown method {model['method']!r:.40} or head {model['head']!r:.40}")
    low, high = (
        tuple(number(v, -1e300, 1e300) for v in header["normalizer"][end])
        for end in ("low", "high")
    )
    if not 0 < len(low) == len(high) <= 4096 or any(b <= a for a, b in zip(low, high, strict=True)):
        raise ValueError("its normaliser has no range")
    backbone = header["backbone"]
    # Before it was stored, what a name in the registry stood for decided.
    row = REGISTRY.get(backbone["name"])
    mean = backbone.get("pixel_mean", row and row.pixel_mean)
    std = backbone.get("pixel_std", row and row.pixel_std)
    return {
        "backbone_name": str(backbone["name"])[:200],
        "backbone_sha256": str(backbone["sha256"]),
        "pixel_mean": None if mean is None else _per_channel(mean, -1e3, 1e3),
        "pixel_std": None if std is None else _per_channel(std, 1e-3, 1e3),
        "model": ModelConfig(**model, method_config=MethodConfig(**method)),
        "classes": parse_classes({"classes": header["classes"]}, "its class table"),
        "normalizer": Normalizer(low, high),
        "pixel_scale": number(header["pixel_scale"], 1e-3, 16),
        "summary": dict(header["summary"]),
        "version": str(header["package"]),
    }


def _check_experts(model: ModelConfig, size: int) -> None:
    """Refuse experts that `size` bytes cannot hold, before anything of their size is allocated."""
    config = model.method_config
    if model.method in ("conv_lora", "multi_scale"):
        weights = len(config.scales) * config.rank**2 * 9
        if 4 * weights > size:
            raise ValueError(f"its experts have {weights} weights, more than the file holds")


def _per_channel(values: Any, low: float, high: float) -> tuple[float, float, float]:
    red, green, blue = (number(value, low, high) for value in values)
    return red, green, blue
