"""How long reviewing holds up napari's window, on a large image and on a stack.

Times what happens in the main thread between a press of a button and its answer; the prediction
is drawn, not computed. Needs a display, for example:

    xvfb-run -a -s "-screen 0 1600x1000x24" python tools/measure/review.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import napari
import numpy as np
from scipy.ndimage import gaussian_filter

from napari_convlora.prediction.uncertain_places import component
from napari_convlora.widget import ConvLoRAWidget
from napari_convlora.widget.layers import showing


def main() -> None:
    """Print one line per action."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096, help="of the large image, in pixels")
    parser.add_argument("--planes", type=int, default=50, help="of a stack of a quarter the side")
    arguments = parser.parse_args()
    for shape in ((1, arguments.side, arguments.side), _stack(arguments)):
        _review(shape)


def _stack(arguments: argparse.Namespace) -> tuple[int, int, int]:
    return arguments.planes, arguments.side // 4, arguments.side // 4


def _review(shape: tuple[int, int, int]) -> None:
    noise = gaussian_filter(np.random.default_rng(0).random(shape, np.float32), (0, 8, 8))
    labels = 1 + (noise > np.median(noise)).astype(np.uint8)
    spread = 100 * np.exp(-np.abs(noise - np.median(noise)) / noise.std())
    viewer = napari.Viewer(show=True)
    viewer.add_image(noise, name="noise")
    widget = ConvLoRAWidget(viewer)
    viewer.window.add_dock_widget(widget)
    record = widget.images.current
    assert record is not None
    showing.show(record, labels)
    widget.workflow.changed.emit()
    review = widget.review
    review.all_planes.setChecked(True)
    widget.table.select(2)
    at = tuple(np.argwhere(labels[0] == 2)[0])
    print(f"planes, height, width: {shape}")
    _time("uncertainty layer", partial(record.extra.show_uncertainty, spread.astype(np.uint8)))
    _time("first Next", review.next_place)
    _time("later Next, worst of 30", *[review.next_place] * 30)
    _time("component at a click", partial(component, labels[0], at))
    _time("keep the previous prediction", partial(showing.keep_previous, record))
    _time("accept a class", review.by_class[True].click)
    _time("its undo", viewer.layers["annotations"].undo)
    _time("reject below 80 %", review.by_confidence[False].click)
    widget.workflow.close()
    viewer.close()


def _time(what: str, *actions: Callable[[], object]) -> None:
    seconds = []
    for action in actions:
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    print(f"  {what:32} {1000 * max(seconds):8.0f} ms")


if __name__ == "__main__":
    main()
