"""A training step with Conv-LoRA against one with LoRA in the same blocks: time and memory.

    python tools/measure/step.py [--steps 8]

LiteMedSAM with the preset `fast`, and ViT-B (random weights) at 512 px with every block adapted.
Steps of the two alternate in one process, so that a busy machine slows both; memory is measured in
processes of their own. The floor is what the frozen network costs under LoRA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import apart, peak_memory
from rich.console import Console
from rich.table import Table

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.backbones.registry import REGISTRY
from napari_convlora.backbones.sam import build_vit
from napari_convlora.config import ModelConfig
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.training.losses import VOID, dense_loss

CASES = {"LiteMedSAM, fast": ("litemedsam", 256, None), "ViT-B 512 px, full": ("vit_b", 512, 0)}
METHODS = "lora", "conv_lora"


def step_of(case: str, method: str) -> Callable[[], None]:
    """Return a function that trains one step on cached frozen features."""
    name, size, first = CASES[case]
    torch.manual_seed(0)
    backbone = (
        load_backbone(name) if name == "litemedsam" else Backbone(REGISTRY[name], build_vit(name))  # type: ignore[arg-type]
    )
    config = ModelConfig(method=method, first_block=first, detail=False)  # type: ignore[arg-type]
    model = SemanticSAM(backbone, config, n_classes=3).train()
    features = model.prefix(torch.rand(1, 3, size, size))
    optimiser = torch.optim.AdamW(model.trained().values(), lr=1e-4)
    target = torch.randint(0, 3, (1, size, size))
    target[:, ::2] = VOID

    def step() -> None:
        logits = F.interpolate(model.suffix(features).logits, (size, size), mode="bilinear")
        loss = dense_loss(logits, target, torch.ones(3)) + model.balance_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def memory(case: str, method: str) -> int:
    """Peak of two steps above the loaded model, in bytes."""
    step = step_of(case, method)
    with peak_memory() as peak:
        step()
        step()
    return peak[0]


def seconds(case: str, n_steps: int) -> dict[str, float]:
    """Median seconds of a step by method."""
    steps = {method: step_of(case, method) for method in METHODS}
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(n_steps + 1):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first one warms up
                taken[method].append(time.perf_counter() - start)
    return {method: statistics.median(times) for method, times in taken.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    table = Table("", "LoRA", "Conv-LoRA", "time", "memory")
    for case in CASES:
        times = apart(seconds, case, options.steps)
        peaks = {method: apart(memory, case, method) for method in METHODS}
        table.add_row(
            case,
            *(f"{times[m] * 1e3:.0f} ms, {peaks[m] / 1e6:.0f} MB" for m in METHODS),
            f"{times['conv_lora'] / times['lora']:.2f}x",
            f"{peaks['conv_lora'] / peaks['lora']:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
