from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch

from napari_convlora.backbones import REGISTRY, Backbone
from napari_convlora.backbones.sam import build_vit
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig, MethodName, ModelConfig
from napari_convlora.errors import AdapterError, ConvLoRAError, InputError
from napari_convlora.model.feature_cache import FeatureCache
from napari_convlora.model.semantic_sam import SemanticSAM

METHODS = get_args(MethodName)
NOT_IDENTICAL = ("vpt", "ssf")  # their published start is another
HEADS = ["class_tokens", "classification_branch"]


@pytest.fixture(params=["vit", "tiny"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


def build(backbone: Backbone, seed: int = 0, n_classes: int = 3, **config) -> SemanticSAM:
    torch.manual_seed(seed)
    return SemanticSAM(backbone, ModelConfig(**config), n_classes, 1).eval()


def shake(model: SemanticSAM) -> SemanticSAM:
    """Give every trained parameter a value, so that the method has an effect."""
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images_for(backbone: Backbone, n: int = 2) -> torch.Tensor:
    side = backbone.spec.image_size
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_block", [None, 0, 1, 3])
def test_suffix_of_prefix_is_the_whole_encoder(
    backbone: Backbone, method: str, first_block: int | None
) -> None:
    model = shake(build(backbone, method=method, first_block=first_block))
    images = images_for(backbone)
    with torch.no_grad():
        normalised = (images - model.image_mean) / model.image_std
        embedding = model.backbone(normalised)
        direct = model.head(embedding, *model.backbone.no_prompt(tuple(embedding.shape[-2:])))
        split = model.suffix(model.prefix(images))
        torch.testing.assert_close(split.logits, direct.logits, atol=1e-4, rtol=1e-4)
        logits = model(images)
    assert logits.shape == (2, 3, *images.shape[-2:])
    if method != "decoder_only":
        assert not torch.allclose(embedding, backbone(normalised), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_everything_trained_comes_after_the_cached_features(
    backbone: Backbone, method: str, head: str
) -> None:
    model = build(backbone, method=method, head=head, detail=False)
    images = images_for(backbone)
    before = model.prefix(images)
    shake(model)
    assert torch.equal(model.prefix(images), before)
    assert not before.requires_grad
    model.suffix(before).logits.square().mean().backward()
    touched = {n for n, p in model.trained().items() if p.grad is not None}
    assert any(n.startswith("head.") for n in touched)
    assert any(n.startswith("backbone.") for n in touched) == (method != "decoder_only")


def test_fresh_encoder_gives_the_frozen_embedding(backbone: Backbone) -> None:
    images = images_for(backbone)
    for method in METHODS:
        model = build(backbone, method=method, first_block=0)
        with torch.no_grad():
            same = torch.equal(model.backbone(images), backbone(images))
        assert same == (method not in NOT_IDENTICAL), method


@pytest.mark.parametrize("method", METHODS)
def test_only_method_head_and_detail_are_trained(backbone: Backbone, method: str) -> None:
    model = build(backbone, method=method)
    frozen = {p.data_ptr() for p in backbone.parameters()}
    trained = model.trained()
    assert not {p.data_ptr() for p in trained.values()} & frozen
    places = {name.split(".")[0] for name in trained}
    assert places == {"head", "detail"} | ({"backbone"} if method != "decoder_only" else set())
    assert not any(n.startswith("detail.") for n in build(backbone, detail=False).trained())


def test_fast_preset_of_the_backbone_is_the_default(backbone: Backbone) -> None:
    model = build(backbone)
    assert model.split == backbone.spec.fast_first_block
    assert build(backbone, method="decoder_only").split == len(backbone.encoder.blocks)


def test_methods_that_adapt_or_read_the_stem_have_no_frozen_half(backbone: Backbone) -> None:
    fast = backbone.spec.fast_first_block
    for method in METHODS:
        splits = {
            first: build(backbone, method=method, first_block=first).split for first in (0, fast)
        }
        if method == "decoder_only":
            assert splits == dict.fromkeys((0, fast), len(backbone.encoder.blocks))
        elif method == "sam_adapter":
            assert splits == {0: None, fast: None}
        elif method in ("bitfit", "ssf"):
            assert splits == {0: None, fast: fast}
        else:
            assert splits == {0: 0, fast: fast}


def test_images_are_not_kept_as_features(backbone: Backbone) -> None:
    cache = FeatureCache()
    (image,) = images_for(backbone, 1)
    model = build(backbone, method="ssf", first_block=0)
    assert torch.equal(model.cached_prefix(image, cache), model.prefix(image[None])[0])
    assert len(cache) == 0


@pytest.mark.parametrize("method", METHODS)
def test_no_block_left_to_adapt_leaves_the_encoder_as_it_is(
    backbone: Backbone, method: str
) -> None:
    model = shake(build(backbone, method=method, first_block=len(backbone.encoder.blocks)))
    images = images_for(backbone)
    assert torch.equal(model.backbone(images), backbone(images))
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_block", [0, 2])
def test_merged_model_scores_the_same_or_says_why_it_cannot(
    backbone: Backbone, method: str, first_block: int
) -> None:
    model = shake(build(backbone, method=method, first_block=first_block))
    original = copy.deepcopy(backbone.state_dict())
    images = images_for(backbone)
    expected = model(images)
    if method not in ("lora", "ssf", "bitfit"):
        with pytest.raises(ConvLoRAError, match=r"cannot be merged.*LoRA"):
            model.merge()
        assert torch.equal(model(images), expected)
        return
    model.merge()
    torch.testing.assert_close(model(images), expected, atol=1e-3, rtol=1e-3)
    assert set(model.backbone.encoder.state_dict()) == set(backbone.encoder.state_dict())
    assert not any(name.startswith("backbone.") for name in model.trained())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, original[name]), name


def test_two_models_on_one_backbone_do_not_disturb_each_other(backbone: Backbone) -> None:
    original = copy.deepcopy(backbone.state_dict())
    images = images_for(backbone, 1)
    with torch.no_grad():
        alone = shake(build(backbone, method="conv_lora", first_block=0))
        expected = alone(images)
        other = shake(build(backbone, seed=5, method="lora", head="classification_branch"))
        other(images)
        assert torch.equal(alone(images), expected)
        assert not torch.equal(other(images), expected)
    assert set(backbone.state_dict()) == set(original)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, original[name]), name


def test_weights_are_shared_not_copied(backbone: Backbone) -> None:
    model = build(backbone, method="lora")
    theirs = {p.data_ptr() for p in backbone.encoder.parameters()}
    ours = [p for p in model.backbone.encoder.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in ours} == theirs


def test_moving_a_model_leaves_the_backbone_where_it_is(backbone: Backbone) -> None:
    images = images_for(backbone, 1)
    with torch.no_grad():
        expected = backbone(images)
        build(backbone).to(torch.float64)
        build(backbone).to("meta")
        assert all(p.dtype == torch.float32 for p in backbone.parameters())
        assert torch.equal(backbone(images), expected)


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_leave_the_backbone_bitwise_unchanged(
    backbone: Backbone, method: str
) -> None:
    original = copy.deepcopy(backbone.state_dict())
    model = build(backbone, method=method, first_block=0).train()
    optimiser = torch.optim.AdamW(model.trained().values(), 0.01)
    for _ in range(2):
        loss = model(images_for(backbone)).square().mean() + model.balance_loss()
        loss.backward()
        optimiser.step()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, original[name]), name


