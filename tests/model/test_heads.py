from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from napari_convlora.backbones.sam import build_decoder
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.model.heads import (
    _HYPER_GAIN,
    ClassificationBranch,
    ClassTokens,
    HeadOutput,
    MaskToken,
    TokenDecoder,
)
from napari_convlora.training.losses import VOID, class_weights, dense_loss, query_loss


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    return random_backbone("tiny").mask_decoder


def constants(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_backbone("tiny").no_prompt((height, width))


def build(kind: str, decoder: torch.nn.Module, n_classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "class_tokens":
        return ClassTokens(decoder, n_classes)
    return ClassificationBranch(decoder, n_classes, n_queries=6)


@pytest.mark.parametrize("kind", ["class_tokens", "classification_branch"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 9)])
def test_shapes_for_a_batch_of_any_map(
    decoder: torch.nn.Module, kind: str, height: int, width: int
) -> None:
    output = build(kind, decoder)(torch.randn(2, 32, height, width), *constants(height, width))
    assert output.logits.shape == (2, 3, 4 * height, 4 * width)
    if kind == "class_tokens":
        assert output.masks is None
        assert output.queries is None
    else:
        assert output.masks.shape == (2, 6, 4 * height, 4 * width)
        assert output.queries.shape == (2, 6, 4)


@pytest.mark.parametrize("kind", ["class_tokens", "classification_branch"])
def test_images_of_a_batch_do_not_influence_each_other(decoder: torch.nn.Module, kind: str) -> None:
    head, embedding = build(kind, decoder), torch.randn(3, 32, 4, 5)
    together = head(embedding, *constants(4, 5)).logits
    alone = torch.cat([head(e[None], *constants(4, 5)).logits for e in embedding])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["class_tokens", "classification_branch"])
def test_training_a_head_leaves_the_pretrained_decoder_alone(
    decoder: torch.nn.Module, kind: str
) -> None:
    before = copy.deepcopy(decoder.state_dict())
    head = build(kind, decoder)
    assert all(p.requires_grad for p in head.parameters())
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    head(torch.randn(1, 32, 4, 4), *constants(4, 4)).logits.square().mean().backward()
    optimiser.step()
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_first_token_gives_the_pretrained_mask(decoder: torch.nn.Module) -> None:
    head = TokenDecoder(decoder, 4)
    head.mask_tokens.data.copy_(decoder.mask_tokens.weight)
    image_pe, dense = constants(6, 6)
    embedding = torch.randn(1, 32, 6, 6)
    ours, _ = head(embedding, image_pe, dense)
    theirs, _ = decoder.predict_masks(embedding, image_pe, torch.zeros(1, 0, 32), dense)
    torch.testing.assert_close(ours[:, 0] / _HYPER_GAIN, theirs[:, 0], atol=1e-4, rtol=1e-4)


def test_tokens_differ_from_the_start(decoder: torch.nn.Module) -> None:
    logits = ClassTokens(decoder, 3)(torch.randn(1, 32, 4, 4), *constants(4, 4)).logits
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def pretrained_mask(decoder: torch.nn.Module, embedding: torch.Tensor) -> torch.Tensor:
    image_pe, dense = constants(*embedding.shape[-2:])
    pretrained = copy.deepcopy(decoder)
    # One token only: tokens attend to each other.
    pretrained.num_mask_tokens = 1
    pretrained.mask_tokens = torch.nn.Embedding.from_pretrained(decoder.mask_tokens.weight[:1])
    masks, _ = pretrained.predict_masks(embedding, image_pe, torch.zeros(1, 0, 32), dense)
    return masks[:, 0]


def test_the_mask_token_starts_as_the_pretrained_mask(decoder: torch.nn.Module) -> None:
    embedding = torch.randn(1, 32, 6, 6)
    logits = MaskToken(decoder)(embedding, *constants(6, 6)).logits
    assert logits.shape == (1, 2, 24, 24)
    expected = pretrained_mask(decoder, embedding)
    torch.testing.assert_close(logits.softmax(1)[:, 1], expected.sigmoid(), atol=1e-4, rtol=1e-4)


def test_a_plain_start_gives_every_query_the_same_mask(decoder: torch.nn.Module) -> None:
    head = ClassificationBranch(decoder, 3, 4, plain=True)
    masks = head(torch.randn(1, 32, 6, 6), *constants(6, 6)).masks
    torch.testing.assert_close(masks[:, 1:], masks[:, :1].expand_as(masks[:, 1:]))


def test_heads_have_the_size_of_the_papers() -> None:
    _, pretrained = build_decoder(image_size=1024, stride=16)

    def size(head: torch.nn.Module) -> int:
        return sum(p.numel() for p in head.parameters() if p.requires_grad)

    assert size(MaskToken(pretrained)) == 3_505_536
    assert size(ClassificationBranch(pretrained, 12, 10, plain=True)) == 3_511_181


