"""The status line knows what it says without reading it."""

from __future__ import annotations

from napari_convlora.widget.sections.status_line import StatusLine


def test_what_was_added_is_not_added_again_and_goes_with_its_sentence(qtbot):
    line = StatusLine()
    qtbot.addWidget(line)
    line.say("Round 1 is done.")
    for _ in range(2):
        line.add("Rounds are paused.")
    assert line.text() == line.sentence == "Round 1 is done. Rounds are paused."
    line.say("Training.", wrong=True)
    line.say("Training.")
    assert line.text() == "Training."
    assert line.wrong
    assert line.font().bold()
    line.say("Go on.", hint=True)
    assert (line.wrong, line.hinting, line.font().bold()) == (False, True, False)


def test_news_that_begin_like_a_hint_stay_when_more_is_painted(ready, paint, qtbot):
    viewer, widget = ready()
    qtbot.waitUntil(lambda: widget.status.startswith("Press Adapt to learn from"))
    news = f"{widget.status} So says a colleague."
    widget.workflow.said.emit(news)
    before = widget.images.counts
    paint(viewer.layers["annotations"], 1, 30)
    qtbot.waitUntil(lambda: widget.images.counts != before)
    assert widget.status == news
