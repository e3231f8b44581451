from __future__ import annotations

from pathlib import Path

import pytest

from napari_convlora.project import recovery
from napari_convlora.widget import demo


@pytest.mark.parametrize("headless", [False, True])
def test_a_demo_that_nobody_watches_leaves_unsaved_work_alone(
    headless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("NAPARI_CONVLORA_RECOVERY", str(tmp_path))
    seen: list[Path] = []

    def run(out: Path, headless: bool) -> int:
        seen.append(recovery.root())
        seen[0].mkdir(exist_ok=True)
        return 0

    monkeypatch.setattr(demo, "_run", run)
    assert demo.run_demo(tmp_path / "out", headless=headless) == 0
    assert (seen[0].parent == tmp_path) is not headless
    assert seen[0].exists() is not headless
