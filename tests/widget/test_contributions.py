"""The manifest, the writer and the sample data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from napari.layers import Labels
from npe2 import PluginManager, PluginManifest
from PIL import Image

import napari_convlora
from napari_convlora.labels.classes import default_classes, read_classes
from napari_convlora.widget.layers import class_colours
from napari_convlora.widget.manifest import SAMPLES, sample_classes, write_labels

PACKAGE = Path(napari_convlora.__file__).parent
MANIFEST = PACKAGE / "napari.yaml"


@pytest.fixture
def manifest() -> PluginManifest:
    """Our manifest, registered if the package is not installed."""
    manifest = PluginManifest.from_file(MANIFEST)
    manager = PluginManager.instance()
    if manifest.name not in manager:
        manager.register(manifest)
    return manifest


def test_the_manifest_is_valid_and_at_the_top_level_too():
    manifest = PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    top = PACKAGE.parent / "napari.yaml"
    if (PACKAGE.parent / "pyproject.toml").exists():
        assert top.read_text() == MANIFEST.read_text()


def test_importing_the_widget_module_does_not_import_torch():
    code = (
        "import sys, napari_convlora.widget.panel, napari_convlora.widget.manifest; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_the_widget_opens_from_the_plugins_menu(make_napari_viewer, manifest, qtbot):
    viewer = make_napari_viewer()
    _, widget = viewer.window.add_plugin_dock_widget("napari-convlora", "Conv-LoRA")
    assert widget.status.startswith("Open an image to begin")
    assert widget.workflow.runner.close(60)


@pytest.mark.parametrize("key", ["sandstone", "nuclei"])
def test_samples_open_with_strokes_and_classes(
    make_napari_viewer, manifest, make_widget, key, qtbot
):
    viewer = make_napari_viewer()
    widget = make_widget(viewer)
    viewer.open_sample("napari-convlora", key)
    assert [layer.name for layer in viewer.layers] == [key, "annotations"]
    assert widget.classes == sample_classes(key)
    assert widget.source.annotations_combo.value == viewer.layers["annotations"]
    ids = [info.id for info in widget.classes]
    qtbot.waitUntil(lambda: list(widget.images.counts.pixels) == ids)
    assert widget.status.startswith("Press Adapt to learn from")
    strokes = viewer.layers["annotations"].data
    truth = np.asarray(Image.open(SAMPLES / f"{key}_truth.png"))
    assert np.array_equal(strokes[strokes > 0], truth[strokes > 0])
    assert 0.02 < (strokes > 0).mean() < 0.05


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_saving_a_labels_layer_writes_the_class_table(
    make_napari_viewer, manifest, tmp_path, suffix
):
    viewer = make_napari_viewer()
    data = np.arange(12).reshape(3, 4).astype(np.int32) % 3
    classes = default_classes(2)
    layer = Labels(data, **class_colours.attributes(classes, "prediction", "x"))
    viewer.add_layer(layer)
    path = str(tmp_path / f"masks{suffix}")
    assert viewer.layers.save(path, plugin="napari-convlora") == [path]
    read = tifffile.imread(path) if suffix == ".tif" else np.asarray(Image.open(path))
    assert np.array_equal(read, data)
    rows = json.loads((tmp_path / "classes.json").read_text())["classes"]
    assert [r["colour"] for r in rows] == [info.colour for info in classes]


def test_the_writer_recovers_names_and_colours_without_our_metadata(tmp_path):
    layer = Labels(
        np.array([[0, 1], [7, 9]]),
        features={"index": [0, 7], "name": ["nothing", "vessel"]},
        colormap={0: "transparent", 7: "#ff0000", None: "black"},
    )
    data, meta, _ = layer.as_layer_data_tuple()
    write_labels(str(tmp_path / "m.tif"), data, meta)
    rows = json.loads((tmp_path / "classes.json").read_text())["classes"]
    assert [(r["id"], r["name"]) for r in rows] == [
        (1, "background"),
        (7, "vessel"),
        (9, "class 9"),
    ]
    assert rows[1]["colour"] == "#ff0000"


def test_the_writer_writes_stacks_and_instance_maps(tmp_path):
    stack = np.zeros((2, 3, 4, 5), np.int32)
    write_labels(str(tmp_path / "s.tif"), stack, {})
    assert tifffile.imread(tmp_path / "s.tif").shape == (6, 4, 5)
    cells = np.arange(20).reshape(4, 5) * 100
    write_labels(str(tmp_path / "cells.tif"), cells, {})
    assert np.array_equal(tifffile.imread(tmp_path / "cells.tif"), cells)


def test_the_writer_renames_no_older_masks_and_says_where_its_names_are(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("napari_convlora.widget.manifest.show_info", said.append)
    data = np.array([[1, 2]])
    for name, title in (("a.tif", "root"), ("b.tif", "stem")):
        layer = Labels(data, features={"index": [1, 2], "name": ["soil", title]})
        write_labels(str(tmp_path / name), *layer.as_layer_data_tuple()[:2])
    names = [[c.name for c in read_classes(tmp_path / f"{own}classes.json")] for own in _TABLES]
    assert names == [["soil", "root"], ["soil", "stem"]]
    (sentence,) = said
    assert sentence.startswith("The class names of b.tif are in b.tif.classes.json")


_TABLES = ("", "b.tif.")
