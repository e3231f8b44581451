"""Memory of a training step with and without blocks computed twice, and of ten rounds.

    python tools/measure/memory.py [--rounds 10] [--steps 4]

A small ViT with random weights, and LiteMedSAM at 256 px with the presets `fast` and `full`. Each
step is measured in a process of its own: what it keeps for the gradient, and its peak above the
loaded model. The rounds run one after the other in a child process, as in the window; their sizes
are those between rounds, with what is kept of frozen features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from measuring import apart, peak_memory
from rich.console import Console
from rich.table import Table
from rounds import sample

from napari_convlora.backbones import Backbone, load_backbone
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.config import ModelConfig, TrainConfig
from napari_convlora.control import Controls
from napari_convlora.events import Planned
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.labels.classes import default_classes
from napari_convlora.model.semantic_sam import SemanticSAM
from napari_convlora.session.process import Child
from napari_convlora.session.session import Session
from napari_convlora.training.losses import dense_loss
from napari_convlora.training.memory_plan import kept_bytes

CASES = {
    "small ViT, fast": ("random", None),
    "small ViT, full": ("random", 0),
    "LiteMedSAM, fast": ("litemedsam", None),
    "LiteMedSAM, full": ("litemedsam", 0),
}


def load(name: str) -> Backbone:
    """Return a backbone by name; ``random`` is a small ViT."""
    return random_backbone("vit") if name == "random" else load_backbone(name)


def step_memory(case: str, again: bool) -> tuple[int, int]:
    """Bytes that a step keeps for its gradient, and the peak of two steps above the loaded model.

    Parameters
    ----------
    case
        One of `CASES`.
    again
        Whether blocks are computed again for the gradient.
    """
    name, first = CASES[case]
    torch.manual_seed(0)
    backbone = load(name)
    model = SemanticSAM(backbone, ModelConfig(first_block=first, detail=False), 3).train()
    if again:
        model.checkpoint_blocks()
    side = backbone.spec.image_size
    features = model.prefix(torch.rand(1, 3, side, side))
    target = torch.randint(0, 3, (1, side, side))
    optimiser = torch.optim.AdamW(model.trained().values(), lr=1e-4)
    with peak_memory() as peak:
        for _ in range(2):
            with kept_bytes(model) as kept:
                logits = F.interpolate(model.suffix(features).logits, (side, side), mode="bilinear")
                loss = dense_loss(logits, target, torch.ones(3)) + model.balance_loss()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            model.eval().train()  # forgets the routing losses
    return kept[0], peak[0]


def one_round(
    name: str, config: TrainConfig, image: np.ndarray, strokes: np.ndarray
) -> Callable[[Callable[[], Session], Controls], Iterator[Any]]:
    """Return a job that runs a round and says what its session keeps then."""

    def job(session: Callable[[], Session], controls: Controls) -> Iterator[Any]:
        state = session()
        state.train_config = config
        if state._backbone is None:
            from napari_convlora.backbones import load_backbone
            from napari_convlora.backbones.testing import random_backbone

            own = random_backbone("vit") if name == "random" else load_backbone(name)
            state._backbone = (state.backbone_name, own)
        scene = [LabelledImage(image, strokes)]
        yield from state.run_round(scene, default_classes(4), controls.training)
        yield state.cache.nbytes, state.cache.disk_bytes

    return job


def session_memory(name: str, n_rounds: int, n_steps: int) -> list[tuple[float, ...]]:
    """By round: MB of the child and of this process after it, peak of a step, and of the cache.

    Every round has a stroke more than the one before.
    """
    image, strokes = sample()
    # Fitting the detail branch takes long, and no more memory for more steps.
    config = TrainConfig(max_steps=n_steps, decoder_share=0.0, views=12, detail_steps=30)
    child, session, sizes = Child(), Session(), []
    try:
        for number in range(n_rounds):
            strokes[0, 40 + 20 * number : 44 + 20 * number, 100:180] = 2
            job, peak, kept = one_round(name, config, image, strokes), 0, (0, 0)
            for messages in child.run(job, Controls(), session.installed):
                for message in messages:
                    match message:
                        case Planned():
                            peak = message.peak_memory
                        case tuple():
                            kept = message
                    session.record(message)
            after = [psutil.Process(pid).memory_info().rss for pid in (child.pid, None)]
            sizes.append(tuple(value / 1e6 for value in (*after, peak, *kept)))
    finally:
        child.close()
    return sizes


def main() -> None:
    """Print two kinds of tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    console = Console()
    table = Table("a step, MB", "kept", "kept, computed twice", "peak", "peak, computed twice")
    for case in CASES:
        (kept, peak), (less, lower) = (apart(step_memory, case, again) for again in (False, True))
        table.add_row(case, *(f"{value / 1e6:.1f}" for value in (kept, less, peak, lower)))
    console.print(table)
    for name in dict.fromkeys(name for name, _ in CASES.values()):
        table = Table(
            f"{name}, MB after round", "child", "parent", "peak of a step", "cache", "on disk"
        )
        sizes = session_memory(name, options.rounds, options.steps)
        for number, size in enumerate(sizes, 1):
            table.add_row(str(number), *(f"{value:.0f}" for value in size))
        console.print(table)


if __name__ == "__main__":
    main()
