"""Training: one round as a generator of events, its state, and one step of it."""

from napari_convlora.training.loop import adapt

__all__ = ["adapt"]
