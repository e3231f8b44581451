from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from napari_convlora.backbones.sam import VIT_SIZES, build_vit, modeling
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.errors import InputError
from napari_convlora.peft.lora import LoRALinear


@pytest.fixture
def official_builders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`segment_anything.build_sam`, loaded without torchvision."""
    package = find_spec("segment_anything")
    assert package is not None
    assert package.submodule_search_locations
    root = Path(package.submodule_search_locations[0])
    parent = ModuleType("sam_without_init")
    parent.__path__ = [str(root)]
    monkeypatch.setitem(sys.modules, "sam_without_init", parent)
    monkeypatch.setitem(sys.modules, "sam_without_init.modeling", modeling())
    spec = spec_from_file_location("sam_without_init.build_sam", root / "build_sam.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", list(VIT_SIZES))
def test_names_and_shapes_are_the_official_ones(official_builders: ModuleType, arch: str) -> None:
    with torch.device("meta"):
        official = official_builders.sam_model_registry[arch]()
        ours = build_vit(arch)  # type: ignore[arg-type]
    expected = {name: tuple(value.shape) for name, value in official.state_dict().items()}
    found = {}
    for module, prefix in zip(
        ours, ("image_encoder.", "prompt_encoder.", "mask_decoder."), strict=True
    ):
        for name, value in module.state_dict().items():
            found[prefix + name.removeprefix("vit.")] = tuple(value.shape)
    assert found == expected
    for ours_block, block in zip(ours.encoder.blocks, official.image_encoder.blocks, strict=True):
        assert ours_block.attn.window == block.window_size
        assert ours_block.attn.num_heads == block.attn.num_heads
        assert ours_block.norm1.eps == block.norm1.eps


def test_native_size_agrees_with_segment_anything() -> None:
    encoder = random_backbone("vit").encoder
    official = modeling().ImageEncoderViT(
        img_size=128,
        embed_dim=32,
        depth=4,
        num_heads=2,
        out_chans=32,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1, 3),
    )
    official.load_state_dict(encoder.vit.state_dict())
    images = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(encoder(images), official(images), rtol=0, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(h=st.integers(1, 10), w=st.integers(1, 10), batch=st.integers(1, 2))
def test_prefix_then_suffix_is_forward(h: int, w: int, batch: int) -> None:
    encoder = random_backbone("vit").encoder
    images = torch.rand(batch, 3, 16 * h, 16 * w)
    whole = encoder(images)
    assert whole.shape == (batch, 32, h, w)
    assert whole.isfinite().all()
    for split in range(len(encoder.blocks) + 1):
        torch.testing.assert_close(encoder.suffix(encoder.prefix(images, split), split), whole)


def test_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(InputError, match=r"100 x 64 px.*multiples of 16 px"):
        random_backbone("vit").encoder(torch.rand(1, 3, 100, 64))


def test_an_adapted_qkv_sees_channel_last_windows() -> None:
    encoder = random_backbone("vit").encoder
    shapes = []
    for block in encoder.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, 1, 1)  # type: ignore[union-attr]
        block.attn.qkv.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))  # type: ignore[union-attr]
    encoder(torch.rand(1, 3, 96, 128))
    # windows of 4 x 4 tokens in blocks 0 and 2, the whole 6 x 8 map in blocks 1 and 3
    assert shapes == [(4, 4, 4, 32), (1, 6, 8, 32)] * 2


def test_import_leaves_segment_anything_to_others() -> None:
    code = (
        "import sys, napari_convlora.backbones.testing as t; t.random_backbone('vit');"
        "names = {name.split('.')[0] for name in sys.modules};"
        "assert not names & {'segment_anything', 'torchvision', 'napari', 'qtpy'}, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
