"""The class table: ids, names and colours, and its file."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from napari_convlora.config import MAX_CLASSES, UNLABELLED, ClassInfo
from napari_convlora.errors import InputError
from napari_convlora.files.atomic import check_no_device
from napari_convlora.files.tables import write_json

DEFAULT_COLOURS: tuple[str, ...] = (
    "#8c8c8c",  # background: neutral, so that the classes stand out
    # Okabe and Ito (2008), without black
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
    # Paul Tol's "muted" scheme, the hues that differ from those above
    *("#332288", "#882255", "#44aa99", "#999933", "#aa4499", "#117733"),
)
"""Cycle that stays distinguishable under the common forms of colour blindness."""

_MAX_TABLE_BYTES = 1_000_000
_MAX_NAME = 200
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def default_classes(ids: int | Iterable[int]) -> tuple[ClassInfo, ...]:
    """Return a class table with default names and colours; class 1 is ``background``.

    Parameters
    ----------
    ids
        The ids themselves (0 is left out), or how many classes: n gives 1..n.
    """
    wanted = range(1, ids + 1) if isinstance(ids, int) else sorted({int(i) for i in ids})
    return tuple(
        ClassInfo(i, "background" if i == 1 else f"class {i}", _default_colour(i))
        for i in wanted
        if i != UNLABELLED
    )


def find_background(classes: Iterable[ClassInfo]) -> int | None:
    """Return the id of the class marked as background or, without a mark, of that name."""
    marked = {info.background: info.id for info in classes}
    named = (info.id for info in classes if info.name.casefold() == "background")
    return marked.get(True) or next(named, None)


def read_classes(path: str | os.PathLike[str]) -> tuple[ClassInfo, ...]:
    """Return the class table in a ``classes.json``, or in a plain ``{"1": "name"}`` file.

    Raises
    ------
    InputError
        The file is absent, larger than 1 MB, not JSON, from a newer version, or its ids,
        names or colours are not usable.
    """
    path = Path(path)
    check_no_device(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read ({error.strerror}); check the path of the class table."
        ) from error
    if len(raw) > _MAX_TABLE_BYTES:
        raise InputError(f"'{path.name}' is larger than 1 MB, so it is no class table.")
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"'{path.name}' is not valid JSON; correct it or write the class table again."
        ) from error
    return parse_classes(data, path.name)


def write_classes(path: str | os.PathLike[str], classes: Sequence[ClassInfo]) -> None:
    """Write the class table as ``{"format": 1, "classes": [{"id", "name", "colour"}, ...]}``.

    The class that is marked as background has ``"background": true`` besides.

    Raises
    ------
    InputError
        The table is not valid, or `path` cannot be written.
    """
    rows = [
        {"id": info.id, "name": info.name, "colour": info.colour}
        | ({"background": True} if info.background else {})
        for info in classes
    ]
    parse_classes({"format": 1, "classes": rows}, "The class table")
    write_json(path, {"format": 1, "classes": rows}, ascii_only=False)


def parse_classes(data: Any, source: str) -> tuple[ClassInfo, ...]:
    """Return the class table in parsed JSON.

    Parameters
    ----------
    data
        What :func:`write_classes` writes, or ``{"1": "name"}``.
    source
        How messages call it.

    Raises
    ------
    InputError
        As :func:`read_classes`.
    """
    if isinstance(data, dict) and "classes" in data:
        if type(data.get("format", 1)) is not int or data.get("format", 1) != 1:
            raise InputError(
                f"{source}: format {data['format']!r} is not known; update napari-convlora."
            )
        rows = data["classes"]
    elif isinstance(data, dict):
        keys = [int(k) if re.fullmatch(r"[0-9]{1,9}", k) else k for k in data]
        rows = [{"id": key, "name": name} for key, name in zip(keys, data.values(), strict=True)]
    else:
        rows = None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{source}: no classes found; write at least one, "
            'as in {"1": "background", "2": "nucleus"}.'
        )
    classes = tuple(_parse_row(row, source) for row in rows)
    if len({info.id for info in classes}) < len(classes):
        raise InputError(f"{source}: two classes have the same id; make the ids unique.")
    if len({info.name.casefold() for info in classes}) < len(classes):
        raise InputError(f"{source}: two classes have the same name; make the names unique.")
    if sum(info.background for info in classes) > 1:
        raise InputError(f"{source}: two classes are marked as background; mark one.")
    return classes


def _parse_row(row: dict[str, Any], source: str) -> ClassInfo:
    number, name = row.get("id"), row.get("name")
    if type(number) is not int or not 1 <= number <= MAX_CLASSES:
        raise InputError(
            f"{source}: a class cannot have the id {_short(number)}; "
            f"use a whole number between 1 and {MAX_CLASSES}."
        )
    if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
        raise InputError(
            f"{source}: class {number} needs a name of 1 to {_MAX_NAME} characters; give it one."
        )
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI for c in name):
        raise InputError(
            f"{source}: the name of class {number} holds control characters; type it again."
        )
    colour = row.get("colour", _default_colour(number))
    if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
        raise InputError(
            f"{source}: class {number} cannot have the colour {_short(colour)}; "
            "write it as #rrggbb, for example #e69f00."
        )
    return ClassInfo(number, name.strip(), colour.lower(), row.get("background") is True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON itself would let the last of two equal ids win in silence.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _default_colour(number: int) -> str:
    return DEFAULT_COLOURS[(number - 1) % len(DEFAULT_COLOURS)]


def _short(value: object) -> str:
    return repr(value)[:40]
