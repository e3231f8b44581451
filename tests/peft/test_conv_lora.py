from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import MethodConfig
from napari_convlora.peft import adapt_encoder, balance_loss
from napari_convlora.peft.conv_lora import ConvLoRALinear

EIGHT = tuple(range(1, 9))


def make_layer(
    scales: tuple[int, ...] = (1, 3, 5, 7),
    *,
    rank: int = 3,
    top_k: int = 1,
    faithful: bool = False,
    trained: bool = True,
    seed: int = 0,
) -> ConvLoRALinear:
    """A layer 6 -> 9; `trained` gives values to everything that starts at zero."""
    torch.manual_seed(seed)
    config = MethodConfig(rank=rank, alpha=32, scales=scales, top_k=top_k, faithful=faithful)
    layer = ConvLoRALinear(nn.Linear(6, 9), config)
    if trained:
        with torch.no_grad():
            for parameter in (layer.lora_B, layer.expert_bias, layer.gate, layer.gate_noise):
                parameter.normal_()
    return layer


def literal_expert(z: Tensor, weight: Tensor, bias: Tensor, scale: int) -> Tensor:
    """Enlarge, convolve, GELU, shrink: what the collapsed kernels stand for."""
    size = z.shape[-2:]
    if scale > 1:
        z = F.interpolate(z, scale_factor=scale, mode="bicubic", align_corners=False)
    z = F.gelu(F.conv2d(z, weight, bias, padding=1))
    return F.interpolate(z, size, mode="bicubic", align_corners=False) if scale > 1 else z


