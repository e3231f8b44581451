"""ViT-B, -L and -H from `segment_anything`, whose package import we must avoid.

``import segment_anything`` needs torchvision, which is not always installable next to a CPU build
of torch; ``segment_anything.modeling`` needs torch only. It is loaded under a private name, so that
another plugin that imports segment_anything gets the whole, ordinary package.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_convlora.backbones.attention import MapAttention
from napari_convlora.backbones.base import Encoder, Layout, SamParts
from napari_convlora.backbones.decoder_attention import DecoderAttention

_ALIAS = "_napari_convlora_sam_modeling"
_LOCK = Lock()


def modeling() -> Any:
    """Return the module `segment_anything.modeling`, loaded without its package's ``__init__``."""
    with _LOCK:
        if _ALIAS in sys.modules:
            return sys.modules[_ALIAS]
        package = find_spec("segment_anything")  # finds a top-level package without running it
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(
                "The package segment_anything is missing; run `pip install segment-anything`.",
                name="segment_anything",
            )
        root = Path(package.submodule_search_locations[0]) / "modeling"
        spec = spec_from_file_location(
            _ALIAS, root / "__init__.py", submodule_search_locations=[str(root)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[_ALIAS] = module  # its relative imports look the alias up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[_ALIAS]
            raise
        return module


@dataclass(frozen=True)
class ViTSize:
    """Sizes of a SAM with a plain ViT encoder; the defaults are those of every published one.

    Parameters
    ----------
    embed_dim, depth, heads
        Of the encoder.
    global_blocks
        Blocks that attend to the whole image; the others attend within windows.
    image_size, patch_size, window
        Side of the pretraining image and of a patch in pixels, of a window in tokens.
    out_dim
        Channels of the embedding and of the mask decoder.
    """

    embed_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    window: int = 14
    out_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    mask_in_chans: int = 16


VIT_SIZES: dict[str, ViTSize] = {
    "vit_b": ViTSize(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": ViTSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": ViTSize(1280, 32, 16, (7, 15, 23, 31)),
}


class ViTEncoder(Encoder):
    """SAM's `ImageEncoderViT`, for any image size and cut in two before any block.

    Maps are (B, h, w, C).
    """

    state_prefix = "vit."

    def __init__(self, vit: Any, patch_size: int) -> None:
        super().__init__()
        self.vit = vit
        for block in vit.blocks:
            _fuse(block)
        self.stride = self.stem_stride = patch_size

    @property
    def blocks(self) -> list[nn.Module]:
        """Attention blocks in order."""
        return list(self.vit.blocks)

    @property
    def layout(self) -> Layout:
        """See `Encoder.layout`."""
        return Layout([self.vit.patch_embed], self.blocks, self.vit.neck)

    def add_position(self, x: Tensor) -> Tensor:
        """Add the position embedding, resized to the map's token grid."""
        position: Tensor = self.vit.pos_embed
        if position.shape[1:3] != x.shape[1:3]:
            resized = F.interpolate(
                position.permute(0, 3, 1, 2), size=x.shape[1:3], mode="bicubic", align_corners=False
            )
            position = resized.permute(0, 2, 3, 1)
        # Patches come channels first in memory; every block would copy them to normalise them.
        return x.contiguous() + position

    def add_prompts(self, index: int, prompts: nn.Parameter) -> None:
        """Give the block's attention further keys; see `Encoder.add_prompts`."""
        block = self.vit.blocks[index]
        block.attn.prompts, block.attn.prompt_norm = prompts, block.norm1

    def narrow_block(self, index: int, reduction: int) -> nn.Module:
        """Return a narrower, new block; see `Encoder.narrow_block`."""
        block = self.vit.blocks[index]
        attn = block.attn
        # a table of relative positions has 2 n - 1 rows for n tokens
        rows, columns = ((len(table) + 1) // 2 for table in (attn.rel_pos_h, attn.rel_pos_w))
        narrow = modeling().image_encoder.Block(
            dim=attn.num_heads * max(1, attn.proj.in_features // attn.num_heads // reduction),
            num_heads=attn.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=attn.window,
            input_size=(rows, columns),
        )
        return _fuse(narrow)


def _fuse(block: Any) -> Any:
    """Let a block of `segment_anything` attend by `MapAttention`, in place."""
    interpolate = modeling().image_encoder.get_rel_pos
    block.attn = MapAttention(block.attn, block.window_size, interpolate)
    block.window_size = 0  # the attention makes the windows now
    return block


def build_vit(size: Literal["vit_b", "vit_l", "vit_h"] | ViTSize) -> SamParts:
    """Build a SAM with a ViT encoder and uninitialised (random) weights."""
    if isinstance(size, str):
        size = VIT_SIZES[size]
    vit = modeling().ImageEncoderViT(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.heads,
        out_chans=size.out_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )
    prompt_encoder, mask_decoder = build_decoder(
        image_size=size.image_size,
        stride=size.patch_size,
        dim=size.out_dim,
        heads=size.decoder_heads,
        mlp_dim=size.decoder_mlp_dim,
        mask_in_chans=size.mask_in_chans,
    )
    return SamParts(ViTEncoder(vit, size.patch_size), prompt_encoder, mask_decoder)


def build_decoder(
    image_size: int,
    stride: int,
    dim: int = 256,
    heads: int = 8,
    mlp_dim: int = 2048,
    mask_in_chans: int = 16,
) -> tuple[nn.Module, nn.Module]:
    """Build the prompt encoder and mask decoder that every SAM shares."""
    sam = modeling()
    grid = (image_size // stride, image_size // stride)
    with torch.device("cpu"):  # normal deviates on the meta device import all of torch's compiler
        prompt_encoder = sam.PromptEncoder(
            embed_dim=dim,
            image_embedding_size=grid,
            input_image_size=(image_size, image_size),
            mask_in_chans=mask_in_chans,
        )
        mask_decoder = sam.MaskDecoder(
            num_multimask_outputs=3,
            transformer=sam.TwoWayTransformer(
                depth=2, embedding_dim=dim, mlp_dim=mlp_dim, num_heads=heads
            ),
            transformer_dim=dim,
            iou_head_depth=3,
            iou_head_hidden_dim=dim,
        )
    transformer: Any = mask_decoder.transformer
    for part in [*transformer.layers, transformer]:
        for name, child in list(part.named_children()):
            if isinstance(child, sam.transformer.Attention):
                setattr(part, name, DecoderAttention(child))
    return prompt_encoder, mask_decoder
