"""What the values of a label image of other tools stand for, and how they become classes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from skimage.measure import label

from napari_convlora.config import MAX_CLASSES, UNLABELLED, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.images.regions import plan_blocks as blocks_of
from napari_convlora.labels.classes import (
    DEFAULT_COLOURS,
    default_classes,
    find_background,
    parse_classes,
)

MOST_CLASSES = 12, 50
"""Values beyond which each is more likely an object than a class: if it is one blob, in any case.
"""

_BACKGROUND, _OBJECT = "background", "object"
_CHUNK = 2**22
"""Pixels that are looked at in one go."""

_BLOBS = 1.25  # connected parts per value, at most, of a map of objects
_COMPACT = 0.3  # depth by root of area: disc 0.56, square 0.5, stroke of 4 times its width 0.25


@dataclass(frozen=True)
class Survey:
    """What is in a label image.

    Parameters
    ----------
    counts
        Pixels by value, in the order of the values; 0 is left out where there is none.
    finished
        Whether it looks like a finished mask, whose 0 is background, rather than strokes.
    instances
        Whether every value looks like an object rather than a class.
    """

    counts: Mapping[int, int]
    finished: bool = False
    instances: bool = False

    @property
    def values(self) -> list[int]:
        """All values but 0."""
        return [value for value in self.counts if value != UNLABELLED]


@dataclass(frozen=True)
class Meaning:
    """What the values of a label image stand for.

    Parameters
    ----------
    names
        Class by value; one without a class, or with an empty name, becomes unlabelled. If 0 has a
        class the image is a finished mask; that class is the background unless there is one.
    others
        Class of every other value but 0, as of objects that are numbered; negative ones are
        proposed as unlabelled.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    others: str = ""


@dataclass(frozen=True)
class ImportPlan:
    """How values become ids of the class table.

    Parameters
    ----------
    ids
        Class id by value, for all values there are; 0 is unlabelled.
    classes
        The classes among them that the table lacks.
    background
        The class of value 0, if it has one.
    """

    ids: Mapping[int, int]
    classes: tuple[ClassInfo, ...] = ()
    background: int | None = None

    @property
    def changes(self) -> bool:
        """Whether any pixel gets another value."""
        return any(value != class_id for value, class_id in self.ids.items())


def survey_values(labels: np.ndarray) -> Survey:
    """Look at a label image in memory.

    Values are counted in all of it; what it looks like is judged by its fullest 512 x 512 pixels.

    Parameters
    ----------
    labels : (P, H, W) int
        Of any size and values; best contiguous.
    """
    counts = count_values(labels)
    n_values = len(counts.keys() - {UNLABELLED})
    if not n_values:
        return Survey(counts)
    fullest = max(blocks_of(labels.shape), key=lambda b: np.count_nonzero(labels[b.index]))
    parts_per_value, compact = _shapes(labels[fullest.index])
    few, some = MOST_CLASSES
    many = n_values > some or (n_values > few and parts_per_value <= _BLOBS)
    labelled = 1 - counts.get(UNLABELLED, 0) / labels.size
    # No brush paints with the number 255 alone.
    binary = n_values == 1 and 1 not in counts
    finished = UNLABELLED in counts and (many or binary or max(labelled, compact) > 0.5)
    return Survey(counts, finished, many)


