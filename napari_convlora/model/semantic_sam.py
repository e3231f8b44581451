"""SemanticSAM: backbone, method, decoder and head. The only place where they meet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.backbones import Backbone, Encoder
from napari_convlora.backbones.base import copy_module
from napari_convlora.config import ModelConfig
from napari_convlora.errors import AdapterError, InputError
from napari_convlora.model.detail_branch import DetailBranch
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.heads import ClassificationBranch, ClassTokens, HeadOutput, MaskToken
from napari_convlora.peft import adapt_encoder, balance_loss, find_method, merge


class SemanticSAM(nn.Module):
    """A frozen backbone with a trained method, decoder and head, and an optional detail branch.

    The encoder is split: `prefix` is frozen, so its features are computed once per view and kept;
    `suffix` holds everything that is trained. A method that adapts or reads what precedes the
    blocks leaves no frozen half: `split` is None, and the features are the normalised images.

    Parameters
    ----------
    backbone
        Its weights are shared, not copied, and never changed.
    config
        Method, head, first adapted block, detail branch.
    n_classes
        K.
    n_channels
        Channels of the images, for the detail branch.

    Raises
    ------
    InputError
        The head does not fit the number of classes.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, backbone: Backbone, config: ModelConfig, n_classes: int, n_channels: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone.sharing_copy()
        encoder = self.backbone.encoder
        shared = {id(t): t for t in [*encoder.parameters(), *encoder.buffers()]}
        self.frozen = copy_module(encoder, shared) if config.detail else None
        first = config.first_block
        first = backbone.spec.fast_first_block if first is None else first
        self.split = find_method(config.method).split(first, len(encoder.blocks))
        self.backbone.encoder = adapt_encoder(config.method, encoder, first, config.method_config)
        pretrained, plain = backbone.mask_decoder, config.plain_start
        if config.head == "class_tokens":
            self.head: nn.Module = ClassTokens(pretrained, n_classes, plain)
        elif config.head == "classification_branch":
            self.head = ClassificationBranch(pretrained, n_classes, config.queries, plain)
        elif n_classes == 2:
            self.head = MaskToken(pretrained)
        else:
            raise InputError(
                f"The head mask_token tells two classes apart, not {n_classes}; use class_tokens."
            )
        prompt_encoder: Any = backbone.prompt_encoder
        width = prompt_encoder.no_mask_embed.weight.shape[1]
        self.detail = DetailBranch(n_channels, width, n_classes) if config.detail else None
        spec = backbone.spec
        self.register_buffer("image_mean", torch.tensor(spec.pixel_mean)[:, None, None], False)
        self.register_buffer("image_std", torch.tensor(spec.pixel_std)[:, None, None], False)

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Compute the frozen features of `images` (B, 3, H, W), float32 in [0, 1]."""
        images = (images - self.image_mean) / self.image_std
        return images if self.split is None else self.backbone.encoder.prefix(images, self.split)

    def cached_prefix(self, pixels: Tensor, cache: FeatureCache | None) -> Tensor:
        """Frozen features (without batch axis) of `pixels` (3, H, W), looked up by content.

        The key is the hash of the very pixels the backbone sees, so normaliser, scale and
        augmentation need no bookkeeping and a stale entry cannot be taken for a fresh one.
        """
        if cache is None or self.split is None:
            return self.prefix(pixels[None].to(self.image_mean.device))[0]
        return self._cached(
            pixels, self.split, cache, lambda: self.prefix(pixels[None].to(self.image_mean.device))
        )

    @torch.no_grad()
    def cached_embedding(self, pixels: Tensor, cache: FeatureCache, seed: int) -> Tensor:
        """Embedding (without batch axis) of `pixels` (3, H, W) by a model that has not trained.

        `seed` is what the method's weights were drawn with: some change the embedding from the
        start.
        """
        what = self.config, seed
        return self._cached(
            pixels, what, cache, lambda: self.embed(self.cached_prefix(pixels, cache)[None])
        )

    @torch.no_grad()
    def cached_context(self, pixels: Tensor, cache: FeatureCache) -> Tensor:
        """Embedding (without batch axis) of `pixels` (3, H, W) by the backbone without a method.

        The detail branch reads it; a model without that branch has none.
        """
        frozen = self.frozen
        assert frozen is not None
        return self._cached(
            pixels,
            "context",
            cache,
            lambda: self._embed(frozen, self.cached_prefix(pixels, cache)[None]),
        )

    def _cached(
        self, pixels: Tensor, what: Hashable, cache: FeatureCache, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Look up `what` is known of `pixels`, or compute it (with a batch axis) and keep it."""
        key = self._key(pixels, what)
        found = cache.get(key)
        if found is None:
            found = compute()[0]
            cache.put(key, found)
        return found.to(self.image_mean.device)

    def _key(self, pixels: Tensor, what: Hashable) -> Hashable:
        digest = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()
        spec = self.backbone.spec  # an old adapter may normalise otherwise than its checkpoint
        statistics = spec.pixel_mean, spec.pixel_std
        return spec.name, self.backbone.checkpoint_sha256, statistics, what, digest

    def suffix(self, features: Tensor) -> HeadOutput:
        """Score what `prefix` returned; logits are (B, K, h, w) at the head's resolution."""
        return self.decode(self.embed(features))

    def embed(self, features: Tensor) -> Tensor:
        """Turn what `prefix` returned into image embeddings (B, C, h, w) with the method."""
        return self._embed(self.backbone.encoder, features)

    def _embed(self, encoder: Any, features: Tensor) -> Tensor:
        return encoder(features) if self.split is None else encoder.suffix(features, self.split)

    def checkpoint_blocks(self) -> None:
        """Keep little of the encoder's blocks for the gradient, and compute them again instead."""
        for module in self.backbone.encoder.modules():
            if isinstance(module, Encoder):
                module.checkpointing = True

    def decode(self, embedding: Tensor) -> HeadOutput:
        """Score image embeddings (B, C, h, w) with decoder and head."""
        return self.head(embedding, *self.no_prompt(embedding))

    def no_prompt(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Positional encoding and no-mask embedding for an embedding (B, C, h, w)."""
        return self.backbone.no_prompt((embedding.shape[-2], embedding.shape[-1]))

    def forward(self, images: Tensor) -> Tensor:
        """Score `images` (B, 3, H, W), float32 in [0, 1]; logits are (B, K, H, W)."""
        logits = self.suffix(self.prefix(images)).logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def balance_loss(self) -> Tensor | float:
        """Return the routing losses of the last training forward pass, summed over layers."""
        return balance_loss(self.backbone.encoder)

    def merge(self) -> None:
        """Fold the method into copies of the weights it adapts; only the head stays trained.

        Raises
        ------
        ConvLoRAError
            If the method is no fixed change of weights.
        """
        merge(self.config.method, self.backbone.encoder)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def adapter_state(self) -> dict[str, Tensor]:
        """Copy of everything an adapter file holds: trained parameters and the detail branch."""
        state = {name: p.detach().cpu().clone() for name, p in self.trained().items()}
        if self.detail is not None:
            detail = self.detail.state_dict(prefix="detail.")
            state |= {name: tensor.detach().cpu().clone() for name, tensor in detail.items()}
        return state

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `adapter_state` returned.

        Raises
        ------
        AdapterError
            If names or shapes are not those of this model.
        """
        wanted = self.adapter_state()
        odd = sorted(set(wanted) ^ set(state)) or [
            name for name in wanted if wanted[name].shape != state[name].shape
        ]
        if odd:
            raise AdapterError(
                f"The adapter does not fit its own settings (first mismatch: {odd[0]}); "
                "the file is damaged, export it again."
            )
        self.load_state_dict(state, strict=False)