def test_balance_loss_is_only_there_in_training(backbone: Backbone) -> None:
    model = build(backbone, method="conv_lora")
    features = model.prefix(images_for(backbone, 4))
    model.train().suffix(features)
    assert torch.is_tensor(model.balance_loss())
    assert model.balance_loss() >= 0
    model.eval().suffix(features)
    assert model.balance_loss() == 0.0


def test_cached_features_are_identical_and_computed_once(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = build(backbone), FeatureCache()
    (image,) = images_for(backbone, 1)
    calls = []
    prefix = SemanticSAM.prefix
    monkeypatch.setattr(SemanticSAM, "prefix", lambda self, x: calls.append(1) or prefix(self, x))
    first = model.cached_prefix(image, cache)
    again = model.cached_prefix(image.clone(), cache)
    assert torch.equal(first, again)
    assert len(calls) == 1
    assert torch.equal(first, model.cached_prefix(image, None))
    other = model.cached_prefix(image + 1e-3, cache)
    assert len(cache) == 2
    assert not torch.equal(other, first)


def test_cache_tells_splits_and_backbones_apart(backbone: Backbone) -> None:
    cache = FeatureCache()
    (image,) = images_for(backbone, 1)
    for first in (0, 2):
        model = build(backbone, first_block=first)
        assert torch.equal(model.cached_prefix(image, cache), model.prefix(image[None])[0])
    assert len(cache) == 2
    for method in ("lora", "conv_lora"):  # the same frozen half
        build(backbone, method=method, first_block=2).cached_prefix(image, cache)
    assert len(cache) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_adapter_state_restores_the_model(backbone: Backbone, method: str, head: str) -> None:
    model = shake(build(backbone, method=method, head=head))
    state = model.adapter_state()
    fresh = build(backbone, seed=9, method=method, head=head)
    images = images_for(backbone)
    with torch.no_grad():
        expected = model(images)
        assert not torch.equal(fresh(images), expected)
        fresh.load_adapter_state(state)
        assert torch.equal(fresh(images), expected)
        shake(model)
        assert torch.equal(fresh(images), expected), "the state is a copy"
    frozen = {n for n, _ in backbone.named_parameters()}
    kept = {n.removeprefix("backbone.") for n in state} & frozen
    assert bool(kept) == (method == "bitfit")
    assert all(n.endswith(".bias") for n in kept)


def test_state_of_another_model_is_refused(backbone: Backbone) -> None:
    state = build(backbone, method="lora").adapter_state()
    for other in (
        {"method": "conv_lora"},
        {"method": "lora", "n_classes": 4},
        {"method": "lora", "method_config": MethodConfig(rank=2)},
        {"method": "lora", "detail": False},
    ):
        with pytest.raises(AdapterError, match="does not fit"):
            build(backbone, **other).load_adapter_state(state)
    del state[next(iter(state))]
    with pytest.raises(AdapterError, match="does not fit"):
        build(backbone, method="lora").load_adapter_state(state)


def test_images_of_a_batch_do_not_influence_each_other(backbone: Backbone) -> None:
    model = shake(build(backbone, method="conv_lora", first_block=0))
    images = images_for(backbone, 3)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_the_mask_token_is_for_two_classes() -> None:
    backbone = random_backbone("tiny")
    assert build(backbone, n_classes=2, head="mask_token")(images_for(backbone)).shape[1] == 2
    with pytest.raises(InputError, match="two classes apart, not 3"):
        build(backbone, head="mask_token")


@pytest.mark.parametrize(
    ("method", "millions"), [("decoder_only", 3.506), ("lora", 3.997), ("conv_lora", 4.020)]
)
def test_the_papers_setting_trains_as_many_parameters_as_it_says(
    method: str, millions: float
) -> None:
    with torch.device("meta"):
        backbone = Backbone(REGISTRY["vit_h"], build_vit("vit_h"))
        model = SemanticSAM(
            backbone,
            ModelConfig(
                method=method,
                method_config=MethodConfig(rank=3, alpha=32, scales=tuple(range(1, 9))),
                first_block=0,
                head="mask_token",
                detail=False,
            ),
            2,
        )
    trained = sum(p.numel() for p in model.trained().values())
    assert trained == pytest.approx(1e6 * millions, abs=500)
