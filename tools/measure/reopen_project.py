"""How soon a project of 20 images is back in the window, and whether it is as it was left.

    xvfb-run -a -s "-screen 0 1600x1000x24" python tools/measure/reopen_project.py [--images 20]

Makes a project of images of 512 x 512 pixels, each with strokes of three classes and a prediction,
and three rounds of LiteMedSAM (a few steps each, learnt from the first image; each round keeps the
annotations and predictions of all). Opens it twice in a window: once right after the panel was
docked, when its process is still starting, and once later. Seconds are counted from asking for the
project until its image and strokes are shown, and until the installed round can predict.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from skimage.data import binary_blobs

from napari_convlora.backbones import load_backbone
from napari_convlora.config import ClassInfo, TrainConfig
from napari_convlora.events import Finished
from napari_convlora.labels.annotations import LabelledImage
from napari_convlora.model.adapter import Adapter
from napari_convlora.project import Manifest, Project, Settings
from napari_convlora.training import adapt

SIDE = 512
CLASSES = (
    ClassInfo(1, "background", "#808080"),
    ClassInfo(2, "fibre", "#1b9e77"),
    ClassInfo(3, "pore", "#d95f02"),
)
ROUNDS, INSTALLED = 3, 2
BAR = 5.0
SETTINGS = Settings(train=TrainConfig(max_steps=2, detail_steps=20, views=2))


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image (H, W) uint8, strokes and a prediction (1, H, W) int32."""
    truth = 1 + binary_blobs(SIDE, volume_fraction=0.3, rng=seed)
    truth[binary_blobs(SIDE, volume_fraction=0.1, rng=seed + 1000)] = 3
    rng = np.random.default_rng(seed)
    image = (70 * truth + rng.normal(0, 10, truth.shape)).clip(0, 255).astype(np.uint8)
    strokes = np.where(rng.random((SIDE // 8, SIDE // 8)) < 0.05, 1, 0).repeat(8, 0).repeat(8, 1)
    return image, (strokes * truth)[None].astype(np.int32), truth[None].astype(np.int32)


def learn(image: np.ndarray, strokes: np.ndarray) -> Adapter:
    """Return what a round of a few steps learns."""
    scenes = [LabelledImage(image.reshape(1, SIDE, SIDE, 1), strokes)]
    *_, last = adapt(load_backbone("litemedsam"), scenes, CLASSES, config=SETTINGS.train)
    assert isinstance(last, Finished), last
    return last.adapter


def make(folder: Path, images: int) -> str:
    """Make the project; returns the stem of the image that is current."""
    project = Project.create(folder / "project", Manifest(classes=CLASSES, settings=SETTINGS))
    labels, predictions = {}, {}
    for i in range(images):
        image, strokes, predicted = scene(i)
        path = folder / f"image{i:02d}.tif"
        tifffile.imwrite(path, image)
        stem = project.add_file(path).stem
        project.keep_annotations(stem, strokes)
        project.keep_prediction(stem, predicted)
        labels[stem], predictions[stem] = (strokes, ()), predicted  # no reviewed regions
    adapter = learn(*scene(0)[:2])
    for _ in range(ROUNDS):
        number = project.rounds.add(adapter, labels, SETTINGS).number
        for stem, predicted in predictions.items():
            project.rounds.keep_prediction(number, stem, predicted)
    project.install(INSTALLED)
    current = list(labels)[images * 2 // 3]
    project.update(lambda m: replace(m, current=current))
    project.close()
    return current


def wait(seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Run the event loop for some seconds, or until something is the case."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        QApplication.processEvents()
        time.sleep(0.002)


def reopen(folder: Path, current: str, images: int, *, rested: bool) -> tuple[float, float]:
    """Return seconds until the image is shown, and until everything is back; checks what is."""
    import napari
    from qtpy.QtWidgets import QApplication

    viewer = napari.Viewer(show=True, show_welcome_screen=False)
    viewer.window.resize(1280, 800)
    wait(1)
    _, panel = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    ready: list[object] = []
    panel.workflow.ready.connect(ready.append)
    if rested:
        wait(120, lambda: bool(ready))
        wait(10)  # its process loads the backbone
    start = time.perf_counter()
    panel.keeper.open(folder / "project")
    for _ in range(5):
        QApplication.processEvents()
    shown = time.perf_counter() - start
    wait(120, lambda: not panel.running and panel.workflow.has_adapter)
    wait(120, lambda: len(panel.history.curve) == ROUNDS)
    back = time.perf_counter() - start

    check("the current image", panel.keeper.current == current)
    check("the class table", panel.classes == CLASSES)
    check("the installed round", panel.history.installed == INSTALLED)
    check("the list of rounds", panel.rounds.table.rowCount() == ROUNDS)
    check("the list of images", panel.project.images.count() == images)
    for i, entry in enumerate(panel.keeper.entries):
        panel.keeper.show_image(entry.stem)
        _, strokes, predicted = scene(i)
        annotations = viewer.layers["annotations"].data
        check(f"strokes of {entry.name}", np.array_equal(annotations, strokes[0]))
        labels = np.where(strokes[0] > 0, strokes[0], predicted[0])
        check(
            f"prediction of {entry.name}", np.array_equal(viewer.layers["prediction"].data, labels)
        )
    panel.keeper.show_image(current)
    viewer.close()
    wait(2)
    return shown, back


def check(what: str, same: bool) -> None:
    """End with a sentence if something is not as it was."""
    if not same:
        raise SystemExit(f"Not as it was: {what}.")


def main() -> None:
    """Make the project, open it twice, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["NAPARI_CONVLORA_RECOVERY"] = str(folder / "recovery")
        os.environ["NAPARI_CONFIG"] = str(folder / "settings.yaml")
        current = make(folder, options.images)
        for rested, when in ((False, "right after the panel was docked"), (True, "later")):
            shown, back = reopen(folder, current, options.images, rested=rested)
            verdict = "under" if back < BAR else "OVER"
            print(
                f"{when}: image and strokes after {shown:.1f} s, everything after {back:.1f} s, "
                f"{verdict} the bar of {BAR:.0f} s; strokes, predictions, classes, installed round "
                "and current image are where they were",
                flush=True,
            )


if __name__ == "__main__":
    main()
