"""Benchmarks that users can repeat: the paper, and few strokes against peers; no product code."""