def count_values(labels: np.ndarray) -> dict[int, int]:
    """Return how many pixels of a label image have each value, in the order of the values."""
    counts: dict[int, int] = {}
    for part in _chunks(labels):
        if part.dtype == np.uint8:  # seven times faster
            table = np.bincount(part)
            found = np.flatnonzero(table)
            sizes = table[found]
        else:
            found, sizes = np.unique(part, return_counts=True)
        for value, n in zip(found.tolist(), sizes.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + n
    return dict(sorted(counts.items()))


def propose_meaning(
    seen: Survey,
    kept: Sequence[ClassInfo] = (),
    names: Mapping[int, str] | None = None,
    *,
    finished: bool,
    one_class: bool,
) -> Meaning:
    """Return what the values might stand for, to be corrected by the user.

    Parameters
    ----------
    seen
        What is in the image.
    kept
        Classes of the table.
    names
        Names that the image brings along, by value.
    finished, one_class
        Whether 0 is background, and whether all other values are objects of one class.
    """
    names = dict(names or {})
    own = {info.id: info.name for info in kept}
    background = find_background(kept)
    taken = {name.casefold() for name in own.values()}
    taken |= {name.casefold() for value, name in names.items() if value in seen.counts}
    proposed: dict[int, str] = {}
    if finished and UNLABELLED in seen.counts:
        known = own[background] if background is not None else _BACKGROUND
        proposed[UNLABELLED] = known
        taken.add(known.casefold())
    if one_class:
        unlabelled = {value: "" for value in seen.values if value < 0}
        return Meaning(proposed | unlabelled, _free(_OBJECT, taken))
    for value in seen.values:
        if value in names:
            proposed[value] = names[value]
        elif value < 0:
            proposed[value] = ""  # the way in which many tools mark what is not labelled
        elif value in own and not finished:
            proposed[value] = own[value]  # a finished mask of ours would have no 0
        else:
            name = _OBJECT if len(seen.values) == 1 else f"class {value}"
            proposed[value] = _free(name, taken)
            taken.add(proposed[value].casefold())
    return Meaning(proposed)


def plan_import(
    values: Collection[int],
    meaning: Meaning,
    kept: Sequence[ClassInfo] = (),
    colours: Mapping[int, str] | None = None,
) -> ImportPlan:
    """Return which class of the table every value becomes.

    A class of the same name is joined; any other gets an id of its own, that of its value if it is
    free. Of an image of two values, 0 and 255 as a rule, the second becomes the next free id.

    Parameters
    ----------
    values
        All values of the image.
    meaning
        What they stand for.
    kept
        Classes of the table that must stay what they are.
    colours
        Colours that the image brings along, by value.

    Raises
    ------
    InputError
        No value has a class, there are too many classes, or a name cannot be used.
    """
    wanted = {v: meaning.names.get(v, meaning.others if v else "") for v in values}
    named = {v: " ".join(name.split()) for v, name in wanted.items() if name.strip()}
    if not named:
        raise InputError("No value has a class yet; name at least one of them.")
    by_name = {info.name.casefold(): info.id for info in kept}
    new: dict[str, int] = {}
    for value, name in named.items():
        if name.casefold() not in by_name:
            new.setdefault(name.casefold(), value)
    if len(new) + len(kept) > MAX_CLASSES:
        raise InputError(
            f"{len(new):,} values cannot each be a class, as classes end at {MAX_CLASSES}; "
            "make all of them one class."
        )
    taken = {info.id for info in kept}
    if not meaning.others and not (UNLABELLED in named and len(named) == 2):
        own = {name: v for name, v in new.items() if 0 < v <= MAX_CLASSES and v not in taken}
        by_name |= own
        taken |= set(own.values())
    free = (i for i in range(1, MAX_CLASSES + 1) if i not in taken)
    for name in new:
        by_name[name] = by_name.get(name) or next(free)
    ids = {v: by_name[named[v].casefold()] if v in named else UNLABELLED for v in values}
    background = ids.get(UNLABELLED) or None
    marked = background if find_background(kept) is None else None
    colours = dict(colours or {})
    if background is not None:  # grey is its colour, whichever its id is
        colours[UNLABELLED] = DEFAULT_COLOURS[0]
    rows = []
    for name, value in new.items():
        class_id = by_name[name]
        other = background if class_id == 1 and background is not None else class_id
        rows.append(
            {
                "id": class_id,
                "name": named[value],
                "colour": colours.get(value, default_classes([other])[0].colour),
                "background": class_id == marked,
            }
        )
    classes = parse_classes({"classes": rows}, "The classes of the layer") if rows else ()
    return ImportPlan(ids, tuple(sorted(classes, key=lambda info: info.id)), background)


def apply_import(plan: ImportPlan, labels: np.ndarray, into: np.ndarray) -> None:
    """Write class ids for the values of `labels` into an array of as many pixels."""
    flat = into.reshape(-1)  # a copy, if that array is not contiguous
    start = 0
    values = np.array(sorted(plan.ids))
    ids = np.array([plan.ids[value] for value in sorted(plan.ids)], np.uint8)
    for part in _chunks(labels):
        flat[start : start + part.size] = ids[np.searchsorted(values.astype(part.dtype), part)]
        start += part.size
    if not np.may_share_memory(flat, into):
        into[...] = flat.reshape(into.shape)


def _chunks(labels: np.ndarray) -> Iterator[np.ndarray]:
    flat = labels.reshape(-1)
    if flat.dtype.kind == "b":
        flat = flat.view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _shapes(part: np.ndarray) -> tuple[float, float]:
    """Return connected parts per value, and the share of labelled pixels in compact groups."""
    _, n_parts = label(part, connectivity=2, return_num=True)
    labelled = np.pad(part != UNLABELLED, 1)  # strokes of several classes seldom touch
    groups, n_groups = label(labelled, connectivity=2, return_num=True)
    depth = ndimage.distance_transform_edt(labelled)
    depth = np.asarray(ndimage.maximum(depth, groups, range(1, n_groups + 1)))
    areas = np.bincount(groups.ravel())[1:]
    compact = depth / np.sqrt(areas) > _COMPACT
    n_values = len(np.unique(part[part != UNLABELLED]))
    return n_parts / n_values, float(areas[compact].sum() / areas.sum())


def _free(name: str, taken: Collection[str]) -> str:
    endings = ("", *(f" ({n})" for n in range(2, len(taken) + 3)))
    return next(name + end for end in endings if (name + end).casefold() not in taken)
