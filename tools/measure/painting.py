"""What training and painting cost each other, with the trainer in a process of its own.

Trains the same round three times: in a plain process without a window, in an idle window, and in a
window where a hand paints without a break, 30 mouse events a second. Prints steps per second and
their ratios, the gaps between ticks of a 5 ms timer in the window's main thread, and the time from
a mouse event that changes pixels to the end of the drawing that shows it, with and without training
and with a prediction shown in both. The plain process runs before and after, as a check on how
quiet the machine was. Needs a display, for example:

    xvfb-run -a -s "-screen 0 1600x1000x24" python tools/measure/painting.py

Training leaves a core to the window in all three; `--threads` gives the plain process another
number of torch threads. A pace leaves the first step out, and everything that comes before it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections import deque

import numpy as np

from napari_convlora.config import TrainConfig
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.widget.manifest import sample_classes, sandstone

RATE = 30
LOST = 1.0  # seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backbone", default="litemedsam")
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--seconds", type=float, default=20, help="of painting without training")
    parser.add_argument("--threads", type=int, help="of the process without a window")
    parser.add_argument("--no-window", action="store_true", help="only print that pace")
    options = parser.parse_args()
    if options.no_window:
        print(json.dumps(alone(options)))
        return
    before = in_plain_process()
    idle, painting = in_window(options)
    after = in_plain_process()
    plain = (before + after) / 2
    print(f"no window: {before:.2f} steps/s before, {after:.2f} after")
    print(f"idle window: {idle:.2f} steps/s, {idle / plain:.2f}x")
    print(f"while painting: {painting:.2f} steps/s, {painting / plain:.2f}x")


def sample(side: int) -> list[tuple]:
    """Return the layers of the sandstone sample, enlarged: the image and its strokes."""
    (image, about_image, _), (labels, about_labels, _) = sandstone()
    return [
        (enlarged(image, side), about_image, "image"),
        (enlarged(labels, side), about_labels, "labels"),
    ]


def enlarged(array: np.ndarray, side: int) -> np.ndarray:
    """Repeat pixels until `array` has `side` rows and columns."""
    rows, columns = (np.arange(side) * extent // side for extent in array.shape)
    return array[np.ix_(rows, columns)]


def config(options: argparse.Namespace) -> TrainConfig:
    """Return the settings of all rounds, which never end early."""
    return TrainConfig(max_steps=options.steps, patience=options.steps, device="cpu")


def in_plain_process() -> float:
    """Train in another process, and return its pace."""
    command = [sys.executable, __file__, *sys.argv[1:], "--no-window"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def alone(options: argparse.Namespace) -> float:
    """Train here."""
    import torch

    from napari_convlora import adapt, load_backbone
    from napari_convlora.devices import leave_a_core
    from napari_convlora.events import Step

    leave_a_core()
    if options.threads:
        torch.set_num_threads(options.threads)
    image, labels = (pixels[None] for pixels, _, _ in sample(options.side))
    round_ = adapt(
        load_backbone(options.backbone),
        [LabelledImage(image[..., None], labels)],
        sample_classes("sandstone"),
        config=config(options),
    )
    return pace([event for event in round_ if isinstance(event, Step)])


def pace(steps: list) -> float:
    """Return steps per second after the first one."""
    return (len(steps) - 1) / (steps[-1].seconds - steps[0].seconds)


def in_window(options: argparse.Namespace) -> tuple[float, float]:
    """Train in an idle window, then while painting; return both paces."""
    import napari

    from napari_convlora.widget import ConvLoRAWidget

    viewer = napari.Viewer(show=True, show_welcome_screen=False)
    viewer.window.resize(1280, 800)
    for pixels, about, kind in sample(options.side):
        getattr(viewer, f"add_{kind}")(pixels, **about)
    widget = ConvLoRAWidget(viewer)
    ready = threading.Event()
    widget.workflow.ready.connect(lambda _: ready.set())
    viewer.window.add_dock_widget(widget, name="Conv-LoRA")
    layer = widget.start_annotating()
    widget.source.choose_backbone(options.backbone)
    widget.settings.train = config(options)
    widget.settings.max_steps.value = options.steps
    widget.settings.device.value = "cpu"
    taken: list = []
    widget.workflow.stepped.connect(taken.extend)
    heart, hand = Heart(), Hand(viewer, layer)
    wait(120, until=ready.is_set)
    wait(2)

    def train() -> float:
        taken.clear()
        widget.adapt()
        wait(600, until=lambda: taken or not widget.running)
        heart.forget()
        hand.forget()
        wait(3600, until=lambda: len(taken) >= options.steps or not widget.running)
        if len(taken) < options.steps:
            raise SystemExit(widget.status)
        return pace(taken)

    idle = train()
    heart.report("training in an idle window")
    wait(600, until=lambda: not widget.running)

    hand.paint()
    wait(2)
    heart.forget()
    hand.forget()
    wait(options.seconds)
    hand.rest()
    heart.report("painting without training")
    undisturbed = hand.report("painting without training")

    hand.paint()
    painting = train()
    hand.rest()
    heart.report("painting while training")
    disturbed = hand.report("painting while training")
    print(f"median latency while training: {disturbed / undisturbed:.2f}x")
    wait(600, until=lambda: not widget.running)
    print(widget.status)
    viewer.close()
    return idle, painting


class Heart:
    """Beats every 5 ms in the main thread and remembers when."""

    def __init__(self) -> None:
        from qtpy.QtCore import Qt, QTimer

        self.times: list[float] = []
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.timeout.connect(lambda: self.times.append(time.perf_counter()))
        self._timer.start(5)

    def forget(self) -> None:
        """Begin anew."""
        self.times = self.times[-1:]

    def report(self, what: str) -> None:
        """Print the gaps."""
        gaps = 1000 * np.diff(self.times)
        print(
            f"{what}: event loop gaps median {np.median(gaps):.1f} ms, 99th percentile "
            f"{np.percentile(gaps, 99):.0f} ms, longest {gaps.max():.0f} ms"
        )
        self.forget()


class Hand:
    """Drags the mouse over the canvas with the brush, and takes another class every second.

    Events are posted by a thread, so that a window that is late is seen to be late. One that finds
    its class there already changes nothing and is not drawn: it does not count.
    """

    def __init__(self, viewer, layer) -> None:
        self._layer = layer
        canvas = viewer.window._qt_viewer.canvas
        self._native = canvas.native
        scene = canvas._scene_canvas
        scene.events.mouse_move.connect(self._on_handled, position="last")
        scene.events.draw.connect(self._on_drawn, position="last")
        layer.events.labels_update.connect(self._on_changed)
        self._posted: deque[float] = deque()
        self._handled: list[float] = []
        self._resting = threading.Event()
        self._thread: threading.Thread | None = None
        self.latencies: list[float] = []
        self._n_handled = self._n_lost = 0
        self._changed = False

    def paint(self) -> None:
        """Press the button and move until `rest`."""
        self._resting.clear()
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """Release the button."""
        self._resting.set()
        assert self._thread is not None
        self._thread.join()
        wait(1)

    def forget(self) -> None:
        """Begin anew."""
        self.latencies = []
        self._n_lost = 0

    def report(self, what: str) -> float:
        """Print and return the median latency in milliseconds."""
        found = 1000 * np.array(self.latencies)
        median = float(np.median(found))
        print(
            f"{what}: stroke to screen median {median:.1f} ms, 90th percentile "
            f"{np.percentile(found, 90):.0f} ms, {len(found)} events, {self._n_lost} not "
            f"seen within {LOST} s"
        )
        self.forget()
        return median

    def _move(self) -> None:
        from qtpy.QtCore import QEvent

        begin, k = time.perf_counter(), 0
        self._post(QEvent.Type.MouseButtonPress, 0)
        while not self._resting.is_set():
            k += 1
            time.sleep(max(0.0, begin + k / RATE - time.perf_counter()))
            if self._posted and time.perf_counter() - self._posted[0] > LOST:
                self._posted.clear()
                self._n_lost += 1
            if not self._posted:  # a late window sees fewer events, as with a real mouse
                self._posted.append(begin + k / RATE)
                self._post(QEvent.Type.MouseMove, k)
        self._post(QEvent.Type.MouseButtonRelease, k)

    def _post(self, kind, k: int) -> None:
        from qtpy.QtCore import QCoreApplication, QPointF, Qt
        from qtpy.QtGui import QMouseEvent

        width, height = self._native.width(), self._native.height()
        radius = min(width, height) / 8
        angle = k / RATE * 2
        at = QPointF(
            width / 2 + radius * math.cos(angle), height / 2 + radius * math.sin(angle * 1.1)
        )
        moving = kind.name == "MouseMove"
        left = Qt.MouseButton.LeftButton
        event = QMouseEvent(
            kind,
            at,
            at,
            Qt.MouseButton.NoButton if moving else left,
            Qt.MouseButton.NoButton if kind.name == "MouseButtonRelease" else left,
            Qt.KeyboardModifier.NoModifier,
        )
        QCoreApplication.postEvent(self._native, event)

    def _on_handled(self, event: object) -> None:
        if self._posted:
            posted = self._posted.popleft()
            if self._changed:
                self._handled.append(posted)
            self._changed = False
            self._n_handled += 1
            self._layer.selected_label = 1 + self._n_handled // RATE % 4

    def _on_changed(self, event: object) -> None:
        self._changed = True

    def _on_drawn(self, event: object) -> None:
        now = time.perf_counter()
        self.latencies += [now - posted for posted in self._handled]
        self._handled = []


def wait(seconds: float, until=lambda: False) -> None:
    """Run the event loop for some seconds, or until something is the case."""
    from qtpy.QtCore import QEventLoop, QTimer

    end = time.monotonic() + seconds
    loop = QEventLoop()
    timer = QTimer()
    timer.timeout.connect(lambda: loop.quit() if until() or time.monotonic() > end else None)
    timer.start(20)
    loop.exec()


if __name__ == "__main__":
    main()
