from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_convlora.errors import InputError
from napari_convlora.prediction.uncertain_places import WORTH_A_LOOK, Guide, Place, component

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))


@st.composite
def reviews(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """Uncertainty, annotations and a distance."""
    shape = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    uncertainty = rng.integers(0, 101, shape).astype(np.uint8)
    if draw(st.booleans()):
        uncertainty[:] = draw(st.integers(0, 100))  # a plateau has a most uncertain place too
    annotations = (rng.random(shape) < draw(st.sampled_from([0, 0.5, 0.99, 1]))).astype(np.int32)
    return uncertainty, annotations, draw(st.integers(8, 30))


def tour(guide: Guide, annotations: np.ndarray) -> list[Place]:
    places = []
    while (place := guide.next(lambda part: annotations[part] != 0)) is not None:
        places.append(place)
    return places


@settings(deadline=None, max_examples=50)
@given(reviews())
def test_places_are_unlabelled_and_apart_until_none_is_left(review) -> None:
    uncertainty, annotations, distance = review
    places = tour(Guide(uncertainty, distance), annotations)
    for i, a in enumerate(places):
        assert annotations[a.plane, a.row, a.column] == 0
        assert a.uncertainty >= WORTH_A_LOOK
        for b in places[:i]:
            if abs(a.plane - b.plane) <= 1:
                assert np.hypot(a.row - b.row, a.column - b.column) >= distance
    if uncertainty.min() >= WORTH_A_LOOK and min(uncertainty.shape[1:]) >= distance:
        assert places or annotations[:, :distance, :distance].all()


def test_a_doubtful_object_comes_before_a_thin_border() -> None:
    uncertainty = np.zeros((1, 100, 100), np.uint8)
    uncertainty[0, :, 10] = 100
    uncertainty[0, 60:76, 60:76] = 60
    first = Guide(uncertainty, 16).next(lambda part: np.zeros(uncertainty[part].shape, bool))
    assert 60 <= first.row < 76
    assert 60 <= first.column < 76


def test_a_stack_is_gone_through_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    uncertainty = rng.integers(40, 60, (5, 60, 60)).astype(np.uint8)
    uncertainty[2] += 20  # the worst plane, but not the only one
    places = tour(Guide(uncertainty, 16), np.zeros((5, 60, 60)))
    assert places[0].plane == 2
    assert {place.plane for place in places[:5]} == {0, 1, 2, 3, 4}


def test_what_was_visited_before_a_round_is_not_suggested_after_it() -> None:
    uncertainty = np.full((1, 64, 64), 50, np.uint8)
    annotations = np.zeros((1, 64, 64))
    first = Guide(uncertainty, 16)
    seen = [first.next(lambda part: annotations[part] != 0) for _ in range(3)]
    second = Guide(uncertainty, 16)
    second.visited.extend(first.visited)
    assert not set(seen) & set(tour(second, annotations))


def test_nothing_is_left_where_the_model_is_sure() -> None:
    assert tour(Guide(np.full((2, 50, 50), 4, np.uint8), 8), np.zeros((2, 50, 50))) == []


@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 3)), st.data())
def test_a_component_is_connected_and_of_one_class(labels: np.ndarray, data) -> None:
    at = tuple(data.draw(st.integers(0, n - 1)) for n in labels.shape)
    if labels[at] == 0:
        with pytest.raises(InputError, match="Nothing is predicted"):
            component(labels, at)
        return
    mask = component(labels, at)
    assert mask[at]
    assert (labels[mask] == labels[at]).all()
    # Nothing of the class touches it from outside: grown by a pixel it meets other classes only.
    padded = np.pad(mask, 1)
    grown = np.zeros_like(padded)
    for shift in np.ndindex(3, 3, 3):
        grown |= np.roll(padded, [s - 1 for s in shift], axis=(0, 1, 2))
    grown = grown[1:-1, 1:-1, 1:-1]
    assert not (labels[grown & ~mask] == labels[at]).any()


@pytest.mark.parametrize("at", [(-1, 0), (0, 5), (5, 0)])
def test_a_click_beside_the_image_gets_a_sentence(at: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="outside"):
        component(np.ones((5, 5), int), at)
