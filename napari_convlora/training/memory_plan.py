"""How a step is computed within the memory there is: what is chosen, measured and given up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MemoryPlan:
    """What decides how much memory a step needs.

    Parameters
    ----------
    device
        Where it is computed.
    batch, decoder_batch
        Views per step, once the encoder trains and before.
    checkpointing
        Whether the encoder's blocks are computed again for the gradient, instead of kept.
    """

    device: torch.device
    batch: int
    decoder_batch: int
    checkpointing: bool = False

    def views(self, decoder_only: bool) -> int:
        """Return the views per step."""
        return self.decoder_batch if decoder_only else self.batch

    def smaller(self, decoder_only: bool) -> tuple[MemoryPlan, str] | None:
        """Return the next plan with less memory and what it means; None if this is the last."""
        half = self.views(decoder_only) // 2
        if half:
            one, other = replace(self, batch=half), replace(self, decoder_batch=half)
            views = f"with {half} view{'s' * (half > 1)} per step"
            return other if decoder_only else one, views
        if not (self.checkpointing or decoder_only):
            slower = "computing the encoder's blocks twice, which is slower"
            return replace(self, checkpointing=True), slower
        if self.device.type != "cpu":
            return replace(self, device=torch.device("cpu")), "on the CPU, which is slower"
        return None


@contextmanager
def kept_bytes(model: nn.Module, limit: float = math.inf) -> Iterator[list[int]]:
    """Count what a forward pass keeps for the gradient; yields a list that holds the bytes.

    Parameters
    ----------
    model
        Its parameters do not count.
    limit
        More than this raises a `MemoryError`, before the system ends the process.
    """
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total[0] += storage.nbytes()
            if total[0] > limit:
                raise MemoryError(f"a step keeps more than {limit:.0f} bytes")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
