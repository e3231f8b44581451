"""A stack is predicted plane by plane, what is on screen first, and shown as it comes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from napari_convlora.events import Progress
from napari_convlora.labels.annotations import protect
from napari_convlora.model.iteration import Returning
from napari_convlora.session import jobs
from napari_convlora.widget.layers import showing

PLANES = 5


@pytest.fixture
def adapted(make_viewer, make_widget, halves, paint, wait):
    """Viewer and widget on a stack after a round, with the fourth plane on screen."""
    viewer = make_viewer()
    viewer.add_image(np.stack([np.roll(halves, 7 * p, 1) for p in range(PLANES)]), name="stack")
    widget = make_widget(viewer)
    layer = widget.start_annotating()
    paint(layer, 1, 10, plane=(0,))
    paint(layer, 2, 70, plane=(0,))
    widget.adapt()
    wait(widget)
    viewer.dims.set_current_step(0, 3)
    return viewer, widget


@pytest.fixture
def hold(monkeypatch):
    """Let predictions wait after two planes until the event that is returned is set."""

    def make(session):
        go_on, waiting = threading.Event(), threading.Event()
        predict = session.predict_blocks

        def slowly(*arguments, **options):
            done = 0
            for step in predict(*arguments, **options):
                yield step
                done += not isinstance(step, Progress)
                if done == 2:
                    waiting.set()
                    assert go_on.wait(20)

        monkeypatch.setattr(session, "predict_blocks", slowly)
        return go_on, waiting

    return make


def test_the_plane_on_screen_comes_first_then_its_neighbours(adapted, wait, monkeypatch):
    viewer, widget = adapted
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_PARTS", 0)
    planes, told = [], []
    show = showing.show_parts
    monkeypatch.setattr(
        showing,
        "show_parts",
        lambda record, parts: (planes.append([b.plane for b, _ in parts]), show(record, parts)),
    )
    widget.workflow.predicted.connect(lambda _, labels: told.append(labels))
    viewer.layers["prediction"].data[:] = 0
    widget.predict()
    wait(widget)
    assert planes == [[3], [2], [4], [1], [0]]
    whole = Returning(widget.session.predict(viewer.layers["stack"].data[..., None]))
    list(whole)
    expected = whole.value.labels
    assert (told[0] == expected).all()
    painted = viewer.layers["annotations"].data
    assert (viewer.layers["prediction"].data == protect(expected, painted)).all()
    assert widget.status.startswith("The prediction is ready")


def test_the_plane_on_screen_is_shown_while_others_are_predicted(adapted, hold, wait, qtbot):
    viewer, widget = adapted
    prediction = viewer.layers["prediction"]
    go_on, _ = hold(widget.session)
    prediction.data[:] = 0
    widget.predict()
    qtbot.waitUntil(lambda: prediction.data[3].any(), timeout=20_000)
    assert not prediction.data[[0, 1, 4]].any()
    go_on.set()
    wait(widget)
    assert prediction.data.all()


def test_stop_keeps_the_planes_that_are_done_and_says_so(adapted, hold, wait, qtbot):
    viewer, widget = adapted
    prediction, record = viewer.layers["prediction"], widget.images.current
    go_on, waiting = hold(widget.session)
    showing.show(record, np.zeros(record.planes_shape, np.uint8))
    before = prediction.data.copy()
    widget.predict()
    qtbot.waitUntil(waiting.is_set, timeout=20_000)
    widget.stop()
    go_on.set()
    wait(widget)
    assert prediction.data[[2, 3]].all()
    assert (prediction.data[[0, 1, 4]] == before[[0, 1, 4]]).all()
    assert widget.status == (
        "The prediction was stopped: what was done by then is shown, the rest is as before; "
        "press Predict for all of it."
    )


def test_a_round_whose_prediction_is_stopped_says_both(adapted, hold, wait, qtbot):
    _, widget = adapted
    go_on, waiting = hold(widget.session)
    widget.adapt()
    qtbot.waitUntil(waiting.is_set, timeout=20_000)
    widget.stop()
    go_on.set()
    wait(widget)
    assert widget.status.startswith("Round 2 is done")
    assert "The prediction was stopped" in widget.status
    assert "Export masks" not in widget.status


def test_after_a_round_the_plane_looked_at_by_then_comes_first(adapted, wait, qtbot, monkeypatch):
    viewer, widget = adapted
    predict, planes = widget.session.predict_blocks, []

    def spy(image, blocks, *arguments, **options):
        planes.extend(b.plane for b in blocks)
        return predict(image, blocks, *arguments, **options)

    monkeypatch.setattr(widget.session, "predict_blocks", spy)
    widget.settings.max_steps.value = 5000
    widget.adapt()
    qtbot.waitUntil(lambda: len(widget.plot.losses) > 1, timeout=20_000)
    viewer.dims.set_current_step(0, 1)
    widget.stop()
    wait(widget)
    assert planes == [1, 0, 2, 3, 4]


def test_what_is_painted_meanwhile_stays(adapted, hold, wait, qtbot, paint):
    viewer, widget = adapted
    prediction, record = viewer.layers["prediction"], widget.images.current
    go_on, _ = hold(widget.session)
    showing.show(record, np.ones(record.planes_shape, np.uint8))
    widget.predict()
    paint(prediction, 2, 30, plane=(0,))
    paint(viewer.layers["annotations"], 2, 40, plane=(1,))
    qtbot.waitUntil(lambda: widget.workflow.phase == "predicting", timeout=20_000)
    go_on.set()
    wait(widget)
    for name in ("annotations", "prediction"):
        assert (viewer.layers[name].data[0, 10:60, 30:33] == 2).all()
        assert (viewer.layers[name].data[1, 10:60, 40:43] == 2).all()
