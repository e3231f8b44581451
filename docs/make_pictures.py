"""Draw the pictures of the documentation: the real window, driven on a sample image.

    xvfb-run -a -s "-screen 0 1600x1000x24" python docs/make_pictures.py [--only error ...] [--tiny]

Writes `docs/pictures/STATE-THEME.png`, 1280 x 720, for every state and both of napari's themes.
Takes some minutes, most of them two rounds on LiteMedSAM. Pictures need not be equal from one
computer to the next: fonts differ.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parent / "pictures"
SIZE = 1280, 720
SAMPLE = "nuclei"
STATES = ("empty", "annotating", "training", "finished", "correcting", "reviewing", "rounds")
STATES += ("error",)
PATIENCE = 600  # seconds until a round counts as stuck


class Window:
    """A napari window with the panel docked, and what a user does in it."""

    def __init__(self, wanted: list[str], steps: int, tiny: bool) -> None:
        import napari

        from napari_convlora.backbones.testing import random_backbone
        from napari_convlora.session.session import Session
        from napari_convlora.widget import ConvLoRAWidget

        self.viewer = napari.Viewer(show=True)
        self.viewer.window.resize(*SIZE)
        self.wanted, self.steps = wanted, steps
        session = Session(_backbone=("litemedsam", random_backbone())) if tiny else None
        self.panel = ConvLoRAWidget(self.viewer, session)
        self.viewer.window.add_dock_widget(self.panel, name="Conv-LoRA (napari-convlora)")
        self.panel.settings.max_steps.value = steps

    def rest(self, seconds: float = 0.6, until: Callable[[], bool] = lambda: False) -> None:
        """Let the window work for some seconds, or until something is the case."""
        from qtpy.QtWidgets import QApplication

        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            QApplication.processEvents()
            time.sleep(0.01)

    def finish(self) -> None:
        """Wait until nothing runs."""
        self.rest(PATIENCE, lambda: not self.panel.running)
        if self.panel.running:
            raise SystemExit("The round took too long; try again with fewer --steps.")
        self.rest()

    def dismiss(self) -> None:
        """Close napari's notifications, as a user does."""
        from napari._qt.dialogs.qt_notification import NapariQtNotification

        for notification in self.viewer.window._qt_window.findChildren(NapariQtNotification):
            notification.close()
        self.rest()

    def show(self, part) -> None:
        """Scroll the panel so that `part` is in sight."""
        from qtpy.QtWidgets import QScrollArea

        scroll = self.panel.findChild(QScrollArea)
        self.rest(0.2)
        scroll.ensureWidgetVisible(part, 0, 0)
        self.rest(0.2)

    def shoot(self, state: str) -> None:
        """Save the window in both themes, each with few colours so that files stay small."""
        if state not in self.wanted:
            return
        for theme in ("dark", "light"):
            self.viewer.theme = theme
            self.rest()
            pixels = self.viewer.screenshot(canvas_only=False, flash=False)
            picture = Image.fromarray(pixels).convert("RGB")
            few_colours(picture).save(OUT / f"{state}-{theme}.png", optimize=True)
        self.viewer.theme = "dark"
        self.rest(0.2)
        print(f"{state}: {self.panel.status}", flush=True)


def few_colours(picture: Image.Image) -> Image.Image:
    """Return `picture` in 256 colours: most for what is common, some for rare ones, as classes."""
    palette = Image.new("P", (1, 1))
    common = picture.quantize(216, Image.Quantize.MEDIANCUT).getpalette()
    rare = picture.quantize(40, Image.Quantize.MAXCOVERAGE).getpalette()
    palette.putpalette([*common[: 3 * 216], *rare[: 3 * 40]])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def strokes(layer, sample: np.ndarray, class_id: int, most: int) -> None:
    """Paint the longest strokes of a class that the sample brings, each as one undo item."""
    from skimage.measure import label

    parts = label(sample == class_id)
    sizes = np.bincount(parts.ravel())[1:]
    for part in 1 + np.argsort(sizes)[::-1][:most]:
        layer.data_setitem(np.nonzero(parts == part), class_id)


def correct(layer, prediction: np.ndarray, truth: np.ndarray, dabs: int) -> None:
    """Paint dabs of the true class into the largest mistakes, as a person would."""
    from scipy import ndimage

    wrong = prediction != truth
    for _ in range(dabs):
        depth = ndimage.distance_transform_edt(wrong & (layer.data == 0))
        at = np.unravel_index(depth.argmax(), depth.shape)
        dab = np.hypot(*(np.indices(depth.shape) - np.reshape(at, (2, 1, 1)))) < depth[at]
        layer.data_setitem(np.nonzero(dab), truth[at])


def draw(wanted: list[str], steps: int, tiny: bool) -> None:
    """Go through the states in the order in which a user meets them."""
    from napari_convlora.widget.manifest import SAMPLES

    image, painted, truth = (
        np.array(Image.open(SAMPLES / f"{SAMPLE}{end}.png")) for end in ("", "_strokes", "_truth")
    )
    window = Window(wanted, steps, tiny)
    viewer, panel = window.viewer, window.panel
    window.rest(3)
    window.shoot("empty")

    viewer.add_image(image, name=SAMPLE)
    panel.start_annotating()
    annotations = viewer.layers["annotations"]
    panel.table.rename(2, "nucleus")
    strokes(annotations, painted, 1, 4)
    window.rest(1)
    if "error" in wanted:
        panel.adapt()
        window.finish()
        window.rest(1)
        window.shoot("error")
        window.dismiss()
    panel.table._table.selectRow(1)
    strokes(annotations, painted, 2, 4)
    window.rest(1)
    window.shoot("annotating")
    if not {"training", "finished", "correcting", "reviewing", "rounds"} & set(wanted):
        viewer.close()
        return

    panel.adapt()
    window.rest(PATIENCE, lambda: len(panel.plot.losses) >= 2 * steps // 3 or not panel.running)
    window.shoot("training")
    window.finish()
    window.shoot("finished")

    correct(annotations, viewer.layers["prediction"].data, truth, 4)
    window.rest(1)
    window.shoot("correcting")
    panel.adapt()
    window.finish()
    if "rounds" in wanted:
        unfold(panel, panel.rounds)
        window.show(panel.rounds)
        window.shoot("rounds")
        unfold(panel, panel.rounds)
    if "reviewing" in wanted:
        unfold(panel, panel.review)
        panel.review.next_button.click()
        window.finish()
        viewer.layers["uncertainty"].visible = True
        viewer.layers["prediction"].visible = False
        window.show(panel.review)
        window.shoot("reviewing")
    viewer.close()


def unfold(panel, section) -> None:
    """Press the button above a section."""
    from napari_convlora.widget.form import Unfolding

    next(b for b in panel.findChildren(Unfolding) if b._content is section).click()


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--steps", type=int, default=45, help="of a round")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model of random weights: quick, poor masks"
    )
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Neither the user's settings nor unsaved work of theirs belongs in a picture.
        os.environ["NAPARI_CONFIG"] = str(Path(folder) / "settings.yaml")
        os.environ["NAPARI_CONVLORA_RECOVERY"] = str(Path(folder) / "recovery")
        draw(options.only, options.steps, options.tiny)


if __name__ == "__main__":
    main()
