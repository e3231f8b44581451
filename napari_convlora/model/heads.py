"""Heads: what turns an image embedding into class scores, built on SAM's own mask decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from napari_convlora.backbones.base import copy_module

# The pretrained token and hypernetwork say "the object", the same for every class, with logits in
# the tens. Unequal tokens, a damped hypernetwork and a fast linear probe let classes part within
# tens of steps; without them two classes often stay merged for a whole round.
_TOKEN_NOISE = 1.0
_HYPER_GAIN = 0.1
_PROBE_GAIN = 30.0


@dataclass(frozen=True)
class HeadOutput:
    """What a head returns.

    Parameters
    ----------
    logits
        Class scores (B, K, h, w); softmax over K gives probabilities.
    masks, queries
        Only for the classification branch: mask logits (B, Q, h, w) and class logits
        (B, Q, K + 1) of every query, the last class being "no object".
    """

    logits: Tensor
    masks: Tensor | None = None
    queries: Tensor | None = None

    def single(self) -> HeadOutput:
        """Return the same in single precision."""
        masks, queries = (None if x is None else x.float() for x in (self.masks, self.queries))
        return HeadOutput(self.logits.float(), masks, queries)


class TokenDecoder(nn.Module):
    """SAM's mask decoder without prompts, for a batch of images and any number of mask tokens.

    The transformer, the upscaling and the first mask's hypernetwork start from the pretrained
    decoder. All tokens start near the pretrained single-mask token; a little noise tells them
    apart, as they share one hypernetwork. Each mask also has a gain and a linear probe of the
    upscaled map. A plain start does without noise, gain and probe.

    Parameters
    ----------
    pretrained
        `MaskDecoder` of `segment_anything`; copied, not changed.
    n_tokens
        Number of masks.
    plain
        Start from the pretrained decoder exactly, as the paper does: every mask is at first the
        one SAM returns for an image without prompts.
    """

    first: Tensor

    def __init__(self, pretrained: Any, n_tokens: int, plain: bool = False) -> None:
        super().__init__()
        self.transformer = copy_module(pretrained.transformer)
        self.output_upscaling = copy_module(pretrained.output_upscaling)
        self.hypernetwork = copy_module(pretrained.output_hypernetworks_mlps[0])
        self.iou_token = nn.Parameter(pretrained.iou_token.weight.detach().clone())
        first = pretrained.mask_tokens.weight.detach()[:1].clone()
        self.register_buffer("first", first, persistent=False)
        noise = torch.randn(n_tokens, first.shape[1], device=first.device) * first.std()
        self.mask_tokens = nn.Parameter(first + (0.0 if plain else _TOKEN_NOISE) * noise)
        channels = self.hypernetwork.layers[-1].out_features
        self.gain = self.probe = None
        if not plain:
            self.gain = nn.Parameter(torch.full((n_tokens, 1), _HYPER_GAIN, device=first.device))
            self.probe = nn.Parameter(torch.zeros(n_tokens, channels, device=first.device))
        self.requires_grad_(True)

    def forward(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Decode an image embedding.

        Parameters
        ----------
        embedding
            (B, C, h, w), from the encoder.
        image_pe, dense
            Constant positional encoding and no-mask embedding, each (1, C, h, w).

        Returns
        -------
        masks, tokens : Tensor
            Mask logits (B, n_tokens, 4h, 4w) and the decoded mask tokens (B, n_tokens, C).
        """
        upscaled, kernels, decoded = self.decode(embedding, image_pe, dense, self.mask_tokens)
        if self.gain is not None and self.probe is not None:
            kernels = self.gain * kernels + _PROBE_GAIN * self.probe
        return torch.einsum("bnc,bchw->bnhw", kernels, upscaled), decoded

    def decode(
        self, embedding: Tensor, image_pe: Tensor, dense: Tensor, mask_tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Upscaled map (B, D, 4h, 4w), SAM's kernels on it (B, n_tokens, D), decoded tokens."""
        batch, channels, height, width = embedding.shape
        tokens = torch.cat([self.iou_token, mask_tokens]).expand(batch, -1, -1)
        decoded, source = self.transformer(
            embedding + dense, image_pe.expand(batch, -1, -1, -1), tokens
        )
        source = source.transpose(1, 2).reshape(batch, channels, height, width)
        upscaled = self.output_upscaling(source)
        return upscaled, self.hypernetwork(decoded[:, 1:]), decoded[:, 1:]


class ClassTokens(nn.Module):
    """One mask token per class, compared by a softmax at every pixel; fits partial labels.

    Parameters
    ----------
    pretrained
        `MaskDecoder` of `segment_anything`; copied.
    n_classes
        K.
    plain
        See `TokenDecoder`.
    """

    def __init__(self, pretrained: Any, n_classes: int, plain: bool = False) -> None:
        super().__init__()
        self.decoder = TokenDecoder(pretrained, n_classes, plain)
        self.bias = nn.Parameter(torch.zeros(n_classes))

    @torch.no_grad()
    def evidence(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> Tensor:
        """Return what classes can be read from at the start: SAM's mask, and the upscaled map.

        Returns
        -------
        Tensor
            (B, 1 + D, 4h, 4w).
        """
        first = self.decoder.first.expand_as(self.decoder.mask_tokens)
        upscaled, kernels, _ = self.decoder.decode(embedding, image_pe, dense, first)
        mask = torch.einsum("bc,bchw->bhw", kernels[:, 0], upscaled)
        return torch.cat([mask[:, None], upscaled], dim=1)

    @torch.no_grad()
    def begin(self, weights: Tensor, bias: Tensor) -> None:
        """Start from a linear reading of `evidence`: logits are ``weights @ evidence + bias``.

        Parameters
        ----------
        weights
            (K, 1 + D).
        bias
            (K,).
        """
        assert self.decoder.gain is not None
        assert self.decoder.probe is not None
        self.decoder.mask_tokens.copy_(self.decoder.first.expand_as(self.decoder.mask_tokens))
        self.decoder.gain.copy_(weights[:, :1])
        self.decoder.probe.copy_(weights[:, 1:] / _PROBE_GAIN)
        self.bias.copy_(bias)

    def forward(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> HeadOutput:
        """Score an embedding (B, C, h, w); logits are (B, K, 4h, 4w)."""
        masks, _ = self.decoder(embedding, image_pe, dense)
        return HeadOutput(masks + self.bias[:, None, None])


class MaskToken(nn.Module):
    """The paper's binary head: SAM's single mask token, and a sigmoid (section 3.3).

    A softmax over the logits (0, mask) of background and object is that sigmoid, so two classes
    are scored like any others.

    Parameters
    ----------
    pretrained
        `MaskDecoder` of `segment_anything`; copied.
    """

    def __init__(self, pretrained: Any) -> None:
        super().__init__()
        self.decoder = TokenDecoder(pretrained, 1, plain=True)

    def forward(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> HeadOutput:
        """Score an embedding (B, C, h, w); logits are (B, 2, 4h, 4w)."""
        mask, _ = self.decoder(embedding, image_pe, dense)
        return HeadOutput(torch.cat([torch.zeros_like(mask), mask], dim=1))


class ClassificationBranch(nn.Module):
    """The paper's multi-class head: query tokens with masks and a class each (section 3.3).

    A pixel's score for class c is ``sum_q softmax(class_q)[c] * sigmoid(mask_q)``, without the
    "no object" class; `HeadOutput.logits` is its logarithm.

    Parameters
    ----------
    pretrained
        `MaskDecoder` of `segment_anything`; copied.
    n_classes
        K.
    n_queries
        Q, at least the number of classes that can appear in one image.
    plain
        See `TokenDecoder`; the queries start equal, and matching tells them apart.
    """

    def __init__(
        self, pretrained: Any, n_classes: int, n_queries: int, plain: bool = False
    ) -> None:
        super().__init__()
        self.decoder = TokenDecoder(pretrained, n_queries, plain)
        self.classifier = nn.Linear(self.decoder.mask_tokens.shape[1], n_classes + 1)

    def forward(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> HeadOutput:
        """Score an embedding (B, C, h, w); logits are (B, K, 4h, 4w)."""
        masks, tokens = self.decoder(embedding, image_pe, dense)
        queries = self.classifier(tokens)
        shares = queries.softmax(-1)[..., :-1]
        scores = torch.einsum("bqk,bqhw->bkhw", shares, masks.sigmoid())
        return HeadOutput(scores.clamp_min(1e-6).log(), masks, queries)
