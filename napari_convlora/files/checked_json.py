"""JSON from strangers: read with a limit, every value checked before it is used."""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from napari_convlora.config import MAX_LABEL
from napari_convlora.errors import InputError
from napari_convlora.files.tables import write_json

_MAX_BYTES = 16_000_000
_MAX_TEXT = 4096
LARGEST = 1e12
"""A number may be as large as this."""

T = TypeVar("T")


def read_json(path: Path, newest: int) -> dict[str, Any]:
    """Return the object in a JSON file of ours.

    Parameters
    ----------
    path
        Of the file.
    newest
        Highest format version that can be read.

    Raises
    ------
    InputError
        The file is absent, no regular file, too large, no JSON, or of a newer format.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("it does not exist")
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read ({error}); check the path.") from error
    try:
        data = json.loads(raw.decode("utf-8-sig")) if len(raw) <= _MAX_BYTES else None
        version = whole(data["format"], 1, 1_000_000)  # type: ignore[index]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"'{path}' is damaged or was not written by napari-convlora; restore a copy of it."
        ) from error
    if version > newest:
        raise InputError(
            f"'{path}' was written by a newer napari-convlora (format {version}, this version "
            f"reads up to {newest}); update with `pip install --upgrade napari-convlora`."
        )
    return data  # type: ignore[return-value]


def write_checked_json(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write an object as JSON, atomically.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    write_json(path, data, indent=1, ascii_only=False, allow_nan=False)


def build(kind: type[T], data: Any) -> T:
    """Return a dataclass from a JSON object; what the object lacks stays at its default.

    Parameters
    ----------
    kind
        Of int, float, bool, str, Literal, optionals, tuples, dataclasses and tables by class id.
    data
        Parsed JSON; keys that `kind` lacks are left alone.

    Raises
    ------
    ValueError, TypeError, InputError
        A value of the wrong type or out of range, or one without default is missing.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.40} is no object")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _value(hints[k], v) for k, v in data.items() if k in known})


def _value(hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else _value(inner[0], value)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{value!r:.40} is none of {', '.join(get_args(hint))}")
        return value
    if origin in (tuple, dict) and not isinstance(value, list if origin is tuple else dict):
        raise ValueError(f"{value!r:.40} is not a {'list' if origin is tuple else 'table'}")
    if origin is tuple:
        return tuple(_value(get_args(hint)[0], v) for v in value)
    if origin is dict:  # JSON's keys are text; all of ours are ids
        return {whole(int(k), 0, MAX_LABEL): _value(get_args(hint)[1], v) for k, v in value.items()}
    if is_dataclass(hint):
        return build(hint, value)  # type: ignore[arg-type]
    if hint is bool:
        if type(value) is not bool:
            raise ValueError(f"{value!r:.40} is neither true nor false")
        return value
    if hint is int:
        return whole(value, 0, 2**53)
    return number(value) if hint is float else _text(value)


def whole(value: Any, low: int, high: int) -> int:
    """Return `value` if it is a whole number within the limits, else raise a ValueError."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is no whole number within {low}..{high}")
    return value


def number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> float:
    """Return `value` if it is a number within the limits, else raise a ValueError."""
    if type(value) not in (int, float) or not low <= value <= high:  # NaN is not within any
        raise ValueError(f"{value!r:.40} is no number within {low:g}..{high:g}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise ValueError(f"{value!r:.40} is no text of up to {_MAX_TEXT} characters")
    return value
