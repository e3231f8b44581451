"""An annotator's desk: how few actions the loop takes, and that each of them has a key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from napari.utils.shortcuts import default_shortcuts
from qtpy.QtCore import QLocale, QPoint, Qt
from qtpy.QtGui import QAction, QKeySequence
from qtpy.QtTest import QTest
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QApplication,
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QLineEdit,
    QPushButton,
    QShortcut,
    QSlider,
)
from skimage.io import imsave

from napari_convlora.config import ModelConfig, TrainConfig
from napari_convlora.widget import ConvLoRAWidget
from napari_convlora.widget.form import Unfolding
from napari_convlora.widget.layers import learnable, showing

CONTROL = Qt.KeyboardModifier.ControlModifier
MOST_ACTIONS = 12

pytestmark = pytest.mark.xdist_group("shown")
"""Windows that are shown take the focus from each other: all in one process."""


class User:
    """Does what a user does to a window, through Qt's own events, and counts it."""

    def __init__(self, viewer, qtbot, drag) -> None:
        self.viewer, self.qtbot, self.drag, self.actions = viewer, qtbot, drag, []

    def act(self, what: str) -> None:
        self.actions.append(what)

    def click(self, widget) -> None:
        assert widget.isEnabled()
        assert widget.isVisible()
        self.qtbot.mouseClick(widget, Qt.MouseButton.LeftButton)
        self.act(f"click {widget.text()}")

    def key(self, key, modifier=Qt.KeyboardModifier.NoModifier, to=None) -> None:
        """Press a key wherever the keys go now; shortcuts need a window in front."""
        window = self.viewer.__wrapped__.window._qt_window
        self.qtbot.waitUntil(self.in_front)
        self.qtbot.keyClick(to or QApplication.focusWidget() or window, key, modifier)
        self.act(f"key {QKeySequence(key).toString()}")

    def type(self, words: str) -> None:
        """Type words, a key press for each of their letters."""
        for letter in words:
            self.qtbot.keyClick(QApplication.focusWidget(), letter)
            self.act(f"key {letter}")

    def in_front(self) -> bool:
        """Whether the keys go to the window; other programs may have taken them meanwhile."""
        window = self.viewer.__wrapped__.window._qt_window
        window.activateWindow()  # has no effect before the window is there
        return QApplication.activeWindow() is window

    def stroke(self, *positions) -> None:
        """Drag the mouse over the canvas with the tool in hand; painting is not counted."""
        self.viewer.__wrapped__.window._qt_viewer.canvas.native.setFocus()  # as a press does
        self.drag(self.viewer.layers.selection.active, *positions)


@pytest.fixture
def desk(make_napari_viewer_proxy, make_widget, halves, drag, tmp_path, qtbot):
    """A user at a window that is shown, with an image file, and what docks the panel."""
    imsave(tmp_path / "halves.tif", halves, check_contrast=False)
    viewer = make_napari_viewer_proxy(show=True)
    user = User(viewer, qtbot, drag)
    qtbot.waitUntil(user.in_front, timeout=30_000)

    def dock(**train) -> ConvLoRAWidget:
        panel = make_widget(viewer, **train)
        qtbot.waitUntil(panel.isVisible)
        return panel

    return user, tmp_path / "halves.tif", dock


def count_of(panel, n: int):
    """Whether the counter has come to see `n` annotated classes."""
    return lambda: len(panel.images.counts.pixels) == n


def test_a_corrected_second_round_takes_few_actions(desk, wait, qtbot):
    user, path, dock = desk
    viewer = user.viewer
    user.act("key Ctrl+O")
    user.act("double-click the file")
    viewer.open(path, plugin="napari")
    user.act("click Plugins")
    user.act("click Conv-LoRA")
    panel = dock()
    assert panel.status == learnable.next_step(panel.images)
    user.click(panel._parts.annotate)
    user.stroke((10, 10), (60, 12))  # the first class is chosen already
    user.key(Qt.Key.Key_2)
    user.stroke((10, 70), (60, 72))
    qtbot.waitUntil(count_of(panel, 2))
    assert panel.status.startswith("Press Adapt")
    user.click(panel.run_bar.main_button)
    wait(panel)
    assert panel.status.startswith("Round 1 is done")
    assert "Paint over mistakes, then press Adapt again" in panel.status
    before = viewer.layers["annotations"].data.copy()
    user.key(Qt.Key.Key_1)
    user.stroke((20, 40), (50, 40))  # over the prediction, with the brush that is in hand
    corrected = viewer.layers["annotations"].data != before
    assert corrected.sum() > 30
    user.click(panel.run_bar.main_button)
    wait(panel)
    assert panel.status.startswith("Round 2 is done")
    assert (viewer.layers["prediction"].data[corrected] == 1).all()
    learnt = panel.session.rounds[1].adapter.summary["labelled_pixels"]
    assert learnt["1"] == (viewer.layers["annotations"].data == 1).sum()
    assert len(user.actions) == 9 <= MOST_ACTIONS, user.actions


