"""Arrays in files that travel to another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Reopened:
    """An array in a file, which a process it is sent to opens again: open files cannot travel.

    Parameters
    ----------
    open_array
        Opens it; can be pickled.
    """

    def __init__(self, open_array: Callable[[], Any]) -> None:
        self._open, self._array = open_array, open_array()
        self.shape, self.dtype, self.ndim = (
            getattr(self._array, name) for name in ("shape", "dtype", "ndim")
        )

    def __getitem__(self, key: Any) -> Any:
        """Read a window."""
        return self._array[key]

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file again."""
        return Reopened, (self._open,)
