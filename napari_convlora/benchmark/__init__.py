"""Benchmarks that anyone can repeat: ``napari-convlora benchmark``."""
