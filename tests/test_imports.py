from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from npe2 import PluginManifest

import napari_convlora

ROOT = Path(napari_convlora.__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
    "module", ["session.session", "cli.commands", "training", "prediction.predict", "cli.doctor"]
)
def test_the_core_imports_neither_qt_nor_napari(module: str) -> None:
    found = modules_after(f"import napari_convlora.{module}")
    assert not found & {"napari", "qtpy", "superqt", "magicgui", "PyQt6", "torchvision"}


def test_importing_the_package_or_asking_for_help_does_not_wait_for_torch() -> None:
    assert "torch" not in modules_after("import napari_convlora")
    helped = "from napari_convlora.cli import main; main(['adapt', '--help'])"
    assert "torch" not in modules_after(helped)


def test_public_names_resolve() -> None:
    for name in napari_convlora.__all__:
        assert getattr(napari_convlora, name) is not None
    from napari_convlora.labels import annotations

    assert annotations.LabelledImage is napari_convlora.LabelledImage


def test_modules_keep_their_names_when_imported_from_the_package_first() -> None:
    found = modules_after("from napari_convlora import annotations; annotations.LabelledImage")
    assert "napari_convlora" in found


def test_the_manifest_is_found_and_both_paths_hold_it() -> None:
    manifest = PluginManifest.from_distribution("napari-convlora")
    assert manifest.name == "napari-convlora"
    inner, outer = ROOT / "napari_convlora" / "napari.yaml", ROOT / "napari.yaml"
    assert inner.read_bytes() == outer.read_bytes()
