"""The demonstration: the real widget, driven through two rounds on a sample image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from napari_convlora.errors import ConvLoRAError

if TYPE_CHECKING:
    import numpy as np
    from napari.layers import Labels

    from napari_convlora.widget.panel import ConvLoRAWidget

_SAMPLE = "sandstone"
_PATIENCE = 20 * 60  # seconds until a round counts as stuck
_STROKES = 6
_MINUTES = 1.5  # a round's limit: on two cores the whole demo stays well under five minutes


def run_demo(out: Path, *, headless: bool = False) -> int:
    """Open the sample, adapt, correct as a person would, adapt again, and export.

    Without a display the same runs on a virtual one (Linux, ``xvfb-run``).

    Parameters
    ----------
    out
        Folder for masks, adapter, history and screenshot; made if absent.
    headless
        End after the loop instead of leaving the window to the user.

    Returns
    -------
    int
        Exit code: 0 when done.

    Raises
    ------
    ConvLoRAError
        If there is no display and no virtual one, or a round ends without an adapter.
    """
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        return _on_virtual_screen(out)
    if not headless:
        return _run(out, headless)
    # Nobody will ask for these strokes again, and they would displace what a user left unsaved.
    with TemporaryDirectory(ignore_cleanup_errors=True) as aside:
        os.environ["NAPARI_CONVLORA_RECOVERY"] = aside
        return _run(out, headless)


def _on_virtual_screen(out: Path) -> int:
    xvfb = shutil.which("xvfb-run")
    if xvfb is None:
        raise ConvLoRAError(
            "There is no display to open napari on; run this on a desktop, or install xvfb "
            "(apt-get install xvfb) to run it without one."
        )
    environment = {k: v for k, v in os.environ.items() if k != "QT_QPA_PLATFORM"}
    demo = [sys.executable, "-m", "napari_convlora", "demo", "--headless", "--out", str(out)]
    screen = [xvfb, "-a", "-s", "-screen 0 1600x1000x24"]
    return subprocess.run([*screen, *demo], env=environment, check=False).returncode


def _run(out: Path, headless: bool) -> int:
    import napari

    from napari_convlora.exports.history_csv import write_history
    from napari_convlora.files.atomic import make_folder

    console = Console(soft_wrap=True, highlight=False, markup=False)
    make_folder(out)
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1500, 950)
    viewer.open_sample("napari-convlora", _SAMPLE)
    _, widget = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    widget.settings.max_minutes.value = _MINUTES
    history: list[Any] = []
    failures: list[str] = []
    flow = widget.workflow
    flow.stepped.connect(history.extend)
    flow.scored.connect(history.append)
    flow.said.connect(lambda sentence: console.print(f"  {sentence}") if sentence else None)
    flow.failed.connect(lambda sentence, _: failures.append(sentence))
    annotations = viewer.layers["annotations"]
    console.print(f"Opened the {_SAMPLE} sample with strokes on {_share(annotations.data)}.")
    for number in (1, 2):
        console.print(f"Round {number}:")
        history.clear()
        start = time.monotonic()
        widget.adapt()
        _wait(widget, failures)
        score, took = _score(viewer.layers["prediction"]), time.monotonic() - start
        console.print(f"  mean IoU {score:.3f} against the ground truth, {took:.0f} s")
        if number == 1:
            console.print(f"Correcting with {_STROKES} strokes where the prediction is wrong.")
            _correct(viewer.layers["prediction"], _truth())
    write_history(out / "history.csv", history)
    widget.export_masks(out / "masks.tif")
    widget.export_masks(out / "masks.png")
    widget.export_adapter(out / "adapter.safetensors")
    _process_events(0.4)  # until everything is drawn
    viewer.screenshot(str(out / "window.png"), canvas_only=False, flash=False)
    console.print(f"Masks, adapter, history and a screenshot are in {out}.")
    if headless:
        viewer.close()
    else:
        napari.run()
    return 0


def _wait(widget: ConvLoRAWidget, failures: list[str]) -> None:
    """Wait for the end of a round, which fails if it takes too long."""
    limit = time.monotonic() + _PATIENCE
    while widget.running and time.monotonic() < limit:
        _process_events(0.01)
    _process_events(0)
    if widget.running:
        widget.stop()
        failures.append("The round took too long and was stopped.")
    if failures:
        raise ConvLoRAError(failures[0])


def _process_events(seconds: float) -> None:
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    QApplication.processEvents()
    while time.monotonic() < end:
        time.sleep(0.01)
        QApplication.processEvents()


def _truth() -> np.ndarray:
    from skimage.io import imread

    from napari_convlora.widget.manifest import SAMPLES

    return imread(SAMPLES / f"{_SAMPLE}_truth.png")


def _score(prediction: Labels) -> float:
    """Return the mean IoU of a prediction against the ground truth."""
    import numpy as np

    from napari_convlora.evaluation.metrics import confusion, scores
    from napari_convlora.widget.manifest import sample_classes

    truth, classes = _truth(), sample_classes(_SAMPLE)
    labels = np.asarray(prediction.data).reshape(truth.shape)
    return float(scores(confusion(labels, truth, len(classes)), classes).mean_iou)


def _share(labels: np.ndarray) -> str:
    return f"{(labels != 0).mean():.1%} of the pixels"


def _correct(prediction: Labels, truth: np.ndarray) -> None:
    """Paint dabs of the true class into the largest wrong regions, as a person would."""
    import numpy as np
    from scipy import ndimage

    for _ in range(_STROKES):
        labels = np.asarray(prediction.data)
        wrong = (labels.reshape(truth.shape) != truth) & (truth != 0)
        depth = ndimage.distance_transform_edt(wrong)
        at = np.unravel_index(depth.argmax(), depth.shape)
        if depth[at] == 0:
            return
        prediction.brush_size = max(1, int(2 * depth[at]) - 1)
        prediction.paint(at if labels.ndim == 2 else (0, *at), int(truth[at]))
