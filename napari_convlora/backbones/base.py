"""What the rest of the package may assume about a frozen Segment Anything model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from napari_convlora.backbones.registry import BackboneSpec


class Encoder(nn.Module):
    """Image encoder that can be cut in two before any of its attention blocks.

    ``suffix(prefix(x, k), k)`` equals ``forward(x)`` for every ``k`` in ``0..len(blocks)``, so the
    part before the first adapted block can be computed once and cached.
    """

    state_prefix: str = ""
    """Put before a checkpoint's ``image_encoder.`` names to get the names in this module."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Attention blocks in order; each has ``.attn.qkv``, called with (N, h, w, C)."""
        raise NotImplementedError

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
        raise NotImplementedError

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
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images as (B, C, H / stride, W / stride)."""
        return self.suffix(self.prefix(images, 0), 0)


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
