"""Names to methods, and what every method has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.errors import ConvLoRAError


class AdaptableEncoder(Protocol):
    """What methods ask of an image encoder, such as `backbones.Encoder`, which is a module."""

    channel_axis: int
    """Where the maps that blocks take and return have their channels."""

    stem_stride: int
    """Image pixels per token of the map before the first block."""

    @property
    def blocks(self) -> Sequence[Any]:
        """Attention blocks in order; each has ``.attn.qkv``."""

    @property
    def layout(self) -> Any:
        """Modules in the order of their use: ``stem``, ``steps`` and ``neck``."""

    def stem(self, images: Tensor) -> Tensor:
        """Compute the map before the first block, without position."""

    def add_position(self, x: Tensor) -> Tensor:
        """Add the position embedding to what `stem` returned."""

    def prefix(self, images: Tensor, split: int) -> Tensor:
        """Compute all that precedes block ``split``."""

    def suffix_steps(self, split: int) -> list[nn.Module]:
        """Blocks ``split`` and later, with what lies between them."""

    def run_step(self, step: nn.Module, x: Tensor) -> Tensor:
        """Compute one of the layout's steps."""

    def embed(self, x: Tensor) -> Tensor:
        """Take the last block's map through the neck."""

    def narrow_block(self, index: int, reduction: int) -> nn.Module:
        """Return a new, random block like block ``index``, but narrower."""

    def add_prompts(self, index: int, prompts: nn.Parameter) -> None:
        """Let the tokens of block ``index`` attend to these, too."""


@dataclass(frozen=True)
class Method:
    """One parameter-efficient method.

    Parameters
    ----------
    title
        Shown to people.
    inject
        Called with the encoder, the first block to adapt and the settings.
        Returns the adapted encoder: the same one, changed in place, or a module around it that
        has its ``forward(images)`` and, unless the stem is ``read``, ``prefix`` and ``suffix``.
    adapts_encoder
        False when the encoder stays frozen as a whole, so that its output can be cached.
    stem
        What happens to all that precedes the first block: it stays ``frozen``, is ``adapted``
        when every block is, or is ``read`` on every pass because the method needs the image. In
        the latter cases nothing is cached.
    merge
        Folds the method into copies of the frozen weights, in place; None where that cannot be.
    """

    title: str
    inject: Callable[[AdaptableEncoder, int, MethodConfig], Any]
    adapts_encoder: bool = True
    stem: Literal["frozen", "adapted", "read"] = "frozen"
    merge: Callable[[nn.Module], None] | None = None

    def split(self, first_block: int, n_blocks: int) -> int | None:
        """Return where the frozen half of the encoder ends; None where there is none."""
        if not self.adapts_encoder:
            return n_blocks
        live = self.stem == "read" or (self.stem == "adapted" and first_block == 0)
        return None if live else first_block


METHODS: dict[str, Method] = {}


def find_method(name: str) -> Method:
    """Return the method called `name`.

    Raises
    ------
    ConvLoRAError
        If there is none.
    """
    if name not in METHODS:
        raise ConvLoRAError(f"Unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def adapt_encoder(
    name: str, encoder: AdaptableEncoder, first_block: int, config: MethodConfig
) -> Any:
    """Put the method called `name` on `encoder`, in place.

    Parameters
    ----------
    encoder
        A `backbones.Encoder` whose parameters are frozen; it may share them with others.
    first_block
        The method acts on this block (0-based) and later ones. From 0, it acts on the stem too,
        if it ever does; from ``len(encoder.blocks)``, there is nothing to act on.

    Returns
    -------
    nn.Module
        The adapted encoder; what it trains has ``requires_grad=True``.

    Raises
    ------
    ConvLoRAError
        If no method has that name.
    """
    method = find_method(name)
    if first_block >= len(encoder.blocks):
        return encoder
    return method.inject(encoder, first_block, config)


def merge(name: str, encoder: nn.Module) -> None:
    """Fold the method called `name` into the weights it adapts; others' tensors stay as they are.

    Raises
    ------
    ConvLoRAError
        If no method has that name, or it is no fixed change of weights.
    """
    method = find_method(name)
    if method.merge is None:
        able = ", ".join(m.title for m in METHODS.values() if m.merge is not None)
        raise ConvLoRAError(
            f"{method.title} cannot be merged into the frozen weights, because it adds "
            f"computations of its own; keep the adapter file, or train with one of: {able}."
        )
    method.merge(encoder)
    encoder.requires_grad_(False)


def adapted_modules(encoder: Any, first_block: int) -> list[nn.Module]:
    """Blocks from `first_block` on and what lies between them; from 0 on, the stem as well."""
    stem: list[nn.Module] = encoder.layout.stem if first_block == 0 else []
    return stem + encoder.suffix_steps(first_block)


def replace(
    module: nn.Module, chosen: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> None:
    """Replace the chosen modules inside `module` by what `make` makes of them.

    Nothing inside a chosen module is looked at.
    """
    for name, child in list(module.named_children()):
        if chosen(child):
            setattr(module, name, make(child))
        else:
            replace(child, chosen, make)


def width(block: Any) -> int:
    """Channels of the maps an attention block takes and returns."""
    channels: int = block.attn.proj.out_features
    return channels


def pool_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """Average `tokens` (B, h, w, C) down to the grid of `like` (B, h', w', any)."""
    size = like.shape[1], like.shape[2]
    if tokens.shape[1:3] == size:
        return tokens
    return F.adaptive_avg_pool2d(tokens.movedim(-1, 1), size).movedim(1, -1)


def balance_loss(module: nn.Module) -> Tensor | float:
    """Sum of the routing losses that `module`'s layers left behind in their last forward pass.

    Returns
    -------
    Tensor or float
        Scalar; 0.0 where no layer routes.
    """
    found = (getattr(layer, "balance_loss", None) for layer in module.modules())
    losses = [loss for loss in found if isinstance(loss, Tensor)]
    return torch.stack(losses).sum() if losses else 0.0
