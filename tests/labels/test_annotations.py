"""Label semantics: what counts as annotated, whose word wins, and the class table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.annotations import (
    LabelledImage,
    check_annotations,
    merge_corrections,
    protect,
)
from napari_convlora.labels.classes import (
    DEFAULT_COLOURS,
    default_classes,
    find_background,
    read_classes,
    write_classes,
)

few = settings(max_examples=40, deadline=None)
label_arrays = hnp.arrays("uint8", (2, 3, 4), elements=st.integers(0, 4))


def labelled(annotations: np.ndarray, **options: Any) -> LabelledImage:
    return LabelledImage(np.zeros((*annotations.shape, 1)), annotations, **options)


def test_reviewed_regions_turn_unlabelled_into_background() -> None:
    annotations = np.array([[[0, 2, 0], [3, 0, 0]]])
    reviewed = np.array([[[1, 1, 0], [0, 1, 0]]], bool)
    effective = labelled(annotations, reviewed=reviewed, background_id=4).effective()
    np.testing.assert_array_equal(effective, [[[4, 2, 0], [3, 4, 0]]])
    assert effective.dtype == np.uint8
    assert annotations[0, 0, 0] == 0


@few
@given(label_arrays, hnp.arrays(bool, (2, 3, 4)), st.integers(1, 255))
def test_painted_pixels_are_never_changed_by_review(
    annotations: np.ndarray, reviewed: np.ndarray, background: int
) -> None:
    image = labelled(annotations, reviewed=reviewed, background_id=background)
    effective = image.effective()
    np.testing.assert_array_equal(effective[annotations > 0], annotations[annotations > 0])
    assert ((effective == 0) == ((annotations == 0) & ~reviewed)).all()


@pytest.mark.parametrize("layer", ["annotations", "reviewed"])
def test_other_sizes_are_named(layer: str) -> None:
    arrays: dict[str, Any] = {
        "annotations": np.zeros((1, 35, 50), int),
        "reviewed": np.zeros((1, 35, 50), bool),
    }
    arrays[layer] = arrays[layer][..., :-1]
    with pytest.raises(InputError, match=rf"{layer} layer of 'a' is 35 x 49 instead of 35 x 50"):
        LabelledImage(np.zeros((1, 35, 50, 3)), **arrays, name="a")


def test_images_without_planes_and_channels_are_refused() -> None:
    with pytest.raises(InputError, match="to_planes"):
        LabelledImage(np.zeros((35, 50)), np.zeros((35, 50), int))
    with pytest.raises(InputError, match="background class"):
        labelled(np.zeros((1, 2, 2), int), background_id=0)


def test_counts_cover_the_whole_table_and_every_image() -> None:
    images = [
        labelled(np.array([[[0, 1, 1, 3]]])),
        labelled(np.array([[[3, 0]]]), reviewed=np.ones((1, 1, 2), bool)),
    ]
    assert check_annotations(images, default_classes(3)) == {1: 3, 2: 0, 3: 2}


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (np.zeros((1, 2, 2), int), "paint at least one stroke for each of two classes"),
        (np.full((1, 2, 2), 2), r"Only class 2 \(class 2\).*one stroke for each of two classes"),
        (np.array([[[1, 2, 9, 7]]]), "ids 7, 9, not in the class table"),
        (np.array([[[1, 2, 7]]]), "id 7, not in the class table"),
        (np.array([[[1.0, 2.0]]]), "whole numbers, not float64"),
        (np.array([[[1, 300]]]), "between 0 and 255 but reach 300"),
        (np.array([[[1, -3]]]), "reach -3"),
    ],
)
def test_too_few_or_wrong_labels_get_one_sentence(annotations: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_annotations([labelled(annotations)], default_classes(3))
    assert str(error.value).count(".") == 1


def test_no_image_at_all_counts_as_nothing_annotated() -> None:
    with pytest.raises(InputError, match="Nothing is annotated"):
        check_annotations([], default_classes(2))


@few
@given(label_arrays, label_arrays, label_arrays)
def test_corrections_win_and_nothing_painted_is_lost(
    annotations: np.ndarray, before: np.ndarray, now: np.ndarray
) -> None:
    merged = merge_corrections(annotations, before, now)
    for old, was, is_, new in zip(
        annotations.flat, before.flat, now.flat, merged.flat, strict=True
    ):
        assert new == (is_ if is_ not in (was, 0) else old)
    assert ((merged == 0) <= (annotations == 0)).all()
    assert merged.dtype == annotations.dtype
    assert not np.shares_memory(merged, annotations)


@few
@given(label_arrays, label_arrays)
def test_untouched_predictions_add_no_annotation(
    annotations: np.ndarray, prediction: np.ndarray
) -> None:
    np.testing.assert_array_equal(
        merge_corrections(annotations, prediction, prediction), annotations
    )


@few
@given(label_arrays, label_arrays)
def test_painted_pixels_stay_on_top_of_predictions(
    prediction: np.ndarray, annotations: np.ndarray
) -> None:
    shown = protect(prediction, annotations)
    np.testing.assert_array_equal(shown[annotations > 0], annotations[annotations > 0])
    np.testing.assert_array_equal(shown[annotations == 0], prediction[annotations == 0])
    np.testing.assert_array_equal(merge_corrections(annotations, shown, shown), annotations)


def test_corrections_of_other_size_or_impossible_id_are_refused() -> None:
    one, two = np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8)
    for arguments in ((one, two, one), (one, one, two)):
        with pytest.raises(InputError, match="2 x 3 instead of 2 x 2"):
            merge_corrections(*arguments)
    with pytest.raises(InputError, match="2 x 2 instead of 2 x 3"):
        protect(two, one)
    with pytest.raises(InputError, match="reach 300"):
        merge_corrections(one, one, np.full((1, 2, 2), 300))


def test_default_classes_start_with_background_and_differ_in_colour() -> None:
    assert default_classes(2) == (
        ClassInfo(1, "background", DEFAULT_COLOURS[0]),
        ClassInfo(2, "class 2", DEFAULT_COLOURS[1]),
    )
    assert [info.id for info in default_classes(np.array([7, 0, 3, 7]))] == [3, 7]
    assert len(set(DEFAULT_COLOURS)) == len(DEFAULT_COLOURS) >= 12
    assert len(default_classes(255)) == 255


names = (
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)
colours = st.integers(0, 0xFFFFFF).map("#{:06x}".format)
tables = st.lists(
    st.builds(ClassInfo, st.integers(1, 255), names, colours, st.booleans()),
    min_size=1,
    max_size=20,
    unique_by=(lambda info: info.id, lambda info: info.name.casefold()),
).filter(lambda table: sum(info.background for info in table) < 2)


@few
@given(tables)
def test_class_tables_round_trip(
    tmp_path_factory: pytest.TempPathFactory, table: list[ClassInfo]
) -> None:
    path = tmp_path_factory.getbasetemp() / "classes.json"
    write_classes(path, table)
    assert read_classes(path) == tuple(table)
    assert json.loads(path.read_text("utf-8"))["format"] == 1


def test_the_background_is_marked_or_goes_by_its_name() -> None:
    table = [ClassInfo(1, "air", "#000000"), ClassInfo(3, "Background", "#000000")]
    assert find_background(table) == 3
    assert find_background([replace(table[0], background=True), table[1]]) == 1
    assert find_background(table[:1]) is None


def test_simple_mapping_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text('{"1": "background", "2": " Zellkern "}', "utf-8-sig")
    assert read_classes(path) == (
        ClassInfo(1, "background", DEFAULT_COLOURS[0]),
        ClassInfo(2, "Zellkern", DEFAULT_COLOURS[1]),
    )


def rows(*rows: object) -> str:
    return json.dumps({"format": 1, "classes": rows})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"1": "a", "1": "b"}', "not valid JSON"),
        ("[]", "no classes"),
        ("{}", "no classes"),
        (rows(), "no classes"),
        (rows(3), "no classes"),
        ('{"format": 2, "classes": []}', "update napari-convlora"),
        ('{"1": ""}', "needs a name"),
        ('{"1": "   "}', "needs a name"),
        ('{"1": 5}', "needs a name"),
        ('{"one": "a"}', "cannot have the id 'one'"),
        ('{"0": "a"}', "cannot have the id 0"),
        ('{"256": "a"}', "cannot have the id 256"),
        (rows({"id": True, "name": "a"}), "cannot have the id True"),
        (rows({"id": 1.0, "name": "a"}), r"cannot have the id 1\.0"),
        (rows({"id": 1, "name": "a"}, {"id": 1, "name": "b"}), "same id"),
        (rows({"id": 1, "name": "a"}, {"id": 2, "name": "A "}), "same name"),
        (
            rows(*({"id": i, "name": f"c{i}", "background": True} for i in (1, 2))),
            "marked as background",
        ),
        (rows({"id": 1, "name": "a\x1b[31m"}), "control characters"),
        (rows({"id": 1, "name": "a\u202eb"}), "control characters"),
        (rows({"id": 1, "name": "a\ud800"}), "control characters"),
        (rows({"id": 1, "name": "a", "colour": "red"}), "#rrggbb"),
        (rows({"id": 1, "name": "a", "colour": 3}), "#rrggbb"),
    ],
)
def test_bad_class_tables_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(path)


def test_absent_and_huge_class_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    with pytest.raises(InputError, match="check the path"):
        read_classes(path)
    path.write_bytes(b" " * 1_000_001)
    with pytest.raises(InputError, match="1 MB"):
        read_classes(path)


def test_invalid_table_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    write_classes(path, default_classes(2))
    with pytest.raises(InputError, match="id 300"):
        write_classes(path, [ClassInfo(300, "a", "#000000")])
    assert read_classes(path) == default_classes(2)