def test_scores_of_the_branch_are_the_weighted_masks(decoder: torch.nn.Module) -> None:
    output = build("classification_branch", decoder)(torch.randn(1, 32, 4, 4), *constants(4, 4))
    expected = torch.zeros(3, 16, 16)
    for query in range(6):
        share = output.queries[0, query].exp() / output.queries[0, query].exp().sum()
        for c in range(3):
            expected[c] += share[c] * (1 / (1 + (-output.masks[0, query]).exp()))
    torch.testing.assert_close(
        output.logits[0].exp(), expected.clamp_min(1e-6), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["class_tokens", "classification_branch"])
def test_head_can_overfit_one_image(kind: str) -> None:
    backbone = random_backbone("tiny")
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1.0
    image[:, :, 40:] = torch.tensor([1.0, 0.0, 0.3])[:, None, None]
    target = torch.zeros(1, 64, 64, dtype=torch.int64)
    target[..., 32:] = 1
    target[:, 40:] = 2
    with torch.no_grad():
        embedding = backbone(image)
    image_pe, dense = backbone.no_prompt(tuple(embedding.shape[-2:]))
    head = build(kind, backbone.mask_decoder)
    optimiser = torch.optim.Adam(head.parameters(), 2e-3)
    weights = class_weights(target.flatten().bincount(minlength=3))
    for _ in range(400):
        output = _enlarged(head(embedding, image_pe, dense))
        if (output.logits.argmax(1) == target).float().mean() > 0.98:
            return
        loss = (
            dense_loss(output.logits, target, weights)
            if kind == "class_tokens"
            else query_loss(output, target)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pytest.fail("the head cannot fit three flat regions of one image")


def _enlarged(output: HeadOutput) -> HeadOutput:
    def enlarge(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else F.interpolate(tensor, (64, 64), mode="bilinear")

    logits = enlarge(output.logits)
    assert logits is not None
    return HeadOutput(logits, enlarge(output.masks), output.queries)


def random_output(seed: int, size: int = 8, n_queries: int = 5) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(2, n_queries, size, size, generator=generator)
    queries = torch.randn(2, n_queries, 4, generator=generator)
    return HeadOutput(torch.zeros(2, 3, size, size), masks, queries)


@pytest.mark.parametrize("seed", range(5))
def test_matched_loss_ignores_pixels_without_label(seed: int) -> None:
    output = random_output(seed)
    target = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(seed))
    void = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.6
    target[void] = VOID
    masks = torch.where(void[:, None], 50 * torch.randn(2, 5, 8, 8), output.masks)
    masks.requires_grad_()
    loss = query_loss(HeadOutput(output.logits, masks, output.queries), target)
    assert loss.item() == pytest.approx(query_loss(output, target).item(), rel=1e-6)
    loss.backward()
    assert not masks.grad[void[:, None].expand_as(masks)].any()
    assert masks.grad.any()


def test_matched_loss_works_with_one_class_and_with_none() -> None:
    output = random_output(0)
    target = torch.full((2, 8, 8), VOID)
    target[0, :2] = 1
    one = query_loss(output, target)
    assert one.isfinite()
    assert one > 0
    nothing = HeadOutput(output.logits.clone().requires_grad_(), output.masks, output.queries)
    loss = query_loss(nothing, torch.full((2, 8, 8), VOID))
    loss.backward()
    assert loss == 0
    assert not nothing.logits.grad.any()


def test_matched_loss_does_not_depend_on_the_order_of_queries() -> None:
    output = random_output(3)
    target = torch.randint(0, 3, (2, 8, 8))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = HeadOutput(output.logits, output.masks[:, order], output.queries[:, order])
    torch.testing.assert_close(query_loss(output, target), query_loss(shuffled, target))


def test_matched_loss_falls_when_masks_and_classes_are_right() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, :, 4:] = 2
    masks = torch.full((1, 4, 8, 8), -9.0)
    masks[0, 1] = torch.where(target[0] == 0, 9.0, -9.0)
    masks[0, 3] = torch.where(target[0] == 2, 9.0, -9.0)
    queries = torch.zeros(1, 4, 4)
    queries[0, :, 3] = 9
    queries[0, 1] = torch.tensor([9.0, 0, 0, 0])
    queries[0, 3] = torch.tensor([0, 0, 9.0, 0])
    right = query_loss(HeadOutput(masks, masks, queries), target)
    assert right < 0.05
    wrong = query_loss(HeadOutput(masks, -masks, queries), target)
    assert wrong > 10 * right


def test_class_tokens_begin_at_a_linear_reading_of_what_sam_sees(decoder: torch.nn.Module) -> None:
    head, embedding = ClassTokens(decoder, 3), torch.randn(2, 32, 4, 5)
    evidence = head.evidence(embedding, *constants(4, 5))
    upscaled = evidence[:, 1:]
    assert upscaled.shape[-2:] == (16, 20)
    weights, bias = torch.randn(3, evidence.shape[1]), torch.randn(3)
    head.begin(weights, bias)
    logits = head(embedding, *constants(4, 5)).logits
    expected = torch.einsum("kc,bchw->bkhw", weights, evidence) + bias[:, None, None]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in head.parameters())
