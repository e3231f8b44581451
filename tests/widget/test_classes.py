"""The class table, alone and beside the layers it colours."""

from __future__ import annotations

import numpy as np
import pytest
from qtpy.QtWidgets import QMessageBox

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.classes import default_classes, read_classes, write_classes
from napari_convlora.widget.sections.class_table import ClassTable


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


def test_number_keys_choose_a_class_by_its_row(ready, press):
    viewer, widget = ready()
    widget.table.add("third")
    widget.remove_class(2)
    layer = viewer.layers["annotations"]
    layer.mode = "paint"
    press(viewer, "2")
    assert layer.selected_label == widget.table.current == 3
    press(viewer, "1")
    assert layer.selected_label == widget.table.current == 1
    press(viewer, "5")  # of no row: napari's own meaning, pick mode, would surprise
    assert layer.selected_label == 1
    assert layer.mode == "paint"
    assert widget.table._table.item(1, 0).text() == "2"


def test_keys_on_the_prediction_choose_for_both_layers(ready, wait, press):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    viewer.layers.selection.active = viewer.layers["prediction"]
    press(viewer, "2")
    assert viewer.layers["prediction"].selected_label == 2
    assert viewer.layers["annotations"].selected_label == 2


def test_merging_keeps_every_label_and_is_one_undo(ready, wait, paint, qtbot):
    viewer, widget = ready()
    layer = viewer.layers["annotations"]
    widget.table.rename(2, "nucleus")
    third = widget.table.add("nucleolus").id
    paint(layer, third, 40)
    before = layer.data.copy()
    widget.adapt()
    wait(widget)
    predicted = viewer.layers["prediction"].data.copy()
    widget.merge_class(third, 2)
    assert [info.id for info in widget.classes] == [1, 2]
    assert (layer.data == np.where(before == third, 2, before)).all()
    assert (viewer.layers["prediction"].data == np.where(predicted == third, 2, predicted)).all()
    assert widget.images.current.collect_corrections() == 0
    # The adapter still knows the class; what it predicts goes where the class went.
    widget.predict()
    wait(widget)
    assert set(np.unique(viewer.layers["prediction"].data)) <= {1, 2}
    layer.undo()
    assert (layer.data == before).all()
    qtbot.waitUntil(lambda: len(widget.classes) == 3)
    assert widget.classes[2].name == "nucleolus"


def test_a_removed_class_is_not_predicted_any_more(ready, wait, paint):
    viewer, widget = ready()
    paint(viewer.layers["annotations"], widget.table.add().id, 40)
    widget.adapt()
    wait(widget)
    widget.remove_class(3)
    widget.predict()
    wait(widget)
    assert set(np.unique(viewer.layers["prediction"].data)) <= {0, 1, 2}


def test_the_menu_merges_the_selected_class_into_another(table, qtbot):
    table.select(2)
    table._list_targets()
    (action,) = table._merge.actions()
    with qtbot.waitSignal(table.merge_asked) as asked:
        action.trigger()
    assert asked.args == [2, 1]
    assert action.text() == "background"


def test_one_class_at_most_is_the_background(table):
    assert table._table.item(0, 2).font().italic()
    table.mark_background(2)
    assert [info.background for info in table.classes] == [False, True]
    assert [table._table.item(row, 2).font().italic() for row in (0, 1)] == [False, True]
    table.mark_background(1)
    assert [info.background for info in table.classes] == [True, False]


def test_class_tables_are_saved_and_loaded(ready, tmp_path, qtbot):
    viewer, widget = ready()
    widget.table.rename(2, "nucleus")
    widget.table.mark_background(1)
    widget.save_classes(tmp_path / "classes.json")
    saved = widget.classes
    assert read_classes(tmp_path / "classes.json") == saved
    widget.table.rename(2, "something else")
    widget.table.add("unused")
    widget.load_classes(tmp_path / "classes.json")
    assert widget.classes == saved
    assert list(viewer.layers["annotations"].features["name"])[1:] == ["background", "nucleus"]


def test_a_loaded_table_that_lacks_a_painted_class_keeps_it(ready, tmp_path):
    _, widget = ready()
    widget.table.rename(2, "nucleus")
    write_classes(tmp_path / "classes.json", [ClassInfo(1, "nucleus", "#112233")])
    widget.load_classes(tmp_path / "classes.json")
    assert [info.name for info in widget.classes] == ["nucleus", "nucleus (2)"]


def test_a_damaged_class_table_changes_nothing(ready, tmp_path):
    _, widget = ready()
    before = widget.classes
    (tmp_path / "classes.json").write_text("[")
    widget.load_classes(tmp_path / "classes.json")
    assert "not valid JSON" in widget.status
    assert widget.classes == before


def test_strokes_are_counted_beside_pixels(ready, paint, qtbot):
    viewer, widget = ready()
    cells = widget.table._table
    assert [cells.item(1, column).text() for column in (3, 4)] == ["1", "150"]
    paint(viewer.layers["annotations"], 2, 40)
    qtbot.waitUntil(lambda: cells.item(1, 3).text() == "2")
    assert cells.item(1, 4).text() == "300"


def test_a_class_without_labels_is_named(ready, qtbot, paint):
    viewer, widget = ready()
    viewer.layers["annotations"].undo()
    qtbot.waitUntil(lambda: widget.status.startswith("No labels yet for class 2"))
    assert widget.table._table.item(1, 3).text() == "–"


def test_a_class_that_is_added_after_a_round_is_named_until_it_is_painted(
    ready, wait, qtbot, paint
):
    viewer, widget = ready()
    widget.adapt()
    wait(widget)
    assert widget.status.startswith("Round 1 is done")
    widget.table.add("nucleus")
    pixels = "Press Adapt to learn from {} annotated pixels"
    assert widget.status == f"{pixels.format(300)}; no labels yet for nucleus."
    paint(viewer.layers["annotations"], 3, 40)
    qtbot.waitUntil(lambda: widget.status == f"{pixels.format(450)}.")
    widget.load_adapter("nowhere.safetensors")
    wait(widget)
    wrong = widget.status
    assert "nowhere" in wrong
    widget.table.add("membrane")
    assert widget.status == wrong, "a hint does not hide what went wrong"


def test_painting_an_id_outside_the_table_adds_it(ready, paint, qtbot):
    viewer, widget = ready()
    paint(viewer.layers["annotations"], 5, 40)
    qtbot.waitUntil(lambda: widget.images.counts.pixels.get(5) == 150)
    assert [info.id for info in widget.classes] == [1, 2, 5]
    assert widget.table._table.item(2, 4).text() == "150"
