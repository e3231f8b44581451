"""Names to methods, and what every method has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from napari_convlora.config import ConvLoRAError, MethodConfig


@dataclass(frozen=True)
class Method:
    """One parameter-efficient method.

    Parameters
    ----------
    title
        Shown to people.
    adapts_encoder
        False when the encoder stays frozen as a whole, so that its output can be cached.
    inject
        Puts the method into encoder blocks, in place.
    """

    title: str
    adapts_encoder: bool
    inject: Callable[[Sequence[nn.Module], MethodConfig], None]


METHODS: dict[str, Method] = {}


def adapt_blocks(name: str, blocks: Sequence[nn.Module], config: MethodConfig) -> None:
    """Put the method called `name` into `blocks`, in place.

    Raises
    ------
    ConvLoRAError
        If no method has that name.
    """
    if name not in METHODS:
        raise ConvLoRAError(f"Unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    METHODS[name].inject(blocks, config)


def balance_loss(module: nn.Module) -> Tensor | float:
    """Sum of the routing losses that `module`'s layers left behind in their last forward pass.

    Returns
    -------
    Tensor or float
        Scalar; 0.0 where no layer routes.
    """
    found = (getattr(layer, "balance_loss", None) for layer in module.modules())
    losses = [loss for loss in found if isinstance(loss, Tensor)]
    return torch.stack(losses).sum() if losses else 0.0
