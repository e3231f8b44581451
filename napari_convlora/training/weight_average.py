"""The average of the weights that training passes through, which predicts better than the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._mean = [p.detach().clone() for p in parameters]
        self._steps = 0

    def update(self) -> None:
        """Count the parameters as they are now."""
        self._steps += 1
        keep = min(_LONGEST, 1 - 2 / (self._steps + 2))
        torch._foreach_lerp_(self._here(), self._now(), 1 - keep)

    def restart(self) -> None:
        """Forget all but the parameters as they are now."""
        self._steps = 0
        torch._foreach_copy_(self._here(), self._now())

    def install(self) -> None:
        """Exchange the parameters and their average; twice changes nothing."""
        last = [p.clone() for p in self._now()]
        torch._foreach_copy_(self._now(), self._here())
        self._mean = last

    def _now(self) -> list[Tensor]:
        return [p.detach() for p in self._parameters]

    def _here(self) -> list[Tensor]:
        """Return the average, where the parameters are: a round may move to another device."""
        self._mean = [
            mean.to(p.device) for mean, p in zip(self._mean, self._parameters, strict=True)
        ]
        return self._mean

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the average for a while."""
        self.install()
        try:
            yield
        finally:
            self.install()
