"""The class table, alone and beside the layers it colours."""

from __future__ import annotations

import numpy as np
import pytest
from qtpy.QtWidgets import QMessageBox

from napari_convlora.annotations import default_classes
from napari_convlora.config import ClassInfo, InputError
from napari_convlora.widget.class_table import ClassTable


@pytest.fixture
def table(qtbot) -> ClassTable:
    table = ClassTable(default_classes(2))
    qtbot.addWidget(table)
    return table


def test_the_first_class_is_the_background(table):
    assert [info.name for info in table.classes] == ["background", "class 2"]
    assert table.current == 1


def test_add_takes_the_next_id_and_selects_it(table, qtbot):
    with qtbot.waitSignals([table.changed, table.selected]):
        info = table.add("nucleus", "#123456")
    assert info == ClassInfo(3, "nucleus", "#123456")
    assert table.current == 3


def test_renaming_inline_tells_everyone(table, qtbot):
    with qtbot.waitSignal(table.changed):
        table._table.item(1, 2).setText("  nucleus ")
    assert table.classes[1].name == "nucleus"


@pytest.mark.parametrize("name", ["", "  ", "BACKGROUND", "a\u202eb", "x" * 201])
def test_bad_names_are_refused_in_one_sentence(table, qtbot, name):
    with qtbot.waitSignal(table.refused) as refused:
        table._table.item(1, 2).setText(name)
    assert refused.args[0].count("\n") == 0
    assert table._table.item(1, 2).text() == "class 2"
    with pytest.raises(InputError):
        table.rename(2, name)


def test_default_names_never_collide(table):
    table.rename(2, "class 3")
    assert table.add().name == "class 3 (2)"


def test_a_removed_class_comes_back_under_its_name(table):
    table.rename(2, "nucleus")
    table.remove(2)
    assert [info.id for info in table.classes] == [1]
    assert table.add().id == 3  # its pixels may come back by undo, so its id is not used again
    table.ensure(default_classes([2]))
    assert [info.name for info in table.classes] == ["background", "nucleus", "class 3"]


def test_a_full_table_says_so(qtbot):
    table = ClassTable(default_classes(255))
    qtbot.addWidget(table)
    with pytest.raises(InputError, match="full with 255"):
        table.add()


def test_names_and_colours_reach_both_layers(ready, wait):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.table.rename(2, "nucleus")
    widget.table.recolour(2, "#ff0000")
    for name in ("annotations", "prediction"):
        layer = viewer.layers[name]
        assert np.allclose(layer.colormap.color_dict[2], (1, 0, 0, 1))
        assert list(layer.features["name"]) == ["unlabelled", "background", "nucleus"]
        assert "nucleus" in layer.get_status((30, 71), world=True)["value"]


def test_selecting_a_row_selects_the_label_to_paint_with(ready):
    viewer, widget = ready()
    widget.table._table.setCurrentCell(1, 2)
    assert viewer.layers["annotations"].selected_label == 2
    widget.table.add()
    assert viewer.layers["annotations"].selected_label == 3


def test_removing_a_painted_class_asks_and_is_undoable(ready, qtbot, monkeypatch):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    answers = [QMessageBox.StandardButton.No, QMessageBox.StandardButton.Yes]
    asked = []

    def question(*args):
        asked.append(args[2])
        return answers[len(asked) - 1]

    monkeypatch.setattr(QMessageBox, "question", question)
    widget.table.rename(2, "nucleus")
    widget.table.select(2)
    widget.table._remove.click()
    assert (layer.data == 2).any()
    widget.table._remove.click()
    assert not (layer.data == 2).any()
    assert "150 painted pixels" in asked[0]
    assert [info.id for info in widget.classes] == [1]
    layer.undo()
    qtbot.waitUntil(lambda: len(widget.classes) == 2)
    assert (layer.data == 2).sum() == 150
    assert widget.classes[1].name == "nucleus"


def test_removing_a_class_keeps_corrections_of_others(ready, paint, wait):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    widget.table.add("third")
    paint(viewer.layers["prediction"], 3, 40)
    widget.remove_class(2)
    assert not (viewer.layers["prediction"].data == 2).any()
    assert not (viewer.layers["annotations"].data == 2).any()
    assert (viewer.layers["annotations"].data == 3).sum() == 150


def test_painting_an_id_outside_the_table_adds_it(ready, paint, qtbot):
    viewer, widget = ready()
    paint(viewer.layers["annotations"], 5, 40)
    qtbot.waitUntil(lambda: widget.images.counts.pixels.get(5) == 150)
    assert [info.id for info in widget.classes] == [1, 2, 5]
    assert widget.table._table.item(2, 4).text() == "150"
