"""How long napari's window is held up while a round trains in the background.

Opens the sandstone sample and the widget, trains a few steps on LiteMedSAM, and measures the gaps
between the ticks of a 5 ms timer in the main thread. Needs a display, for example:

    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/responsiveness.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import napari
import numpy as np
from PIL import Image
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication

from napari_convlora.widget import ConvLoRAWidget
from napari_convlora.widget.contributions import sandstone


class Heart:
    """Beats every 5 ms in the main thread and remembers when."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._timer = QTimer()
        self._timer.timeout.connect(lambda: self.times.append(time.perf_counter()))
        self._timer.start(5)

    def report(self, what: str) -> None:
        """Print the gaps since the last report."""
        gaps = 1000 * np.diff(self.times)
        self.times = self.times[-1:]  # the next phase may begin with a gap
        if len(gaps):
            late = int((gaps > 100).sum())
            print(
                f"{what}: longest gap {gaps.max():.0f} ms, 99th percentile "
                f"{np.percentile(gaps, 99):.0f} ms, median {np.median(gaps):.1f} ms, "
                f"{late} of {len(gaps)} over 100 ms"
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backbone", default="litemedsam")
    parser.add_argument("--paint", action="store_true", help="paint 30 times a second meanwhile")
    parser.add_argument("--size", default="1280x800", metavar="WxH", help="of the window")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="of the finished round")
    parser.add_argument("--during", type=Path, metavar="PNG", help="of the window while training")
    parser.add_argument("--empty", type=Path, metavar="PNG", help="of the window before any image")
    options = parser.parse_args()

    viewer = napari.Viewer(show=True, show_welcome_screen=False)
    viewer.window.resize(*map(int, options.size.split("x")))
    wait(0.5)
    heart = Heart()
    widget = ConvLoRAWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Conv-LoRA")
    wait(6, until=lambda: widget.session is not None)
    wait(0.5)
    heart.report("opening the widget, importing torch")
    if options.empty:
        shoot(viewer, options.empty)
    for data, attributes, kind in sandstone():
        getattr(viewer, f"add_{kind}")(data, **attributes)
    widget.source.choose_backbone(options.backbone)
    widget.settings.max_steps.value = options.steps
    wait(1)
    heart.report("opening the sample")

    start = time.perf_counter()
    widget.adapt()
    wait(0.3)
    heart.report("pressing Adapt, which adds a layer")
    wait(600, until=lambda: widget.plot.losses or not widget.running)
    heart.report("loading, detail branch, first preview")
    print(f"first step after {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    strokes = 0
    while widget.workflow.phase == "training":
        wait(0.03)
        if options.paint:
            strokes += 1
            paint(viewer.layers["annotations"], strokes)
        if options.during and len(widget.plot.losses) >= options.steps // 2:
            shoot(viewer, options.during)
            options.during = None
            heart.times = []  # what the picture took
    heart.report("training")
    print(f"{(len(widget.plot.losses) - 1) / (time.perf_counter() - start):.2f} steps/s")
    wait(600, until=lambda: not widget.running)
    heart.report("predicting")
    wait(1)
    print(widget.status)
    if options.screenshot:
        shoot(viewer, options.screenshot)
    viewer.close()


def wait(seconds: float, until=lambda: False) -> None:
    """Run the event loop for some seconds, or until something is the case."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        QApplication.processEvents()
        time.sleep(0.001)


def paint(layer: napari.layers.Labels, stroke: int) -> None:
    """Paint a short stroke at the left edge."""
    row = 10 + stroke % 300
    layer.data_setitem((np.full(20, row), np.arange(2, 22)), 1 + stroke % 2)


def shoot(viewer: napari.Viewer, path: Path) -> None:
    """Save the whole window."""
    Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)).save(path)


if __name__ == "__main__":
    main()
