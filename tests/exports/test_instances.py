from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.draw import disk

from napari_convlora.errors import InputError
from napari_convlora.exports.instances import find_instances, save_instances
from napari_convlora.exports.measurements import region_table
from napari_convlora.labels.classes import default_classes

LABELS = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)),
    elements=st.integers(0, 3),
)


def blobs() -> np.ndarray:
    """Two discs of class 2 that touch, one of class 3 beside them, on class 1."""
    labels = np.ones((1, 60, 100), np.uint8)
    for column, class_id in ((20, 2), (42, 2), (68, 3)):
        labels[0][disk((30, column), 13)] = class_id
    return labels


@settings(deadline=None, max_examples=50)
@given(LABELS, st.sampled_from(["components", "watershed"]), st.integers(1, 30), st.booleans())
def test_instances_are_numbered_without_gaps_and_of_one_class(labels, method, size, join) -> None:
    instances = find_instances(labels, [2, 3], method=method, min_size=size, join_planes=join)
    ids, sizes = np.unique(instances[instances > 0], return_counts=True)
    np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
    assert (sizes >= size).all()
    assert set(labels[instances > 0].tolist()) <= {2, 3}
    for i in ids:
        assert len(np.unique(labels[instances == i])) == 1
    if size == 1:  # nothing is lost
        np.testing.assert_array_equal(instances > 0, np.isin(labels, [2, 3]))
    if not join:
        for plane, other in itertools.pairwise(instances):
            assert not set(plane[plane > 0]) & set(other[other > 0])


@settings(deadline=None, max_examples=50)
@given(LABELS)
def test_the_table_says_what_is_in_the_instances(labels: np.ndarray) -> None:
    instances = find_instances(labels, [1, 2, 3])
    uncertainty = (labels * 20 + np.arange(labels.shape[-1], dtype=np.uint8)).astype(np.uint8)
    table = region_table(instances, labels, default_classes(3), uncertainty)
    assert len({len(column) for column in table.values()}) == 1
    assert len(table["index"]) == instances.max()
    for row, i in enumerate(table["index"]):
        at = np.argwhere(instances == i)
        assert table["area"][row] == len(at)
        assert table["class_id"][row] == labels[tuple(at[0])]
        for axis, name in enumerate(("plane", "row", "column")):
            assert table[name][row] == pytest.approx(at[:, axis].mean())
            assert table[f"{name}_start"][row] == at[:, axis].min()
            assert table[f"{name}_stop"][row] == at[:, axis].max() + 1
        sure = 100 - uncertainty[instances == i].mean()
        assert table["confidence"][row] == pytest.approx(sure)


def test_watershed_parts_touching_objects_and_components_do_not() -> None:
    labels = blobs()
    assert find_instances(labels, [2, 3]).max() == 2
    parted = find_instances(labels, [2, 3], method="watershed", min_size=100)
    assert parted.max() == 3
    assert parted[0, 30, 20] != parted[0, 30, 42]
    assert 450 < (parted == parted[0, 30, 20]).sum() < 560


def test_what_touches_at_a_corner_is_one_object_for_both_methods() -> None:
    labels = np.zeros((1, 60, 60), int)
    labels[0][disk((30, 30), 11)] = 1
    for corner in ((22, 22), (38, 38)):
        labels[0][corner] = 0
    rows, columns = np.nonzero(labels[0])
    labels[0, rows.min() - 1, columns[rows == rows.min()].max() + 1] = 1
    labels[0, rows.max() + 1, columns[rows == rows.max()].min() - 1] = 1
    for method in ("components", "watershed"):
        assert find_instances(labels, [1], method=method).max() == 1, method


def test_watershed_leaves_a_bar_whole_and_a_full_image_too() -> None:
    labels = np.zeros((1, 60, 60), int)
    labels[0, 10:20, 5:55] = 1  # of one width
    labels[0, 30:59, 0:40] = 1  # cut off by the edge of the image
    assert find_instances(labels, [1], method="watershed").max() == 2
    assert find_instances(np.ones((1, 30, 30), int), [1], method="watershed").max() == 1


def test_planes_are_joined_on_request() -> None:
    labels = np.zeros((3, 20, 20), int)
    labels[:, 5:9, 5:9] = 1
    labels[0, 12:18, 12:18] = 1
    assert find_instances(labels, [1]).max() == 4
    assert find_instances(labels, [1], join_planes=True).max() == 2
    assert find_instances(labels, [1], join_planes=True, min_size=40)[1].max() == 1


def test_files_hold_instances_and_table(tmp_path) -> None:
    labels = blobs()
    instances = find_instances(labels, [2, 3])
    table = region_table(instances, labels, default_classes(3))
    save_instances(instances, table, tmp_path / "cells.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "cells.tif"), instances[0])
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["class 2", "class 3"]
    assert [int(row["area"]) for row in rows] == [(labels == 2).sum(), (labels == 3).sum()]
    assert rows[0]["row_start"] == "18"
    assert rows[1]["column"] == "68.0"
    assert "confidence" not in rows[0]


def test_the_table_alone_and_a_stack(tmp_path) -> None:
    stack = np.repeat(blobs(), 3, axis=0)
    instances = find_instances(stack, [2, 3])
    table = region_table(instances, stack, default_classes(3))
    save_instances(instances, table, tmp_path / "t.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 7
    save_instances(instances, table, tmp_path / "s.tiff")
    assert tifffile.imread(tmp_path / "s.tiff").shape == (3, 60, 100)
    with pytest.raises(InputError, match=r"ends in '\.png'"):
        save_instances(instances, table, tmp_path / "s.png")
