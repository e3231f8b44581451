"""What the window says of memory: what is kept, what a step takes, and that less has to do."""

from __future__ import annotations

import numpy as np

from napari_convlora.events import Planned, Step
from napari_convlora.training import careful
from napari_convlora.widget.run_bar import RunBar


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
    train_step, calls, said = careful.train_step, [], []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 3:
            np.ones(2**50)
        return train_step(*arguments)

    monkeypatch.setattr(careful, "train_step", once)
    _, widget = ready(max_steps=6)
    widget.workflow.said.connect(said.append)
    widget.adapt()
    wait(widget)
    assert "Memory ran out at step 3; the round goes on with 1 view per step." in said
    assert any(sentence.startswith("A step takes ") for sentence in said)
    assert widget.status.startswith("Round 1 is done")
    assert len(widget.plot.losses) == 6


def test_the_time_left_knows_of_the_slower_steps_to_come(qtbot):
    bar = RunBar()
    qtbot.addWidget(bar)
    bar.restart(100)
    bar.show_plan(Planned(2.0, 10**9, 150.0))
    bar.show_steps([Step(3, 100, 1.0, 3.0)])
    bar.show_steps([Step(13, 100, 1.0, 13.0)])
    assert bar.words.text() == "step 13 of 100 · 1.00 s per step · 2 min 20 s left"
    bar.restart(100)
    bar.show_steps([Step(1, 100, 1.0, 1.0)])
    bar.show_steps([Step(11, 100, 1.0, 6.0)])
    assert bar.words.text().endswith("44 s left")
