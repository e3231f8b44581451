"""The average of the weights that training passes through, which predicts better than the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_LONGEST = 0.97
"""What an average keeps of itself in a step at most, so that long rounds forget their start."""


class WeightAverage:
    """Running average of parameters, a step's weight growing with its number.

    A few strokes leave much open, and the end of one run is a chance among many; the average lies
    between. As weights grow linearly, it covers the last half or so of however many steps there
    were (polynomial-decay averaging, Shamir and Zhang, ICML 2013).

    Parameters
    ----------
    parameters
        What training changes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._mean = [p.clone() for p in self._parameters]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Count the parameters as they are now."""
        self._steps += 1
        keep = min(_LONGEST, 1 - 2 / (self._steps + 2))
        torch._foreach_lerp_(self._mean, self._parameters, 1 - keep)

    def restart(self) -> None:
        """Forget all but the parameters as they are now."""
        self._steps = 0
        torch._foreach_copy_(self._mean, self._parameters)

    @torch.no_grad()
    def install(self) -> None:
        """Exchange the parameters and their average; twice changes nothing."""
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            last = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(last)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the average for a while."""
        self.install()
        try:
            yield
        finally:
            self.install()
