"""What the values of a label image that was not made here stand for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_convlora.config import ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.labels.classes import find_background, parse_classes
from napari_convlora.labels.importing import (
    Meaning,
    Survey,
    apply_import,
    count_values,
    plan_import,
    propose_meaning,
    survey_values,
)

TABLE = (
    ClassInfo(1, "background", "#8c8c8c"),
    ClassInfo(2, "nucleus", "#e69f00"),
)

label_images = hnp.arrays(
    st.sampled_from((np.uint8, np.int32, np.uint16, np.int64)),
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
    elements=st.integers(0, 200),
)


def discs(n: int, radius: int = 8, side: int = 200) -> np.ndarray:
    """Return (1, side, side) with `n` discs, numbered from 1."""
    rows, columns = np.indices((side, side))
    labels = np.zeros((1, side, side), np.int32)
    for i in range(n):
        row, column = 12 + 24 * (i // 8), 12 + 24 * (i % 8)
        labels[0, (rows - row) ** 2 + (columns - column) ** 2 < radius**2] = i + 1
    return labels


def strokes() -> np.ndarray:
    """Return (1, 200, 200) with three strokes of each of two classes."""
    labels = np.zeros((1, 200, 200), np.int32)
    for i in range(3):
        labels[0, 20 + 30 * i : 25 + 30 * i, 10:80] = 1
        labels[0, 100:190, 20 + 50 * i : 26 + 50 * i] = 2
    return labels


@pytest.mark.parametrize(
    ("labels", "finished", "instances"),
    [
        (strokes(), False, False),
        (discs(6), True, False),  # as many classes are thinkable
        (discs(30), True, True),
        ((discs(30) > 0).astype(np.uint8), True, False),
        ((strokes() > 0) * np.uint8(255), True, False),  # nobody's brush paints with 255
        (strokes() + 1, False, False),  # no 0, no question
        (np.zeros((1, 5, 5), int), False, False),
        (np.arange(400).repeat(100).reshape(1, 200, 200), True, True),
    ],
)
def test_what_a_label_image_looks_like(labels, finished, instances):
    seen = survey_values(labels)
    assert (seen.finished, seen.instances) == (finished, instances)


@given(label_images)
def test_counts_are_those_of_all_pixels(labels):
    assert count_values(labels) == dict(sorted(Counter(labels.ravel().tolist()).items()))


def test_counts_of_more_pixels_than_are_looked_at_in_one_go(monkeypatch):
    monkeypatch.setattr("napari_convlora.labels.importing._CHUNK", 7)
    labels = discs(30).astype(np.int64) * 10**9
    assert count_values(labels) == dict(sorted(Counter(labels.ravel().tolist()).items()))
    become = plan_import(count_values(labels), Meaning({0: "background"}, "cell"))
    into = np.zeros(labels.shape, np.int32)
    apply_import(become, labels, into)
    assert (into == np.where(labels > 0, 2, 1)).all()


@pytest.mark.parametrize("turned", ["labels", "into", "both"])
def test_values_are_replaced_in_arrays_of_any_layout(turned):
    labels = discs(3)
    become = plan_import(count_values(labels), Meaning({0: "background"}, "cell"))
    into = np.zeros_like(labels, order="F" if turned != "labels" else "C")
    apply_import(become, np.asarray(labels, order="F") if turned != "into" else labels, into)
    assert (into == np.where(labels > 0, 2, 1)).all()
    turned_itself = np.asfortranarray(labels)
    apply_import(become, turned_itself, turned_itself)
    assert (turned_itself == into).all()


@settings(deadline=None)
@given(
    label_images,
    st.booleans(),
    st.booleans(),
    st.sampled_from(((), TABLE, (ClassInfo(3, "class 2", "#123456"),))),
)
def test_a_proposal_joins_pixels_with_no_other_class(labels, finished, one_class, kept):
    seen = Survey(count_values(labels))
    if not seen.values and not finished:
        return
    meaning = propose_meaning(seen, kept, finished=finished, one_class=one_class)
    become = plan_import(seen.counts, meaning, kept)
    into = np.full(labels.shape, 99, np.int32)
    apply_import(become, labels, into)
    zero, others = labels == 0, labels != 0
    assert (into[zero] == 0).all() != (finished and zero.any())
    assert not np.isin(into[others], into[zero]).any()
    if one_class:
        assert len(np.unique(into[others])) <= 1
    else:  # one class for each value, and one value for each class
        pairs = set(zip(labels[others].tolist(), into[others].tolist(), strict=True))
        assert len({v for v, _ in pairs}) == len({i for _, i in pairs}) == len(pairs)
    table = (*kept, *become.classes)
    rows = [{"id": c.id, "name": c.name, "background": c.background} for c in table]
    assert len(parse_classes({"classes": rows}, "table")) == len(table)  # ids and names differ
    assert {int(i) for i in np.unique(into)} - {0} <= {info.id for info in table}
    if become.background is not None:
        assert find_background(table) == become.background
    if not become.changes:
        assert (into == labels).all()


def test_strokes_of_classes_that_are_free_stay_as_they_are():
    become = plan_import([0, 1, 4], Meaning({1: "tissue", 4: "vessel"}))
    assert not become.changes
    assert [(c.id, c.name) for c in become.classes] == [(1, "tissue"), (4, "vessel")]
    assert find_background(become.classes) is None


def test_a_black_and_white_mask_becomes_background_and_one_class():
    seen = Survey({0: 900, 255: 100})
    become = plan_import(seen.counts, propose_meaning(seen, finished=True, one_class=False))
    assert become.ids == {0: 1, 255: 2}
    assert [(c.name, c.background) for c in become.classes] == [
        ("background", True),
        ("object", False),
    ]


def test_a_value_takes_no_id_of_another_class():
    become = plan_import(
        [0, 1, 2], Meaning({0: "Background", 1: "cytoplasm", 2: "membrane"}), TABLE
    )
    assert become.ids == {0: 1, 1: 3, 2: 4}
    assert [info.name for info in become.classes] == ["cytoplasm", "membrane"]
    assert become.background == 1


def test_names_that_the_image_brings_along_join_classes_of_the_same_name():
    seen = Survey({0: 5, 1: 5, 3: 5})
    meaning = propose_meaning(
        seen, TABLE, {1: "Nucleus", 3: "mitosis"}, finished=False, one_class=False
    )
    become = plan_import(seen.counts, meaning, TABLE)
    assert become.ids == {0: 0, 1: 2, 3: 3}


def test_a_value_without_a_name_becomes_unlabelled():
    become = plan_import([-1, 0, 1, 2], Meaning({1: "cell", 2: " "}))
    assert become.ids == {-1: 0, 0: 0, 1: 1, 2: 0}
    seen = Survey({-1: 5, 1: 5, 2: 5})
    assert propose_meaning(seen, finished=False, one_class=False).names[-1] == ""


def test_another_background_than_the_table_has_is_not_marked():
    become = plan_import([0, 7], Meaning({0: "road", 7: "car"}), TABLE)
    assert not any(info.background for info in become.classes)


@pytest.mark.parametrize(
    ("values", "meaning", "sentence"),
    [
        ([0, 1], Meaning(), "name at least one"),
        (range(300), Meaning({i: f"c{i}" for i in range(300)}), "300 values cannot each be a cl"),
        ([0, 1], Meaning({1: "x" * 300}), "needs a name of 1 to 200 characters"),
    ],
)
def test_a_meaning_that_cannot_be_used_says_why(values, meaning, sentence):
    with pytest.raises(InputError, match=sentence):
        plan_import(values, meaning)


def test_200_objects_are_no_200_classes_and_more_than_255_cannot_be():
    seen = survey_values(np.arange(256).repeat(4).reshape(1, 32, 32))
    assert seen.instances
    become = plan_import(seen.counts, propose_meaning(seen, finished=True, one_class=True))
    assert len(become.classes) == 2
    labels = np.arange(257).repeat(4).reshape(1, 4, 257)
    with pytest.raises(InputError, match="make all of them one class"):
        plan_import(
            count_values(labels),
            propose_meaning(survey_values(labels), finished=True, one_class=False),
        )


def test_negative_values_of_a_map_of_objects_are_proposed_as_unlabelled() -> None:
    seen = Survey({-1: 7, 0: 50, **dict.fromkeys(range(1, 101), 3)}, finished=True, instances=True)
    meaning = propose_meaning(seen, finished=True, one_class=True)
    ids = plan_import(seen.counts, meaning).ids
    assert ids[-1] == 0
    assert len({ids[value] for value in range(1, 101)} - {0}) == 1
    assert ids[0] not in (0, ids[1])
