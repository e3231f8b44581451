"""What the rest of the package may assume about a frozen Segment Anything model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from napari_convlora.backbones.registry import BackboneSpec
from napari_convlora.errors import InputError

M = TypeVar("M", bound=nn.Module)


def copy_module(module: M, known: dict[int, Any] | None = None) -> M:
    """Copy a module as `copy.deepcopy` does, in a fraction of the time.

    Parameters
    ----------
    module
        What to copy, with all that is in it.
    known
        By `id` of what occurs in `module`, what the copy has in its place; copies are added.
    """
    known = {} if known is None else known
    if id(module) in known:
        found: M = known[id(module)]
        return found
    twin = known[id(module)] = module.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            copied: Any = {
                key: None if child is None else copy_module(child, known)
                for key, child in value.items()
            }
        elif isinstance(value, dict) and not value:  # a dozen tables of hooks in every module
            copied = type(value)()
        else:
            copied = copy.deepcopy(value, known)
        vars(twin)[name] = copied
    return twin


class Layout(NamedTuple):
    """The modules of an image encoder in the order they act.

    Parameters
    ----------
    stem
        Everything before the first attention block.
    steps
        Attention blocks and what lies between them; the first is the first block.
    neck
        Takes the last (B, C, h, w) map to the embedding.
    """

    stem: list[nn.Module]
    steps: list[nn.Module]
    neck: nn.Module


class Encoder(nn.Module):
    """Image encoder that can be cut in two before any of its attention blocks.

    ``suffix(prefix(x, k), k)`` equals ``forward(x)`` for every ``k`` in ``0..len(blocks)``, so the
    part before the first adapted block can be computed once and cached.
    """

    state_prefix: str = ""
    """Put before a checkpoint's ``image_encoder.`` names to get the names in this module."""

    channel_axis: int = -1
    """Where the maps that blocks take and return have their channels."""

    stride: int
    """Image pixels per embedding token; both sides of an image must be multiples of it."""

    stem_stride: int
    """Image pixels per token of the map before the first block."""

    checkpointing: bool = False
    """Whether a gradient computes blocks again, so that little of them is kept for it."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Attention blocks in order; each has ``.attn.qkv``, called with (N, h, w, C)."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """Stem, steps and neck."""
        raise NotImplementedError

    def stem(self, images: Tensor) -> Tensor:
        """Compute the map before the first block, without position.

        Parameters
        ----------
        images
            (B, 3, H, W) float32, already normalised with the backbone's mean and deviation.

        Raises
        ------
        InputError
            If a side is no multiple of `stride`.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride or not height * width:
            raise InputError(
                f"The image is {height} x {width} px; both sides must be multiples of "
                f"{self.stride} px."
            )
        for module in self.layout.stem:
            images = module(images)
        return images

    def add_position(self, x: Tensor) -> Tensor:
        """Add the position embedding to what `stem` returned; some encoders have none."""
        return x

    def suffix_steps(self, split: int) -> list[nn.Module]:
        """Blocks ``split`` and later, with what lies between them."""
        steps = self.layout.steps
        return steps[steps.index(self.blocks[split]) :] if split < len(self.blocks) else []

    def prefix(self, images: Tensor, split: int) -> Tensor:
        """Compute everything before attention block ``split``.

        Parameters
        ----------
        images
            (B, 3, H, W) float32, already normalised with the backbone's mean and deviation.
        split
            0..len(blocks).

        Returns
        -------
        Tensor
            Batch first; any other layout, meant for `suffix` with the same ``split`` only.
        """
        x = self.add_position(self.stem(images))
        steps = self.layout.steps
        for step in steps[: len(steps) - len(self.suffix_steps(split))]:
            x = step(x)
        return x

    def suffix(self, features: Tensor, split: int) -> Tensor:
        """Compute ``blocks[split:]`` and the neck.

        Parameters
        ----------
        features
            What `prefix` returned for the same ``split``.
        split
            0..len(blocks).

        Returns
        -------
        Tensor
            (B, C, H / stride, W / stride) float32; C is 256 in every published checkpoint.
        """
        for step in self.suffix_steps(split):
            features = self.run_step(step, features)
        return self.embed(features)

    def run_step(self, step: nn.Module, x: Tensor) -> Tensor:
        """Compute one of the `layout`'s steps; gradients are the same with `checkpointing`."""
        if self.checkpointing and torch.is_grad_enabled():
            x = checkpoint(
                step, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(step))
            )
            return x
        x = step(x)
        return x

    def embed(self, x: Tensor) -> Tensor:
        """Take the last block's map through the neck."""
        embedding: Tensor = self.layout.neck(x.movedim(self.channel_axis, 1))
        return embedding

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images as (B, C, H / stride, W / stride)."""
        return self.suffix(self.prefix(images, 0), 0)

    def add_prompts(self, index: int, prompts: nn.Parameter) -> None:
        """Let every window of a block attend to further tokens, in place.

        They enter as the block's own tokens do, normalised and projected to keys and values, but
        they have no position (their bias is zero) and ask nothing.

        Parameters
        ----------
        index
            Of the block.
        prompts
            (p, C), C being the block's width.
        """
        raise NotImplementedError

    def narrow_block(self, index: int, reduction: int) -> nn.Module:
        """Return a new, random block like block ``index``, with heads ``reduction`` times narrower.

        It takes maps of the same layout.
        """
        raise NotImplementedError


@contextmanager
def _again(step: nn.Module) -> Iterator[None]:
    """Forget the routing losses of a second pass, which would keep the maps of every block."""
    try:
        yield
    finally:
        for layer in step.modules():
            if isinstance(getattr(layer, "balance_loss", None), Tensor):
                layer.balance_loss = None  # type: ignore[assignment]


class SamParts(NamedTuple):
    """The three modules that make a SAM, before weights are loaded."""

    encoder: Encoder
    prompt_encoder: nn.Module
    mask_decoder: nn.Module


class Backbone(nn.Module):
    """Frozen Segment Anything model: no parameter of it requires a gradient.

    Nothing in it depends on the training flag (there is no dropout, and batch normalisation always
    uses the stored statistics), so `train` is left to reach adapters placed inside the encoder.

    Parameters
    ----------
    spec
        Name, input size, normalisation and licence.
    parts
        Encoder, prompt encoder and mask decoder.
    checkpoint_sha256
        SHA-256 of the file the weights came from, ``""`` for random weights.
    """

    def __init__(self, spec: BackboneSpec, parts: SamParts, checkpoint_sha256: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_sha256 = checkpoint_sha256
        self.encoder = parts.encoder
        self.prompt_encoder = parts.prompt_encoder
        self.mask_decoder = parts.mask_decoder
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images as (B, C, H / stride, W / stride)."""
        embedding: Tensor = self.encoder(images)
        return embedding

    def normalised_by(
        self, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Backbone:
        """Return the same backbone for pixels of another mean and deviation."""
        other = copy.copy(self)
        other.spec = replace(self.spec, pixel_mean=mean, pixel_std=std)
        return other

    def sharing_copy(self) -> Backbone:
        """Copy the modules but share their tensors, so that the copy can be changed or moved."""
        # New Parameter objects on the same storage: moving the copy to a device swaps the data of
        # its own ones only, and leaves this backbone (and other copies) where they are.
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.parameters()}
        return copy_module(self, shared | {id(b): b for b in self.buffers()})

    @torch.no_grad()
    def no_prompt(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what the mask decoder needs besides the image when nothing is prompted.

        Parameters
        ----------
        size
            Height and width of the embedding in tokens.

        Returns
        -------
        tuple
            Positional encoding of the image and dense "no mask" embedding, (1, C, h, w) each.
        """
        prompt_encoder: Any = self.prompt_encoder
        matrix: Tensor = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        # the encoding multiplies coordinates by large frequencies: half precision destroys it
        with torch.autocast(matrix.device.type, enabled=False):
            image_pe: Tensor = prompt_encoder.pe_layer(size)[None]
        no_mask: Tensor = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return image_pe, no_mask.expand(1, -1, *size)
