"""The ViT-B encoder against segment-anything's own forward: time and memory, random weights.

    python tools/measure/encoder.py [--sizes 512 1024] [--repeats 3]

Each runs in a process of its own, forward only and forward with backward to the input. The floor
counts the multiplications of projections, perceptrons and attention, without positions and padding.
"""

from __future__ import annotations

import argparse

import torch
from measuring import Cost, apart, cost
from rich.console import Console
from rich.table import Table
from torch import nn

from napari_convlora.backbones.sam import VIT_SIZES, build_vit, modeling


def official(size: int) -> nn.Module:
    """`ImageEncoderViT` of segment-anything, built for images of this size, as it needs."""
    b = VIT_SIZES["vit_b"]
    vit: nn.Module = modeling().ImageEncoderViT(
        img_size=size,
        patch_size=b.patch_size,
        embed_dim=b.embed_dim,
        depth=b.depth,
        num_heads=b.heads,
        out_chans=b.out_dim,
        use_rel_pos=True,
        window_size=b.window,
        global_attn_indexes=b.global_blocks,
    )
    return vit


def measure(ours: bool, size: int, backward: bool, repeats: int) -> Cost:
    """Measure one encoder on one random image."""
    torch.manual_seed(0)
    encoder = build_vit("vit_b").encoder if ours else official(size)
    encoder.requires_grad_(False)
    image = torch.rand(1, 3, size, size)

    def forward() -> None:
        with torch.no_grad():
            encoder(image)

    def both() -> None:
        encoder(image.clone().requires_grad_()).sum().backward()

    return cost(both if backward else forward, repeats)


def floor(size: int) -> float:
    """Multiply-adds (in units of 1e9) that a forward pass cannot do without."""
    b = VIT_SIZES["vit_b"]
    tokens = (size // b.patch_size) ** 2
    linear = 12 * b.embed_dim**2 * tokens * b.depth
    n_global = len(b.global_blocks)
    pairs = n_global * tokens**2 + (b.depth - n_global) * tokens * b.window**2
    return (linear + 2 * b.embed_dim * pairs) / 1e9


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = Table("", "segment-anything", "ours", "time", "memory", "floor")
    for size in options.sizes:
        for backward in (False, True):
            theirs, ours = (
                apart(measure, own, size, backward, options.repeats) for own in (False, True)
            )
            table.add_row(
                f"{size} px, {'forward and backward' if backward else 'forward'}",
                *(f"{c.median:.2f} s, {c.memory / 1e6:.0f} MB" for c in (theirs, ours)),
                f"{ours.median / theirs.median:.2f}x",
                f"{ours.memory / theirs.memory:.2f}x",
                f"{floor(size) * (3 if backward else 1):.0f} G multiply-adds",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
