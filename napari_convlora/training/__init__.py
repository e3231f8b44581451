"""One round as a generator of events: data, steps, early stopping; no files, no window."""

from napari_convlora.training.loop import adapt

__all__ = ["adapt"]
