"""What the window says of memory: what is kept, what a step takes, and that less has to do."""

from __future__ import annotations

import re

import numpy as np
from qtpy.QtCore import QEvent, QObject

from napari_convlora.events import Step
from napari_convlora.training import guarded_steps
from napari_convlora.widget.sections.run_bar import RunBar


class Paints(QObject):
    """Counts how often a widget is drawn."""

    count = 0

    def eventFilter(self, widget, event):
        self.count += event.type() == QEvent.Type.Paint
        return False


def test_the_cache_is_shown_and_can_be_emptied(ready, wait):
    _, widget = ready(max_steps=4)
    section = widget.memory
    assert "0.0 MB in memory, 0.0 MB on disk" in section.kept.text()
    assert not section.empty_button.isEnabled()
    widget.adapt()
    assert not section.empty_button.isEnabled()
    wait(widget)
    assert widget.session.cache.nbytes > 0
    assert f"{widget.session.cache.nbytes / 1e6:.1f} MB in memory" in section.kept.text()
    assert section.taken.text().startswith("Last round: ")
    section.empty_button.click()
    wait(widget)
    assert widget.session.cache.nbytes == len(widget.session.cache) == 0
    assert "0.0 MB in memory" in section.kept.text()
    assert widget.status == "The cache is empty; the next round computes the features again."
    assert not section.empty_button.isEnabled()
    assert widget.run_bar.main_button.text() == "Adapt"
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 2 is done")
    assert widget.session.cache.nbytes > 0


def test_the_status_says_what_a_step_takes_and_that_memory_ran_out(ready, wait, monkeypatch):
    train_step, calls, said = guarded_steps.train_step, [], []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 3:
            np.ones(2**50)
        return train_step(*arguments)

    monkeypatch.setattr(guarded_steps, "train_step", once)
    _, widget = ready(max_steps=6)
    widget.workflow.said.connect(said.append)
    widget.adapt()
    wait(widget)
    assert "Memory ran out at step 3; the round goes on with 1 view per step." in said
    assert any(sentence.startswith("A step takes ") for sentence in said)
    assert widget.status.startswith("Round 1 is done")
    assert len(widget.plot.losses) == 6


def test_the_time_left_is_that_of_the_last_step_and_changes_once_a_second(qtbot):
    bar = RunBar()
    qtbot.addWidget(bar)
    bar.restart()
    bar.show_steps([Step(3, 100, 1.0, 3.0)])
    assert bar.words.text() == "step 3 of 100", "not yet known"
    bar.show_steps([Step(13, 100, 1.0, 13.0, 140.0)])
    assert bar.words.text() == "step 13 of 100 · 1.00 s per step · about 2 min 20 s left"
    bar.show_steps([Step(14, 100, 1.0, 13.9, 300.0)])
    assert bar.words.text().startswith("step 13 of 100")
    assert bar.bar.value() == 14
    bar.show_steps([Step(15, 100, 1.0, 14.0, 300.0)])
    assert bar.words.text().endswith("about 5 min 00 s left")
    bar.show_steps([Step(99, 100, 1.0, 99.9, 0.4)])
    bar.show_steps([Step(100, 100, 1.0, 100.0, 0.0)])
    assert bar.words.text().startswith("step 100 of 100"), "the last one is shown at once"


def seconds(bar):
    found = re.fullmatch(r"preparing · (\d+) s", bar.words.text())
    return int(found[1]) if found else 0


def test_a_bar_that_cannot_count_yet_counts_seconds_and_is_not_drawn_all_the_time(qtbot):
    bar = RunBar()
    qtbot.addWidget(bar)
    bar.show()
    bar.show_state("starting", paused=False, can_adapt=False)
    paints = Paints(bar)
    qtbot.waitUntil(lambda: seconds(bar) >= 1, timeout=5000)
    bar.bar.installEventFilter(paints)
    bar.show_state("starting", paused=False, can_adapt=False)
    qtbot.waitUntil(lambda: seconds(bar) >= 3, timeout=5000)
    assert paints.count < 5, "Qt draws an indeterminate one 25 times a second or more"
    bar.show_steps([Step(1, 10, 1.0, 3.0)])
    assert bar.words.text() == "step 1 of 10"
    qtbot.wait(1200)
    assert bar.words.text() == "step 1 of 10"
