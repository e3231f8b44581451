"""What a Conv-LoRA layer costs beyond LoRA: ours against AutoGluon's, forward and backward.

    python tools/measure/autogluon_layer.py CHECKOUT [--repeats 20] [--dim 768] [--cpu-time]

The qkv projection of ViT-B on 25 windows of 14 x 14 tokens and on one global map of 64 x 64, each
layer against its own LoRA. All four take turns in one process, so that a busy machine slows all.
Both layers have AutoGluon's settings: rank 3, eight experts of scales 1 to 8, one chosen per map.
Ours is also shown with its default scales. Nothing of AutoGluon is contained here.

What comes beyond LoRA does not depend on the width of the frozen layer: with `--dim 24` that does
not drown it, and with `--cpu-time` and OMP_NUM_THREADS=1 other programs disturb little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from napari_convlora.config import MethodConfig
from napari_convlora.peft.conv_lora import ConvLoRALinear
from napari_convlora.peft.lora import LoRALinear

_LAYERS = "multimodal/src/autogluon/multimodal/models/adaptation_layers.py"
_RANK, _EXPERTS = 3, 8
SHAPES = {"25 windows": (25, 14, 14), "global": (1, 64, 64)}


def autogluon(checkout: Path) -> ModuleType:
    """Load the module with AutoGluon's layers, which needs torch and numpy only."""
    spec = spec_from_file_location("autogluon_layers", checkout / _LAYERS)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers(theirs: ModuleType, dim: int) -> dict[str, nn.Module]:
    """All layers, in training mode, with weights that let gradients reach every part."""
    torch.manual_seed(0)
    sizes = dim, 3 * dim
    paper = MethodConfig(rank=_RANK, scales=tuple(range(1, _EXPERTS + 1)), top_k=1)
    found: dict[str, nn.Module] = {
        "AutoGluon LoRA": theirs.LoRALinear(*sizes, r=_RANK, lora_alpha=32),
        "AutoGluon Conv-LoRA": theirs.ConvLoRALinear(
            *sizes, r=_RANK, lora_alpha=32, conv_lora_expert_num=_EXPERTS
        ),
        "our LoRA": LoRALinear(nn.Linear(*sizes), _RANK, 32),
        "our Conv-LoRA, scales 1 to 8": ConvLoRALinear(nn.Linear(*sizes), paper),
        "our Conv-LoRA, default scales": ConvLoRALinear(
            nn.Linear(*sizes), MethodConfig(rank=_RANK)
        ),
    }
    for layer in found.values():
        layer.train()
        nn.init.normal_(layer.get_parameter("lora_B"), std=0.02)
    return found


def run(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward, the routing loss included."""
    out = layer(x)
    out, routing = out if isinstance(out, tuple) else (out, getattr(layer, "balance_loss", None))
    loss = out.square().mean()
    (loss if routing is None else loss + routing).backward()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    now = time.process_time if options.cpu_time else time.perf_counter
    found = layers(autogluon(options.checkout), options.dim)
    table = Table("", *SHAPES)
    taken: dict[str, list[float]] = {}
    for shape in SHAPES.values():
        times: dict[str, list[float]] = {name: [] for name in found}
        for number in range(options.repeats + 1):
            for name, layer in found.items():
                x = torch.randn(*shape, options.dim, requires_grad=True)
                start = now()
                run(layer, x)
                if number:  # the first one warms up
                    times[name].append(now() - start)
        for name, own in times.items():
            taken.setdefault(name, []).append(statistics.median(own))
    for name, seconds in taken.items():
        table.add_row(name, *(f"{s * 1e3:.1f} ms" for s in seconds))
    columns = list(zip(*taken.values(), strict=True))
    for label, index in (("scales 1 to 8", 3), ("default scales", 4)):
        ratios = [(c[index] - c[2]) / (c[1] - c[0]) for c in columns]
        table.add_row(f"extra over LoRA, {label} / AutoGluon", *(f"{r:.2f}x" for r in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
