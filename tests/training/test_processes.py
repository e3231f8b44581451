from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from napari_convlora.model.heads import HeadOutput
from napari_convlora.training.processes import ALONE, Team


@dataclass(frozen=True)
class Second(Team):
    """The second of two processes, whose partner adds what it is told to."""

    rank: int = 1
    size: int = 2
    partner: list[Tensor] = field(default_factory=list)

    def sum(self, value: Tensor) -> Tensor:
        return value + self.partner.pop(0)


@given(st.integers(0, 20), st.integers(1, 6))
def test_parts_make_up_the_batch_and_none_is_empty_if_it_suffices(n: int, size: int) -> None:
    parts = [Team(rank, size).part(range(n)) for rank in range(size)]
    assert [view for part in parts for view in part] == list(range(n))
    assert n < size or all(parts)


def test_the_whole_batch_has_both_outputs_but_gradients_of_ones_own() -> None:
    theirs, own = torch.randn(1, 3, 2, 2), torch.randn(2, 3, 2, 2, requires_grad=True)
    filled = torch.cat([theirs, torch.zeros(2, 3, 2, 2)])
    whole = Second(partner=[filled]).whole(HeadOutput(own), 3)
    assert torch.equal(whole.logits, torch.cat([theirs, own]))
    assert whole.masks is None
    whole.logits.square().sum().backward()
    torch.testing.assert_close(own.grad, 2 * own.detach())


def test_gradients_are_added_where_there_are_any() -> None:
    used, unused = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    (used * torch.tensor([1.0, 2.0])).sum().backward()
    Second(partner=[torch.tensor([10.0, 20.0])]).add_gradients([used, unused])
    assert used.grad is not None
    assert used.grad.tolist() == [11, 22]
    assert unused.grad is None


def test_the_second_takes_the_parameters_of_the_first() -> None:
    parameter = torch.ones(2, requires_grad=True)
    Second(partner=[torch.tensor([3.0, 4.0])]).align([parameter])
    assert parameter.tolist() == [3, 4]


def test_one_process_leaves_everything_as_it_is() -> None:
    output = HeadOutput(torch.randn(2, 3, 2, 2))
    assert ALONE.whole(output, 2) is output
    assert ALONE.part([1, 2]) == [1, 2]
    assert ALONE.lead(torch.tensor(2.0)) == 2
