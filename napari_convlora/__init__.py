"""Adapt Segment Anything models to a few strokes, in napari and without it."""

__version__ = "0.1.0"
