"""Several processes that train one model: each sees its part of a batch, all learn the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from napari_convlora.model.heads import HeadOutput

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The `size` processes of a round, of which this one is the `rank`-th, from 0.

    By itself a team of one, whose sums are the values themselves. What connects processes
    overrides `sum`; all of them must call everything here in the same order.
    """

    rank: int = 0
    size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of all processes' values, the same for all."""
        return value

    def lead(self, value: Tensor) -> Tensor:
        """Return the first process's value."""
        return self.sum(value if self.rank == 0 else torch.zeros_like(value))

    def part(self, batch: Sequence[T]) -> Sequence[T]:
        """Return what this process computes of a batch."""
        return batch[self._begin(len(batch)) : self._begin(len(batch), 1)]

    def whole(self, output: HeadOutput, n: int) -> HeadOutput:
        """Put together the outputs for a batch of `n`; gradients flow through this process's part.

        The loss of the whole batch then has, summed over processes, exactly its own gradient.
        """
        if self.size == 1:
            return output
        return HeadOutput(
            *(None if t is None else self._whole(t, n) for t in vars(output).values())  # type: ignore[arg-type]
        )

    def _whole(self, own: Tensor, n: int) -> Tensor:
        begin = self._begin(n)
        every = own.new_zeros(n, *own.shape[1:])
        every[begin : begin + len(own)] = own.detach()
        every = self.sum(every)
        return torch.cat([every[:begin], own, every[begin + len(own) :]])

    def _begin(self, n: int, after: int = 0) -> int:
        return n * (self.rank + after) // self.size

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give all processes the sum of their gradients."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size > 1:
            vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    @torch.no_grad()
    def align(self, parameters: Iterable[Tensor]) -> None:
        """Give all processes the parameters of the first."""
        for parameter in parameters if self.size > 1 else ():
            parameter.copy_(self.lead(parameter))


ALONE = Team()
