"""The command line: what can be said on it, and what it does; no work of its own."""

from napari_convlora.cli.parser import main

__all__ = ["main"]
