"""The status line knows what it says; how it looks is another matter."""

from __future__ import annotations

import pytest

from napari_convlora.widget.sections.status_line import StatusLine


@pytest.fixture
def line(qtbot) -> StatusLine:
    line = StatusLine()
    qtbot.addWidget(line)
    return line


def test_a_bold_theme_makes_nothing_wrong(line):
    line.say("All is well.")
    font = line.font()
    font.setBold(True)
    line.setFont(font)
    assert not line.wrong


def test_what_went_wrong_stays_so_when_it_is_repeated(line):
    line.say("The disk is full.", wrong=True)
    line.say("The disk is full.")
    assert line.wrong
    assert line.font().bold()
    line.say("There is room again.")
    assert not line.wrong
    assert line.text() == line.sentence == "There is room again."