def test_a_class_is_added_and_named_in_one_go(desk, qtbot):
    user, path, dock = desk
    user.viewer.open(path, plugin="napari")
    panel = dock()
    panel.start_annotating()
    user.click(panel.table._add)
    qtbot.waitUntil(lambda: user.in_front() and isinstance(QApplication.focusWidget(), QLineEdit))
    user.type("rim")
    user.key(Qt.Key.Key_Return)
    assert user.actions == ["click Add class", "key r", "key i", "key m", "key Return"]
    qtbot.waitUntil(lambda: panel.classes[-1].name == "rim")
    assert len(panel.classes) == 3
    annotations = user.viewer.layers["annotations"]
    assert annotations.selected_label == 3
    user.key(Qt.Key.Key_2)  # goes to the canvas, not into a search of the table
    assert annotations.selected_label == 2


def test_keys_go_to_the_canvas_after_a_click_in_the_panel(desk, qtbot):
    user, path, dock = desk
    user.viewer.open(path, plugin="napari")
    panel = dock()
    panel.start_annotating()
    annotations = user.viewer.layers["annotations"]
    unfold = next(b for b in panel.findChildren(QPushButton) if b.text() == "Review ▸")
    user.click(unfold)
    user.key(Qt.Key.Key_Space)
    assert unfold.text() == "Review ▾"  # Space moves the view
    for widget in (panel.source.backbone_combo.native, panel.table._table.viewport()):
        qtbot.mouseClick(widget, Qt.MouseButton.LeftButton, pos=QPoint(5, 5))
        qtbot.keyClick(QApplication.focusWidget() or panel, Qt.Key.Key_Escape)  # a list of choices
        annotations.selected_label = 1
        user.key(Qt.Key.Key_2)
        assert annotations.selected_label == 2


def test_settings_of_a_project_do_not_take_the_keys(desk):
    user, path, dock = desk
    user.viewer.open(path, plugin="napari")
    panel = dock()
    panel.start_annotating()
    user.stroke((10, 10), (60, 12))
    panel.settings.show(ModelConfig(), TrainConfig(max_steps=41, seed=3))
    user.key(Qt.Key.Key_2)
    assert user.viewer.layers["annotations"].selected_label == 2
    assert panel.settings.train_config().max_steps == 41
    assert panel.settings.max_steps.native.lineEdit().text() == "41"


def test_keys_step_through_a_project_whose_section_is_folded(desk, halves, tmp_path, qtbot):
    user, path, dock = desk
    imsave(tmp_path / "other.tif", halves.T, check_contrast=False)
    panel = dock()
    panel.keeper.create(tmp_path / "project")
    panel.keeper.add_files([path, tmp_path / "other.tif"])
    panel.keeper.writer.flush()
    qtbot.waitUntil(lambda: panel.project.images.count() == 2)
    assert not panel.project.isVisible()
    down, up = Qt.Key.Key_PageDown, Qt.Key.Key_PageUp
    for key, name in ((down, "halves"), (down, "other"), (up, "halves")):
        user.key(key, CONTROL)
        assert panel.images.current.image.name == name