def released_formula(layer: ConvLoRALinear, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The published layer for top-1, one map at a time."""
    y = x @ layer.base.weight.T + layer.base.bias
    for n, one in enumerate(x):
        z = (one @ layer.lora_A.T).permute(2, 0, 1)[None]
        pooled = z.mean((2, 3))[0]
        logits = pooled @ layer.gate
        if noise is not None:
            logits = logits + noise[n] * (F.softplus(pooled @ layer.gate_noise) + 1e-2)
        e = int(logits.argmax())
        z = z + literal_expert(z, layer.expert_weight[e], layer.expert_bias[e], layer.scales[e])
        y[n] += 32 / layer.lora_A.shape[0] * z[0].permute(1, 2, 0) @ layer.lora_B.T
    return y


@torch.no_grad()
def balance_by_hand(
    clean: Tensor, std: Tensor, noisy: Tensor, top_k: int, weight: float = 1e-2
) -> float:
    """Importance and load loss of Shazeer et al., with loops and `math`."""
    n_maps, n_experts = clean.shape
    importance, load = [0.0] * n_experts, [0.0] * n_experts
    for n in range(n_maps):
        ranked = sorted(noisy[n].tolist(), reverse=True)
        chosen = [j for j in range(n_experts) if noisy[n, j] >= ranked[top_k - 1]]
        total = sum(math.exp(noisy[n, j]) for j in chosen)
        for j in range(n_experts):
            if j in chosen:
                importance[j] += math.exp(noisy[n, j]) / total
            if top_k == n_experts:
                load[j] += 1
                continue
            threshold = ranked[top_k] if j in chosen else ranked[top_k - 1]
            z = (clean[n, j].item() - threshold) / std[n, j].item()
            load[j] += 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def variation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return variance / (mean**2 + 1e-10)

    return weight * (variation(importance) + variation(load))


def pooled_maps(layer: ConvLoRALinear, x: Tensor) -> Tensor:
    return (x @ layer.lora_A.T).mean((1, 2))


@pytest.mark.parametrize("scale", EIGHT)
@pytest.mark.parametrize("training", [False, True])
def test_faithful_layer_with_one_expert_is_the_released_one(scale: int, training: bool) -> None:
    layer = make_layer((scale,), faithful=True).train(training)
    x = torch.randn(3, 7, 10, 6)
    torch.testing.assert_close(layer(x), released_formula(layer, x), atol=2e-4, rtol=1e-5)


def test_faithful_layer_routes_as_the_released_one_without_noise() -> None:
    layer = make_layer(EIGHT, faithful=True).eval()
    x = torch.randn(12, 5, 6, 6)
    chosen = (pooled_maps(layer, x) @ layer.gate).argmax(1)
    assert len(chosen.unique()) > 2, "the input must exercise several experts"
    torch.testing.assert_close(layer(x), released_formula(layer, x), atol=2e-4, rtol=1e-5)


def test_faithful_layer_routes_as_the_released_one_with_the_same_noise() -> None:
    layer = make_layer(EIGHT, faithful=True).train()
    x = torch.randn(12, 5, 6, 6)
    torch.manual_seed(3)
    output = layer(x)
    torch.manual_seed(3)
    noise = torch.randn(12, 8)
    torch.testing.assert_close(output, released_formula(layer, x, noise), atol=2e-4, rtol=1e-5)
    assert not torch.allclose(output, released_formula(layer, x), atol=1e-2), "noise has no effect"


@settings(deadline=None, max_examples=80)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    scales=st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_expert_is_exact_up_to_the_border_and_so_are_its_gradients(
    height: int, width: int, scales: tuple[int, ...], rank: int, seed: int
) -> None:
    layer = make_layer(scales, rank=rank, seed=seed)
    z = torch.randn(2, rank, height, width, requires_grad=True)
    chosen = torch.randint(len(scales), (2, 2))
    found = layer.answers(z, chosen)
    literal = [
        literal_expert(z[n : n + 1], layer.expert_weight[e], layer.expert_bias[e], scales[e])
        for n, experts in enumerate(chosen.tolist())
        for e in experts
    ]
    expected = torch.cat(literal).view_as(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    inputs, weight = (z, layer.expert_weight, layer.expert_bias), torch.randn_like(found)
    ours, theirs = (
        torch.autograd.grad((weight * answers).mean(), inputs) for answers in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_layers_first_used_for_prediction_can_train() -> None:
    layer = make_layer((2, 3), rank=2)
    with torch.inference_mode():
        layer.eval()(torch.randn(1, 11, 13, 6))
    layer.train()(torch.randn(1, 11, 13, 6)).sum().backward()
    assert layer.expert_weight.grad is not None


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("faithful", [False, True])
def test_balance_loss_is_importance_plus_load(top_k: int, faithful: bool) -> None:
    layer = make_layer(top_k=top_k, faithful=faithful).train()
    x = torch.randn(9, 4, 5, 6)
    torch.manual_seed(1)
    layer(x)
    torch.manual_seed(1)
    pooled = pooled_maps(layer, x)
    clean = pooled @ layer.gate
    std = F.softplus(pooled @ layer.gate_noise) + 1e-2
    noisy = clean + torch.randn(9, 4) * std
    expected = balance_by_hand(clean, std, noisy, top_k)
    assert layer.balance_loss is not None
    assert layer.balance_loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_balance_losses_are_summed_over_layers() -> None:
    layers = nn.Sequential(make_layer(seed=1), nn.Linear(9, 6), make_layer(seed=2)).train()
    layers(torch.randn(4, 3, 3, 6))
    expected = layers[0].balance_loss + layers[2].balance_loss
    torch.testing.assert_close(balance_loss(layers), expected)


def test_balance_loss_trains_the_gate_and_is_absent_in_eval() -> None:
    layer = make_layer(faithful=True).train()
    x = torch.randn(6, 3, 3, 6)
    layer(x)
    assert layer.balance_loss is not None
    layer.balance_loss.backward()
    assert layer.gate.grad is not None
    assert layer.gate.grad.abs().sum() > 0
    layer.eval()(x)
    assert layer.balance_loss is None
    assert balance_loss(layer) == 0.0


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_untrained_layer_is_bit_identical_to_the_frozen_one(faithful: bool, training: bool) -> None:
    layer = make_layer(EIGHT, faithful=faithful, trained=False).train(training)
    x = torch.randn(4, 5, 7, 6)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", ["vit", "tiny"])
@pytest.mark.parametrize("training", [False, True])
def test_untrained_encoder_is_bit_identical_to_the_frozen_one(kind: str, training: bool) -> None:
    backbone = random_backbone(kind)  # type: ignore[arg-type]
    side = backbone.spec.image_size
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = backbone(images)
        adapt_encoder("conv_lora", backbone.encoder, 0, MethodConfig())
        backbone.train(training)
        assert torch.equal(backbone(images), expected)


def test_faithful_gate_gets_no_gradient_from_the_task() -> None:
    layer = make_layer(faithful=True).train()
    layer(torch.randn(6, 4, 4, 6)).square().mean().backward()
    assert layer.gate.grad is None
    assert layer.gate_noise.grad is None
    assert layer.expert_weight.grad is not None


@pytest.mark.parametrize("top_k", [1, 2])
def test_default_gate_is_trained_by_the_task(top_k: int) -> None:
    layer = make_layer(top_k=top_k).train()
    layer(torch.randn(6, 4, 4, 6)).square().mean().backward()
    assert layer.gate.grad is not None
    assert layer.gate.grad.abs().sum() > 0


def test_task_gradient_moves_the_gate_to_the_better_expert() -> None:
    layer = make_layer((1, 3)).train()
    with torch.no_grad():
        layer.gate.zero_()
        layer.gate_noise.zero_()
        layer.expert_weight.zero_()
        layer.expert_bias.copy_(torch.tensor([[-9.0] * 3, [2.0] * 3]))  # GELU: 0 and 2
    x = torch.randn(64, 4, 4, 6).abs()
    with torch.no_grad():
        layer.lora_A.fill_(0.5)
        wanted_map = F.linear(x, layer.lora_A) + 4  # beyond both, closer to the second
        wanted = layer.base(x) + layer.scaling * F.linear(wanted_map, layer.lora_B)
    optimiser = torch.optim.Adam([layer.gate], 0.05)
    torch.manual_seed(0)
    for _ in range(40):
        optimiser.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimiser.step()
    chosen = (pooled_maps(layer, x) @ layer.gate).argmax(1)
    assert (chosen == 1).float().mean() > 0.9


def test_default_and_faithful_layers_agree_in_value_for_one_expert_per_map() -> None:
    faithful, ours = make_layer(faithful=True).eval(), make_layer().eval()
    ours.load_state_dict(faithful.state_dict())
    x = torch.randn(5, 4, 4, 6)
    torch.testing.assert_close(ours(x), faithful(x))


def test_weights_of_several_experts_sum_to_one() -> None:
    layer = make_layer(top_k=2).eval()
    chosen, weights = layer.route(torch.randn(5, 3, 4, 4))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert (weights > 0).all()
    assert (chosen[:, 0] != chosen[:, 1]).all()


def test_eval_adds_no_noise_and_draws_no_random_number() -> None:
    layer = make_layer().eval()
    x = torch.randn(8, 4, 4, 6)
    before = torch.get_rng_state()
    first = layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(layer(x), first)


def test_training_is_deterministic_under_a_seed() -> None:
    layer = make_layer().train()
    x = torch.randn(16, 4, 4, 6)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_large_activations_give_finite_values_and_gradients(faithful: bool, top_k: int) -> None:
    layer = make_layer(EIGHT, top_k=top_k, faithful=faithful).train()
    with torch.no_grad():
        layer.lora_A.fill_(0)
        layer.lora_A[:, :3] = torch.eye(3)
    x = torch.full((4, 5, 5, 6), 200.0) * torch.tensor([1.0, -1, 1, -1])[:, None, None, None]
    output = layer(x)
    (output.mean() + layer.balance_loss).backward()
    assert output.isfinite().all()
    assert torch.isfinite(layer.balance_loss)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_forward_never_reads_values_back(training: bool, faithful: bool, top_k: int) -> None:
    # A fake tensor has no values: .item(), bool() and nonzero() raise on it.
    make_layer(EIGHT)(torch.randn(4, 5, 5, 6))  # the matrices for this size are made once
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(Exception, match=r"item|data.dependent|_local_scalar_dense"):
            torch.zeros(1).item()
        layer = make_layer(EIGHT, faithful=faithful, top_k=top_k).train(training)
        assert layer(torch.randn(4, 5, 5, 6)).shape == (4, 5, 5, 9)


class Recorder(TorchDispatchMode):
    """Remember which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_forward_copies_no_index_list_to_the_device() -> None:
    layer, x = make_layer(EIGHT, top_k=2), torch.randn(4, 5, 5, 6)
    layer(x)  # the operators of its scales are built once, by whoever comes first
    with Recorder() as recorder:
        layer(x)
    assert "aten.index_select.default" in recorder.names, "the recorder saw nothing"
    assert not {n for n in recorder.names if n.startswith(("aten.index.", "aten._to_copy"))}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("faithful", [False, True])
def test_forward_never_waits_for_the_gpu(faithful: bool) -> None:
    layer = make_layer(EIGHT, faithful=faithful).cuda().train()
    x = torch.randn(4, 5, 5, 6, device="cuda")
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_forward_returns_a_tensor_of_the_frozen_layers_shape(training: bool) -> None:
    layer = make_layer().train(training)
    output = layer(torch.randn(2, 3, 4, 6))
    assert isinstance(output, Tensor)
    assert output.shape == (2, 3, 4, 9)


def test_only_the_update_is_trained() -> None:
    names = {n for n, p in make_layer().named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "expert_weight", "expert_bias", "gate", "gate_noise"}


def test_token_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="token maps"):
        make_layer()(torch.randn(2, 16, 6))
