"""How soon a SAM prompt is answered in the window: when idle, and while a round trains.

    xvfb-run -a -s "-screen 0 1600x1000x24" python tools/measure/prompt_latency.py

Gives boxes and clicks to the prompt tool of a docked panel, on the sandstone sample, and counts
seconds from the release of the mouse until the pixels are painted. Prompts are answered in a
process of their own by LiteMedSAM. Before the first box of all, the tool has been taken up for some
seconds; part of its answer is the embedding of that part of the image.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from painting import sample, wait

from napari_convlora.prediction.prompts import Box, Click, Prompt


def main() -> None:
    """Print medians and the slowest."""
    import napari

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=512, help="of the image, in pixels")
    parser.add_argument("--count", type=int, default=10, help="of boxes, and of clicks")
    options = parser.parse_args()
    viewer = napari.Viewer(show=True, show_welcome_screen=False)
    viewer.window.resize(1280, 800)
    for pixels, about, kind in sample(options.side):
        getattr(viewer, f"add_{kind}")(pixels, **about)
    _, panel = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    panel.start_annotating()
    wait(10)
    panel.prompts.button.click()
    wait(10)
    rng = np.random.default_rng(0)
    print(f"first box: {answer(panel.prompts, box(rng, options.side)):.2f} s")
    report(panel.prompts, rng, options, "idle")
    taken: list[object] = []
    panel.workflow.stepped.connect(taken.extend)
    panel.adapt()
    wait(300, lambda: bool(taken))
    report(panel.prompts, rng, options, "while a round trains")
    if not panel.running:
        raise SystemExit("The round was over before the prompts were; ask for fewer of them.")
    panel.stop()
    wait(120, lambda: not panel.running)
    viewer.close()


def box(rng: np.random.Generator, side: int) -> Prompt:
    """Return a box of a tenth to a quarter of the image, somewhere."""
    height, width = rng.uniform(side / 10, side / 4, 2)
    top, left = rng.uniform(0, side - height), rng.uniform(0, side - width)
    return Prompt(box=Box(top, left, top + height, left + width))


def report(tool, rng: np.random.Generator, options: argparse.Namespace, when: str) -> None:
    """Give boxes, then clicks, and print how long they took."""
    boxes = [box(rng, options.side) for _ in range(options.count)]
    places = rng.uniform(0, options.side - 1, (options.count, 2)).tolist()
    for what, prompts in (("box", boxes), ("click", [Prompt((Click(*p),)) for p in places])):
        seconds = [answer(tool, prompt) for prompt in prompts]
        print(f"{when}, {what}: median {np.median(seconds):.2f} s, slowest {max(seconds):.2f} s")


def answer(tool, prompt: Prompt) -> float:
    """Return how long one prompt takes."""
    begun = time.perf_counter()
    if prompt.box is not None:
        tool.add_box(0, prompt.box)
    else:
        tool.add_click(0, prompt.clicks[0])
    wait(60, lambda: not tool.runner.busy)
    took = time.perf_counter() - begun
    tool.finish()
    wait(0.2)
    return took


if __name__ == "__main__":
    main()
