"""Benchmarks that users can repeat: the paper's protocol, and few strokes against peers."""
