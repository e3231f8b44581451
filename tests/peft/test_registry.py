"""What every method promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from napari_convlora.backbones import Backbone
from napari_convlora.backbones.sam import build_vit
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig, MethodName, ModelConfig, TrainConfig
from napari_convlora.errors import AdapterError, ConvLoRAError, InputError
from napari_convlora.events import Finished, Step
from napari_convlora.model.adapter import Adapter
from napari_convlora.model.heads import MaskToken
from napari_convlora.model.iteration import Returning
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.peft import METHODS, adapt_encoder, balance_loss, merge
from napari_convlora.peft.registry import pool_tokens
from napari_convlora.prediction.predict import predict
from napari_convlora.training import adapt
from napari_convlora.training.memory_plan import kept_bytes
from tests.conftest import CLASSES, make_scene

NAMES = get_args(MethodName)
ADAPTING = [name for name in NAMES if name != "decoder_only"]
ALL_EXPERTS = MethodConfig(top_k=4)
"""Every expert acts, so every one gets a gradient."""

# Random weights need larger steps than a pretrained backbone.
LEARNING = TrainConfig("full", 40, views=1, device="cpu", adapter_lr=0.01, decoder_lr=0.01)

PAPER = MethodConfig(rank=3, alpha=32, scales=tuple(range(1, 9)), prompts=1)
COUNTS = {
    "decoder_only": (0, 0, 0),
    "bitfit": (102_656, 271_872, 452_352),
    "sam_adapter": (63_312, 116_544, 186_960),
    "vpt": (9_216, 24_576, 40_960),
    "ssf": (204_288, 542_720, 903_680),
    "lora": (110_592, 294_912, 491_520),
    "conv_lora": (110_592 + 8_640, 294_912 + 17_280, 491_520 + 23_040),
}
"""Trained parameters on ViT-B, ViT-L and ViT-H without the decoder, with the settings above."""


@pytest.fixture(params=["vit", "tiny"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


def adapted(
    backbone: Backbone, method: str, first_block: int = 0, config: MethodConfig = ALL_EXPERTS
) -> nn.Module:
    torch.manual_seed(0)
    return adapt_encoder(method, backbone.encoder, first_block, config).eval()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def shake(module: nn.Module, size: float = 0.2) -> None:
    """Give every trained parameter another value."""
    for parameter in trained(module).values():
        parameter.add_(size * torch.randn_like(parameter))


def images_for(backbone: Backbone) -> Tensor:
    side = backbone.spec.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_name_has_its_method() -> None:
    assert set(METHODS) == set(NAMES)
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("first_block", [0, 2])
def test_training_starts_at_or_near_the_frozen_encoder(
    backbone: Backbone, method: str, first_block: int
) -> None:
    images = images_for(backbone)
    with torch.no_grad():
        expected = backbone.encoder(images)
        found = adapted(backbone, method, first_block).train()(images)
    if method in ("vpt", "ssf"):
        assert 0 < (found - expected).norm() < 0.5 * expected.norm()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ADAPTING)
@pytest.mark.parametrize("first_block", [0, 3])
def test_whatever_is_trained_gets_a_gradient_and_nothing_else_does(
    backbone: Backbone, method: str, first_block: int
) -> None:
    encoder = adapted(backbone, method, first_block).train()
    shake(encoder)
    assert trained(encoder)
    (encoder(images_for(backbone)).square().mean() + balance_loss(encoder)).backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any(), name
    assert not any(p.requires_grad for p in backbone.mask_decoder.parameters())


@pytest.mark.parametrize("method", NAMES)
def test_blocks_before_the_first_adapted_one_stay_frozen(backbone: Backbone, method: str) -> None:
    images = images_for(backbone)
    outputs = []
    backbone.encoder.blocks[1].register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        whole = backbone.encoder(images)
        encoder = adapted(backbone, method, 2)
        shake(encoder)
        assert torch.equal(encoder(images), whole) == (method == "decoder_only")
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", NAMES)
def test_eval_mode_is_deterministic(backbone: Backbone, method: str) -> None:
    encoder, images = adapted(backbone, method, config=MethodConfig()), images_for(backbone)
    shake(encoder)
    with torch.no_grad():
        before = torch.get_rng_state()
        first = encoder.train().eval()(images)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(encoder(images), first)


@pytest.mark.parametrize("method", NAMES)
def test_only_a_gate_has_a_balance_loss(backbone: Backbone, method: str) -> None:
    encoder = adapted(backbone, method, config=MethodConfig()).train()
    encoder(images_for(backbone))
    assert torch.is_tensor(balance_loss(encoder)) == (method == "conv_lora")


@pytest.mark.parametrize("method", NAMES)
def test_images_of_other_sizes_and_shapes_fit(backbone: Backbone, method: str) -> None:
    encoder, stride = adapted(backbone, method), backbone.encoder.stride
    shake(encoder)
    with torch.no_grad():
        found = encoder(torch.rand(1, 3, 5 * stride, 7 * stride))
    assert found.shape[-2:] == (5, 7)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", NAMES)
def test_a_round_learns_and_its_adapter_predicts_the_same_after_loading(
    method: str, tmp_path: Path
) -> None:
    backbone = random_backbone()
    scene, _ = make_scene()
    events = list(
        adapt(
            backbone,
            [scene],
            CLASSES,
            ModelConfig(method=method, detail=False),  # type: ignore[arg-type]
            LEARNING,
        )
    )
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert np.mean(losses[-4:]) < 0.35 * np.mean(losses[:4])
    last = events[-1]
    assert isinstance(last, Finished), last
    adapter = last.adapter
    torch.manual_seed(LEARNING.seed)
    start = SemanticSAM(backbone, adapter.model, 3, 1).adapter_state()
    own = [name for name in start if name.startswith("backbone.")]
    assert bool(own) == (method != "decoder_only")
    assert not [name for name in own if torch.equal(start[name], adapter.state[name])]

    def probabilities(adapter: Adapter) -> np.ndarray:
        steps = Returning(predict(adapter, backbone, scene.image, probabilities=True, device="cpu"))
        for _ in steps:
            pass
        assert steps.value is not None
        return steps.value.probabilities

    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    assert loaded.model == adapter.model
    np.testing.assert_array_equal(probabilities(loaded), probabilities(adapter))


def test_adapters_from_before_these_settings_still_load(tmp_path: Path) -> None:
    backbone, scene = random_backbone(), make_scene()[0]
    model, config = ModelConfig(detail=False), TrainConfig(max_steps=1, views=1, device="cpu")
    *_, last = adapt(backbone, [scene], CLASSES, model, config)
    assert isinstance(last, Finished)
    path = last.adapter.save(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["napari_convlora"])
    for name in ("scale", "bottleneck", "prompts", "reduction"):
        del header["model"]["method_config"][name]
    save_file(last.adapter.state, path, {"napari_convlora": json.dumps(header)})
    assert Adapter.load(path).model == last.adapter.model
    header["model"]["method_config"]["magic"] = 1
    save_file(last.adapter.state, path, {"napari_convlora": json.dumps(header)})
    with pytest.raises(AdapterError, match="magic"):
        Adapter.load(path)


@pytest.mark.parametrize("method", ADAPTING)
def test_the_method_alone_can_learn_what_it_can_express(backbone: Backbone, method: str) -> None:
    encoder, images = adapted(backbone, method), images_for(backbone)
    start = [p.detach().clone() for p in trained(encoder).values()]
    shake(encoder)
    with torch.no_grad():
        wanted = encoder(images)
        for parameter, value in zip(trained(encoder).values(), start, strict=True):
            parameter.copy_(value)
    optimiser = torch.optim.Adam(trained(encoder).values(), 3e-3)
    losses = []
    for _ in range(20):
        loss = (encoder(images) - wanted).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_real_weights_start_as_they_are_and_can_be_merged(litemedsam: Backbone) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = litemedsam.encoder(images)
    changed = set()
    for method in NAMES:
        torch.manual_seed(0)
        model = SemanticSAM(litemedsam, ModelConfig(method, first_block=0), 2)  # type: ignore[arg-type]
        encoder = model.backbone.encoder.eval()
        found = encoder(images)
        if not torch.equal(found, expected):
            changed.add(method)
        if METHODS[method].merge is not None:
            shake(encoder, 0.02)
            found = encoder(images)
            model.merge()
            torch.testing.assert_close(encoder(images), found, atol=1e-4, rtol=1e-3)
    assert changed == {"vpt", "ssf"}


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize(("size", "column"), [("vit_b", 0), ("vit_l", 1), ("vit_h", 2)])
def test_trained_parameters_are_as_many_as_published(method: str, size: str, column: int) -> None:
    with torch.device("meta"):
        encoder = build_vit(size).encoder.requires_grad_(False)  # type: ignore[arg-type]
        encoder = adapt_encoder(method, encoder, 0, PAPER)
    assert sum(p.numel() for p in trained(encoder).values()) == COUNTS[method][column]


def test_binary_head_is_as_large_as_the_papers_decoder() -> None:
    with torch.device("meta"):
        head = MaskToken(build_vit("vit_b").mask_decoder)
    assert sum(p.numel() for p in head.parameters()) == 3_505_536


def test_tokens_are_averaged_down_to_a_coarser_grid() -> None:
    tokens = torch.arange(16.0).reshape(1, 4, 4, 1)
    pooled = pool_tokens(tokens, torch.zeros(1, 2, 2, 9))
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_unknown_method_is_refused_by_name() -> None:
    for use in (
        lambda e: adapt_encoder("magic", e, 0, MethodConfig()),
        lambda e: merge("magic", e),
    ):
        with pytest.raises(ConvLoRAError, match=r"'magic'.*conv_lora"):
            use(random_backbone().encoder)


@pytest.mark.parametrize("name", ["rank", "scale", "bottleneck", "prompts", "reduction", "top_k"])
@pytest.mark.parametrize("value", [0, -3])
def test_settings_below_one_are_refused_in_a_sentence(name: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"{name} is {value}; set it to 1") as caught:
        MethodConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"scales": (0, 1)}, {"scales": ()}, {"top_k": 5}])
def test_impossible_scales_and_top_k_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))} is"):
        MethodConfig(**bad)


def gradients(backbone: Backbone, method: MethodName, again: bool) -> tuple[dict, int, Tensor]:
    """Gradients of a step with routing noise, the bytes kept for them, and a later random draw."""
    torch.manual_seed(0)
    config = ModelConfig(method=method, first_block=0, detail=False)
    model = SemanticSAM(backbone, config, 3).train()
    if again:
        model.checkpoint_blocks()
    features = model.prefix(images_for(backbone))
    with kept_bytes(model) as kept:
        loss = model.suffix(features).logits.square().mean() + model.balance_loss()
    loss.backward()
    assert not again or not isinstance(model.balance_loss(), Tensor), "it would keep a graph"
    return {name: p.grad for name, p in model.trained().items()}, kept[0], torch.rand(3)


@pytest.mark.parametrize("method", ADAPTING)
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(
    backbone: Backbone, method: MethodName
) -> None:
    expected, kept, after = gradients(backbone, method, again=False)
    found, kept_again, after_again = gradients(backbone, method, again=True)
    assert torch.equal(after, after_again)
    assert kept_again < 0.75 * kept
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)
