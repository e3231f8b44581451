"""SAM prompts through a real viewer: mouse, keys, undo."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils.interactions import (
    mouse_move_callbacks,
    mouse_press_callbacks,
    mouse_release_callbacks,
)


@pytest.fixture
def tool(ready, qtbot):
    """A widget with the tool taken up, and ways to click, drag and wait."""
    viewer, widget = ready()
    prompts = widget.prompts
    prompts.button.click()
    layer = viewer.layers["annotations"]
    layer.selected_label = 2

    def event(kind, at, **more):
        return SimpleNamespace(
            type=kind, position=at, pos=np.asarray(at)[::-1] * 10, camera_zoom=10.0,
            **{"button": 1, "modifiers": (), "is_dragging": kind == "mouse_move",
               "view_direction": None, "dims_displayed": [0, 1], "handled": False, **more},
        )  # fmt: skip

    def drag(*points, settle=True, **more):
        mouse_press_callbacks(layer, event("mouse_press", points[0], **more))
        for at in points[1:]:
            mouse_move_callbacks(layer, event("mouse_move", at, **more))
        mouse_release_callbacks(layer, event("mouse_release", points[-1], **more))
        if settle:
            qtbot.waitUntil(lambda: not prompts.runner.busy, timeout=20_000)

    yield SimpleNamespace(viewer=viewer, widget=widget, prompts=prompts, layer=layer, drag=drag)
    assert prompts.runner.close(20)


def test_a_box_fills_the_current_class_as_one_undo_step(tool):
    before = tool.layer.data.copy()
    tool.drag((20, 30), (40, 40), (60, 55))
    changed = tool.layer.data != before
    assert changed.any(), tool.prompts.words.text()
    assert (tool.layer.data[changed] == 2).all()
    assert (tool.layer.data == 1).sum() == 150  # what another class had is left alone
    tool.layer.undo()
    assert (tool.layer.data == before).all()
