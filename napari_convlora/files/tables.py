"""Tables and results as CSV and JSON files, each replaced as a whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from napari_convlora.files.atomic import atomic_write


def write_csv(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    rows: Iterable[Mapping[str, object]],
) -> None:
    """Write rows under their header; what a row lacks stays empty.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def write_json(
    path: str | os.PathLike[str],
    data: Mapping[str, Any],
    *,
    indent: int | None = 2,
    ascii_only: bool = True,
    allow_nan: bool = True,
) -> None:
    """Write an object as JSON, with a newline at its end.

    Parameters
    ----------
    path
        To create or replace.
    data
        What to write.
    indent
        Of each level; everything is in one line if there is none.
    ascii_only
        Whether other characters are escaped.
    allow_nan
        Whether NaN and infinities, which JSON does not have, are written all the same.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only, allow_nan=allow_nan)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")
