"""The annotate, adapt, correct loop without a window, and its own process; no Qt, no napari."""