def test_the_whole_loop_by_keys(desk, wait, qtbot):
    user, path, dock = desk
    viewer = user.viewer
    viewer.open(path, plugin="napari")
    panel = dock(max_steps=100_000)
    panel.settings.train = replace(panel.settings.train, patience=100_000)  # no end before the stop
    user.key(Qt.Key.Key_B, CONTROL)
    annotations = viewer.layers["annotations"]
    assert annotations.mode == "paint"
    user.stroke((10, 10), (60, 12))
    user.key(Qt.Key.Key_2)
    user.stroke((10, 70), (60, 72))
    qtbot.waitUntil(count_of(panel, 2))
    user.key(Qt.Key.Key_Period, CONTROL)  # nothing to stop
    assert not panel.running
    user.key(Qt.Key.Key_Return, CONTROL)
    assert panel.running
    qtbot.waitUntil(lambda: len(panel.plot.losses) > 1, timeout=120_000)
    user.key(Qt.Key.Key_Return, CONTROL)  # a second time is no harm
    user.key(Qt.Key.Key_Period, CONTROL)
    wait(panel)
    assert panel.status.startswith("Round 1 was stopped")

    # The brush goes along to the prediction.
    annotations.brush_size = 7
    user.key(Qt.Key.Key_Down, CONTROL)
    prediction = viewer.layers["prediction"]
    assert viewer.layers.selection.active == prediction
    assert (prediction.mode, prediction.brush_size, prediction.selected_label) == ("paint", 7, 2)

    labels = np.ones((1, 80, 90), np.uint8)
    labels[:, 20:30, 40:50] = 2
    showing.show(panel.images.current, labels)
    painted = (annotations.data > 0).sum()
    viewer.cursor.position = (200, 200)
    user.key(Qt.Key.Key_A)
    assert panel.status == (
        "There is no prediction under the mouse; point at a region, then press A."
    )
    viewer.cursor.position = (25, 45)
    user.key(Qt.Key.Key_A)
    assert (annotations.data > 0).sum() == painted + 100
    user.key(Qt.Key.Key_Z, CONTROL)
    assert (annotations.data > 0).sum() == painted
    user.key(Qt.Key.Key_R)
    assert (prediction.data == 0).sum() == 100
    user.key(Qt.Key.Key_N)
    wait(panel)
    qtbot.waitUntil(lambda: panel.status.startswith(("Place 1", "Nothing else")))


def test_our_keys_are_none_of_naparis(desk):
    user, _, dock = desk
    before = set(user.viewer.keymap)
    window = user.viewer.__wrapped__.window._qt_window
    menus = {action.shortcut().toString() for action in window.findChildren(QAction)} - {""}
    panel = dock()
    ours = {str(key) for key in set(user.viewer.keymap) - before}
    ours |= {shortcut.key().toString() for shortcut in panel.findChildren(QShortcut)}
    assert {"A", "R", "N", "H", "Ctrl+Return", "Ctrl+Enter", "Ctrl+.", "Ctrl+B"} <= ours
    taken = menus | {
        str(key)
        for name, keys in default_shortcuts.items()
        for key in keys
        # A layer's own keys come first; these are of layers on which ours are not needed.
        if not any(kind in name for kind in ("shapes", "points", "_all_in_slice", "add_"))
    }
    assert not ours & taken


def test_every_control_says_what_it_does(desk):
    _, _, dock = desk
    panel = dock()
    kinds = (QPushButton, QCheckBox, QComboBox, QAbstractSpinBox, QSlider)
    controls = [widget for kind in kinds for widget in panel.findChildren(kind)]
    silent = [w for w in controls if not w.toolTip() and not isinstance(w, Unfolding)]
    silent = [w for w in silent if not panel.offer.isAncestorOf(w)]  # its sentence says it
    assert len(controls) > 40
    assert [getattr(w, "text", lambda: "")() or w for w in silent] == []


@pytest.mark.parametrize("language", ["de_DE", "fr_FR", "en_US", "de_CH"])
def test_a_number_means_the_same_in_every_language(
    language, make_napari_viewer_proxy, make_widget, request
):
    before = QLocale()
    request.addfinalizer(lambda: QLocale.setDefault(before))
    QLocale.setDefault(QLocale(language))
    panel = make_widget(make_napari_viewer_proxy())
    boxes = panel.findChildren(QDoubleSpinBox)
    assert len(boxes) >= 2
    for box in boxes:
        for typed in ("2.5", "2,5"):
            box.setValue(box.minimum())
            box.lineEdit().selectAll()
            QTest.keyClicks(box.lineEdit(), typed)
            assert box.value() == 2.5
            QTest.keyClick(box.lineEdit(), Qt.Key.Key_Return)
            assert box.value() == 2.5
            assert box.text() == "2.50"
            QApplication.clipboard().setText(f"1{typed}")
            box.lineEdit().selectAll()
            box.lineEdit().paste()
            assert box.value() == 12.5
        box.setValue(1234.5)
        assert box.text() == "1234.50"
        box.setValue(box.minimum())
        assert box.text() in ("no limit", "never")
    train = panel.settings.train_config()
    assert train.max_minutes is train.preview_seconds is None
