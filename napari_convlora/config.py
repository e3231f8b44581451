"""Settings and shared value types: frozen dataclasses and Literals, free of numpy and torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from napari_convlora.errors import InputError

MethodName = Literal[
    "decoder_only",
    "bitfit",
    "adapter",
    "sam_adapter",
    "vpt",
    "lst",
    "ssf",
    "lora",
    "conv_lora",
    "multi_scale",
    "fixed_scale",
]
HeadName = Literal["class_tokens", "classification_branch", "mask_token"]
PresetName = Literal["fast", "full"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
StartName = Literal["base", "installed"]
CLASSES_FILE = "classes.json"
"""Name of the class table beside exported masks; one of another table has its name before it."""

UNLABELLED = 0
"""Annotation value of a pixel nobody has labelled; ignored by loss and metric."""

MAX_CLASSES = 255
"""More classes than this is taken for an instance map offered as annotations."""


MAX_LABEL = 65535
"""Largest id a label image may hold; anything above is not a table of classes or instances."""


@dataclass(frozen=True)
class ClassInfo:
    """One row of the class table.

    Parameters
    ----------
    id
        Value in annotations and predictions, 1..255 (0 means unlabelled).
    name
        Shown to people.
    colour
        ``#rrggbb``.
    background
        Whether it is what remains where annotation is complete; true of one class at most.
    """

    id: int
    name: str
    colour: str
    background: bool = False


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a parameter-efficient method; a method ignores what it does not use.

    Parameters
    ----------
    rank, alpha
        Low-rank dimension r and scaling numerator: the update is ``alpha / rank * B A x``.
    scales
        One expert per scale ratio of Conv-LoRA (section 3.2) and multi-scale fusion.
    top_k
        Conv-LoRA's experts that act on each routed map, 1..len(scales).
    faithful
        Reproduce the Conv-LoRA layer the authors released (no task gradient to the gate).
    scale
        Scale ratio of the one expert of ``fixed_scale``.
    bottleneck
        Width of the bottlenecks of ``adapter``.
    prompts
        Learnt tokens per block of ``vpt``.
    reduction
        How many times narrower than the encoder the side network of ``lst`` is.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    scales: tuple[int, ...] = (1, 3, 5, 7)
    top_k: int = 1
    faithful: bool = False
    scale: int = 3
    bottleneck: int = 64
    prompts: int = 12
    reduction: int = 8

    def __post_init__(self) -> None:
        for name in ("rank", "scale", "bottleneck", "prompts", "reduction"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; set it to 1 or more.")
        if not self.scales or min(self.scales) < 1:
            raise InputError(f"scales is {self.scales}; give at least one, each 1 or more.")
        if not 1 <= self.top_k <= len(self.scales):
            raise InputError(
                f"top_k is {self.top_k}; set it to 1..{len(self.scales)}, as there are "
                f"{len(self.scales)} scales."
            )


@dataclass(frozen=True)
class ModelConfig:
    """What is put on a backbone, and where.

    Parameters
    ----------
    method, method_config
        Parameter-efficient method and its settings.
    first_block
        First encoder block (0-based) that the method adapts; blocks before it stay frozen and
        their output is cached. ``None`` takes the preset's choice for the backbone.
    head
        ``class_tokens``, ``classification_branch``, or ``mask_token`` for two classes.
    queries
        Query tokens of the classification branch.
    detail
        Whether the full-resolution detail branch is mixed with the head.
    plain_start
        Start the head from the pretrained decoder as it is, as the paper does; ``mask_token``
        always does.
    """

    method: MethodName = "conv_lora"
    method_config: MethodConfig = field(default_factory=MethodConfig)
    first_block: int | None = None
    head: HeadName = "class_tokens"
    queries: int = 16
    detail: bool = True
    plain_start: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """How one round is trained.

    Parameters
    ----------
    preset
        ``fast`` adapts the last blocks on cached features, ``full`` every block.
    max_steps, max_minutes
        Whichever comes first ends the round; ``None`` for ``max_minutes`` sets no limit.
    seed
        Of everything random in the round, 0..2147483647.
    device
        Where to train.
    start
        ``base`` learns all labels afresh from the backbone; ``installed`` goes on from the adapter
        that is installed.
    keep_uncorrected
        Whether what the adapter before said, and was not corrected, teaches the new one.
    batch, views
        Views per step, and how many are drawn for the round (their frozen features are kept).
    adapter_lr, decoder_lr, warmup
        Peak learning rates of the method's and of the decoder's parameters, and the steps that
        lead up to them; once both train, a cosine brings them down to zero.
    decoder_share, decoder_batch
        Part of the steps, at the start, that train decoder and head alone, with views per step.
        They see cached embeddings of the untouched encoder, so they cost little, and the method
        then starts from a decoder that already knows the classes.
    detail_steps
        Steps that fit the detail branch before the encoder is touched.
    score_every, patience
        Steps between scores, and how many without progress end the round.
    preview_seconds
        Time between previews of the adapted model; ``None`` shows the detail branch's only.
    """

    preset: PresetName = "fast"
    max_steps: int = 60
    max_minutes: float | None = None
    seed: int = 0
    device: DeviceName = "auto"
    start: StartName = "base"
    keep_uncorrected: bool = True
    batch: int = 1
    views: int = 24
    decoder_share: float = 0.4
    decoder_batch: int = 2
    adapter_lr: float = 1e-3
    decoder_lr: float = 1e-3
    warmup: int = 5
    detail_steps: int = 600
    score_every: int = 10
    patience: int = 40
    preview_seconds: float | None = None

    def __post_init__(self) -> None:
        """Check what not every source of random numbers would take."""
        if not 0 <= self.seed < 2**31:
            raise InputError(f"The seed is {self.seed}; choose one between 0 and {2**31 - 1}.")


def listed(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
