"""Whatever a user does, in whatever order: no painted pixel is lost and no thread stays behind."""

from __future__ import annotations

import threading
import time

import numpy as np
import tifffile
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from qtpy.QtCore import QEvent
from qtpy.QtWidgets import QApplication

from napari_convlora import events
from napari_convlora.prediction.predict import BlockPrediction
from napari_convlora.project import Project
from napari_convlora.session.session import Session

SIZE = (24, 30)
IMAGES = 3
EXAMPLES = 6
KINDS = (
    *("paint", "correct") * 4,
    *("undo", "adapt", "switch", "wait", "delete") * 2,
    *("stop", "save", "reopen"),
)
ACTIONS: list[str] = []


class QuickSession(Session):
    """A session whose rounds take a moment, with predictions of noise."""

    def __init__(self, adapter) -> None:
        super().__init__()
        self._taught = adapter

    def backbone(self):
        return None

    def run_round(self, images, classes, control=None):
        yield events.Started(4, {1: 1, 2: 1}, False, "cpu")
        for step in range(1, 5):
            time.sleep(0.003)
            noise = np.random.default_rng(step).integers(1, 3, SIZE).astype(np.uint8)
            yield events.Step(step, 4, 1.0, 0.1)
            yield events.Preview(0, 0, noise, "adapted")
            if control.stopping:
                break
        self.install(self._taught)
        yield events.Finished(self._taught, "stopped" if control.stopping else "steps")

    def predict_blocks(self, image, blocks, control, *, uncertainty=False):
        noise = np.random.default_rng(9).integers(1, 3, image.shape[:3]).astype(np.uint8)
        for block in blocks:
            if control.stopping:
                break
            yield BlockPrediction(block, noise[block.index])


class Actions(RuleBasedStateMachine):
    """A user at the window, who knows what is painted where.

    One rule with a weighted choice: hypothesis would leave whole kinds of action out of an example,
    and a user paints more often than anything else.
    """

    viewer = make_panel = new_folder = None  # given by the test

    def __init__(self) -> None:
        super().__init__()
        self.widget = None
        self.threads = set(threading.enumerate())

    @initialize()
    def begin(self) -> None:
        self.home = self.new_folder()
        paths = []
        for i in range(IMAGES):
            paths.append(self.home / f"image{i}.tif")
            tifffile.imwrite(paths[-1], np.random.default_rng(i).integers(0, 255, SIZE, np.uint8))
        self.widget = self.make_panel(self.viewer)
        self.keeper.create(self.home / "p")
        self.keeper.add_files(paths)
        self.keeper.writer.flush()
        # What is painted in each image, and what undo goes back to in the one that is open.
        self.painted = {f"image{i}": np.zeros(SIZE, int) for i in range(IMAGES)}
        self.undo_to: list[np.ndarray] = []
        self.keeper.step(1)

    @rule(
        kind=st.sampled_from(KINDS),
        row=st.integers(0, SIZE[0] - 4),
        column=st.integers(0, SIZE[1] - 4),
        label=st.integers(0, 2),
        by=st.sampled_from([-1, 1, 2]),
    )
    def act(self, kind: str, row: int, column: int, label: int, by: int) -> None:
        record = self.widget.images.current
        if record is None:
            kind = "switch"
        elif kind == "correct" and not (record.predicted and label):
            kind = "adapt"
        elif kind == "undo" and not (self.undo_to and record.annotating):
            kind = "paint"
        if kind == "adapt" and self.widget.running:
            kind = "wait"
        ACTIONS.append(kind)
        if kind in ("paint", "correct"):
            where = tuple(np.mgrid[row : row + 4, column : column + 4].reshape(2, -1))
            getattr(self, kind)(record, where, label)
        elif kind == "switch":
            self.switch(by)
        elif kind == "delete":
            self.delete(row)
        else:
            getattr(self, kind)()
        QApplication.processEvents()

    @property
    def keeper(self):
        return self.widget.keeper

    @property
    def truth(self) -> np.ndarray:
        """What is painted in the image that is open."""
        return self.painted[self.widget.images.current.image.name]

    def paint(self, record, where, label: int) -> None:
        layer = self.widget.start_annotating()
        before = layer.data.copy()
        layer.data_setitem(where, label)
        if (layer.data != before).any():
            self.undo_to.append(before)
        self.truth[where] = label

    def correct(self, record, where, label: int) -> None:
        record.collect_corrections()  # so that each is one item of the undo history
        self.viewer.layers.selection.active = record.prediction
        changed = record.prediction.data[where] != label
        before = self.truth.copy()
        record.prediction.data_setitem(where, label)
        self.truth[tuple(axis[changed] for axis in where)] = label
        if (before != self.truth).any():  # it becomes an annotation, sooner or later
            self.undo_to.append(before)

    def undo(self) -> None:
        layer = self.widget.images.current.annotations
        self.viewer.layers.selection.active = layer
        layer.undo()
        self.truth[:] = self.undo_to.pop()

    def adapt(self) -> None:
        self.widget.adapt()

    def stop(self) -> None:
        self.widget.stop()

    def wait(self) -> None:
        end = time.monotonic() + 20
        while self.widget.running and time.monotonic() < end:
            QApplication.processEvents()
            time.sleep(0.002)
        assert not self.widget.running

    def switch(self, by: int) -> None:
        before = self.keeper.current
        self.keeper.step(by)
        if self.keeper.current != before:
            self.undo_to.clear()

    def delete(self, which: int) -> None:
        layer = self.viewer.layers[which % len(self.viewer.layers)]
        self.viewer.layers.remove(layer.name)
        if self.widget.images.current is None:
            self.undo_to.clear()

    def save(self) -> None:
        self.keeper.save()

    def reopen(self) -> None:
        self.close()
        self.widget = self.make_panel(self.viewer)
        self.keeper.open(self.home / "p")
        self.wait()
        self.undo_to.clear()

    def close(self) -> None:
        """End the panel, as the window does, and see that all is on disk and nothing runs."""
        self.wait()
        keeper = self.keeper
        self.widget.deleteLater()
        self.widget = None
        end = time.monotonic() + 20
        while not keeper.closed and time.monotonic() < end:
            QApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
            QApplication.processEvents()
        self.viewer.layers.clear()
        project = Project.open(self.home / "p")
        for name, painted in self.painted.items():
            found, note = project.annotations(name)
            assert note == ""
            found = np.zeros((1, *SIZE), int) if found is None else found
            assert (found[0] == painted).all(), name
        project.close()
        while (left := self.left()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not left

    def left(self) -> set[threading.Thread]:
        return {t for t in set(threading.enumerate()) - self.threads if t.is_alive()}

    def teardown(self) -> None:
        if self.widget is not None:
            self.close()


def test_no_painted_pixel_is_lost_and_no_thread_stays(
    make_viewer, make_widget, adapter, tmp_path_factory
):
    class Given(Actions):
        viewer = make_viewer()
        make_panel = staticmethod(lambda v: make_widget(v, session=QuickSession(adapter)))
        new_folder = staticmethod(lambda: tmp_path_factory.mktemp("actions"))

    ACTIONS.clear()
    begun = time.monotonic()
    run_state_machine_as_test(
        Given,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=45,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
    kinds = {kind: ACTIONS.count(kind) for kind in sorted(set(ACTIONS))}
    print(f"{len(ACTIONS)} actions in {time.monotonic() - begun:.0f} s: {kinds}")
    assert len(ACTIONS) >= 200
    assert set(kinds) == set(KINDS)
