from __future__ import annotations

import pytest
import torch

from napari_convlora.model.detail_branch import CONTEXT_SHARES, DetailBranch
from napari_convlora.training.detail_fit import fit
from napari_convlora.training.detail_stage import context_share


@pytest.mark.parametrize(("misleads", "chosen"), [(True, 0.25), (False, 0.75)])
def test_labels_that_a_branch_has_not_seen_choose_how_much_the_embedding_counts(
    misleads: bool, chosen: float
) -> None:
    """One channel tells the classes apart in every image, or the other way round in the next."""
    generator = torch.Generator().manual_seed(0)
    target, fold = torch.arange(2000) % 2, torch.arange(2000) // 1000
    features = torch.randn(2000, 24 + 8, generator=generator)
    features[:, 0] += 1.5 * target
    told = (target + (fold if misleads else 0)) % 2
    features[:, 24:] = 3.0 * told[:, None] + 0.3 * torch.randn(2000, 8, generator=generator)
    blind = []
    for i in range(2):
        torch.manual_seed(0)
        branch = DetailBranch(1, 8, 2)
        list(fit(branch, features[fold != i], target[fold != i], steps=60))
        blind.append(branch)
    assert {0.25, 0.75} <= set(CONTEXT_SHARES)
    assert context_share(blind, features, target, fold, target.bincount()) == chosen
