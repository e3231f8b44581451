"""Make the files in ``data``: what the code of commit f410e0a writes and predicts.

They are never made anew with later code, as they stand for what people have on their disks. To see
where they come from, or to add one, run this file with the code of that commit::

    git worktree add --detach ../old f410e0a
    cp tests/compatibility/make_files.py /tmp
    (cd /tmp && PYTHONPATH=$OLDPWD/../old python make_files.py /tmp/old-files)
    git worktree remove ../old

Everything is tiny and drawn from fixed seeds. The backbone's random weights are kept, in half
precision, so that nothing hangs on how today's code or another torch would draw them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

import napari_convlora.session
from napari_convlora import (
    Adapter,
    ClassInfo,
    LabelledImage,
    MethodConfig,
    ModelConfig,
    TrainConfig,
    adapt,
    predict,
)
from napari_convlora.backbones.testing import random_backbone
from napari_convlora.project import ImageEntry, Manifest, Project, Settings, View

CLASSES = (
    ClassInfo(1, "matrix", "#4477aa", background=True),
    ClassInfo(2, "Körner", "#ee6677"),
    ClassInfo(7, "stripes", "#228833"),
)
QUICK = TrainConfig(
    max_steps=100, views=6, detail_steps=200, score_every=25, patience=99, device="cpu"
)
MODELS = {
    "conv_lora": ModelConfig(method_config=MethodConfig(rank=4, scales=(1, 2, 4), top_k=2)),
    "classification_branch": ModelConfig(head="classification_branch", queries=6, detail=False),
    "decoder_only": ModelConfig(method="decoder_only", detail=False),
}
SETTINGS = Settings(
    "litemedsam", ModelConfig(method="lora", detail=False), replace(QUICK, max_steps=40)
)


def main(out: Path) -> None:
    """Make all files in `out`, which is new."""
    torch.set_num_threads(1)
    for name in ("images", "adapters"):
        (out / name).mkdir(parents=True)
    backbone = random_backbone()
    halves = {n: t.half() for n, t in backbone.state_dict().items() if t.is_floating_point()}
    save_file(halves, out / "backbone.safetensors")
    backbone.load_state_dict(halves, strict=False)

    stack, stack_labels = draw(planes=2, seed=1)
    tifffile.imwrite(out / "images" / "stack.tif", stack, photometric="rgb", compression="zlib")
    colours, labels = draw(planes=1, seed=2)
    Image.fromarray(colours[0]).save(out / "images" / "colours.png")
    found: dict[str, np.ndarray] = {}
    for name, model in MODELS.items():
        *_, last = adapt(backbone, [LabelledImage(colours, labels)], CLASSES, model, QUICK)
        last.adapter.save(out / "adapters" / f"{name}.safetensors")
        found |= predicted(name, last.adapter, backbone, colours)

    napari_convlora.session.load_backbone = lambda name: backbone
    project = make_project(out, colours, stack_labels)
    with TemporaryDirectory() as masks:
        command("predict", "--project", project.folder, "--out", masks)
        for path in Path(masks).glob("*.tif"):
            found[f"mask_{path.stem}"] = tifffile.imread(path)
    project = Project.open(project.folder)
    found |= predicted("lora", project.rounds.adapter(2), backbone, colours)
    project.rounds.export_recipe(1, out / "recipe" / "mine.json")
    (out / "said.json").write_text(json.dumps(said(project), indent=1, ensure_ascii=False) + "\n")
    project.close()
    np.savez_compressed(out / "predictions.npz", **found)


def draw(planes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an RGB image (P, H, W, 3) uint8 with three bands, and a stroke (P, H, W) in each."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((planes, 48, 60), np.int32)
    for i, c in enumerate(CLASSES):
        truth[:, :, 20 * i : 20 * (i + 1)] = c.id
    image = np.zeros((*truth.shape, 3))
    for c, colour in zip(CLASSES, ((60, 50, 40), (200, 180, 90), (90, 120, 200)), strict=True):
        image[truth == c.id] = colour
    image[:, ::4, 40:] += 40
    image += rng.normal(0, 6, image.shape)
    strokes = np.zeros_like(truth)
    strokes[:, 6:42, 8:11] = strokes[:, 6:42, 28:31] = strokes[:, 6:42, 48:51] = 1
    return image.clip(0, 255).astype(np.uint8), strokes * truth


def predicted(
    name: str, adapter: Adapter, backbone: Any, image: np.ndarray
) -> dict[str, np.ndarray]:
    """Return class ids, and probabilities of every third pixel, by names that start with `name`."""
    steps = predict(adapter, backbone, image, probabilities=True, device="cpu")
    while True:
        try:
            next(steps)
        except StopIteration as end:
            some = end.value.probabilities[..., ::3, ::3]
            return {name: end.value.labels, f"{name}_probabilities": some}


def make_project(out: Path, colours: np.ndarray, stack_labels: np.ndarray) -> Project:
    """Annotate three images, adapt twice, and go on painting; returns the closed project."""
    project = Project.create(out / "project", Manifest(classes=CLASSES, settings=SETTINGS))
    stack = project.add_file(out / "images" / "stack.tif").stem
    shape = colours.shape
    layer = ImageEntry("", "colours / RGB", "", "", shape, shape[1:], rgb=True, dtype="uint8")
    copied = project.add(replace(layer, scale=(0.5, 0.5), translate=(3.0, 4.0)), colours).stem
    dropped = project.add(replace(layer, name="dropped"), colours[:, ::-1]).stem

    first = np.where(np.arange(2)[:, None, None] == 0, stack_labels, 0)
    project.keep_annotations(stack, first)
    project.keep_annotations(dropped, first[:1])
    project.remove(dropped)
    corner = np.array([[-0.5, -0.5], [-0.5, 15.5], [11.5, 15.5], [11.5, -0.5]])
    project.keep_annotations(copied, np.zeros(shape[:3], np.int32), [(0, corner)])
    project.close()
    command("adapt", "--project", project.folder)
    command("predict", "--project", project.folder)

    project = Project.open(project.folder)
    for stem in (stack, copied):
        project.rounds.keep_prediction(1, stem, project.prediction(stem))
    project.keep_annotations(stack, stack_labels)
    project.close()
    command("adapt", "--project", project.folder, "--start", "installed", "--max-steps", "20")

    project = Project.open(project.folder)
    stack_labels[1, 44:46, 5:15] = 1  # since the last round
    project.keep_annotations(stack, stack_labels)
    project.keep_view(copied, View((0.0, 0.0), (0.0, 12.0, 15.0), 8.0, (0.0, 255.0)))
    merged = {9: 2}  # there had been a class 9
    project.update(lambda m: replace(m, current=copied, automatic=True, merged=merged))
    project.close()
    return project


def said(project: Project) -> dict[str, Any]:
    """Return what the project says about itself, as JSON."""
    return {
        "manifest": asdict(project.manifest),
        "rounds": [asdict(record) for record in project.rounds.records()],
        "correction": asdict(project.rounds.corrections(1)),
        "annotations": {
            entry.stem: [
                np.unique(labels, return_counts=True)[1].tolist(),
                [[plane, outline.tolist()] for plane, outline in regions],
            ]
            for entry in project.manifest.images
            for labels, regions in [project.annotated(entry.stem)]
        },
    }


def command(*arguments: object) -> None:
    """Run the command line."""
    from napari_convlora import cli

    assert cli.main([*map(str, arguments)]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
