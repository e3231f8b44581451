"""Frozen features that are kept: in memory, and what no longer fits there on disk."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import platformdirs
import torch
from torch import Tensor

_DISK_BYTES_PER_SECOND = 100e6
"""What a slow disk reads. The system may still have the bytes in memory, but must not need to."""

_WORTH = 2.0
"""An entry is written to disk if computing it again would take this many times as long."""

_FREE_SHARE = 0.25
"""Share of the free disk that may be taken."""


class _Entry(NamedTuple):
    """Features, and whether they are worth being written to disk."""

    features: Tensor
    worth: bool


class FeatureCache:
    """Frozen features by key, bounded in bytes; the least recently used go first.

    Those that take clearly longer to compute than to read go to disk instead, where there is one.
    What is read there equals what was put, bit by bit and stride by stride.

    Parameters
    ----------
    max_bytes
        Upper bound of what is held in memory; an entry larger than it is not kept.
    max_disk_bytes
        Upper bound of what is held on disk; at most a quarter of what is free there.
    """

    def __init__(self, max_bytes: int = 2 * 1024**3, max_disk_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._spill = _Spill(max_disk_bytes)
        self._asked: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def disk_bytes(self) -> int:
        """Size on disk, in bytes."""
        return self._spill.nbytes

    def get(self, key: Hashable) -> Tensor | None:
        """Return what `key` holds, or None.

        What is put after a question in vain is taken to have been computed since.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key].features
        features = self._spill.read(key)
        if features is None:
            self._asked[key] = time.perf_counter()
        else:
            self._keep(key, _Entry(features, True))
        return features

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep `features` under `key`, on the CPU."""
        features = features.detach().cpu()
        if features.untyped_storage().nbytes() != features.nbytes:
            features = features.clone()  # a view would keep all that it is a part of
        seconds = time.perf_counter() - self._asked.pop(key, time.perf_counter())
        self.drop(key)
        if features.nbytes <= self.max_bytes:
            worth = seconds * _DISK_BYTES_PER_SECOND > _WORTH * features.nbytes
            self._keep(key, _Entry(features, worth))

    def drop(self, key: Hashable) -> None:
        """Forget what `key` holds, if anything."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.nbytes -= entry.features.nbytes
        self._spill.drop(key)

    def clear(self) -> None:
        """Forget everything, and give memory and disk back."""
        self._entries.clear()
        self._asked.clear()
        self.nbytes = 0
        self._spill.clear()

    def shrink(self, max_bytes: int = 0) -> None:
        """Hold no more than `max_bytes` in memory for now; the rest goes to disk if worth it."""
        while self.nbytes > max_bytes:
            key, entry = self._entries.popitem(last=False)
            self.nbytes -= entry.features.nbytes
            if entry.worth:
                self._spill.write(key, entry.features)

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        self.nbytes += entry.features.nbytes
        self._entries[key] = entry
        self.shrink(self.max_bytes)


class _Place(NamedTuple):
    """Where the bytes of a tensor lie in the file, and how to read them."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Spill:
    """A ring of bytes in a file without a name: new entries overwrite the oldest ones.

    The system takes the file back when the process ends, however it ends.

    Parameters
    ----------
    max_bytes
        Size of the ring; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._size = max_bytes
        self._file: BinaryIO | None = None
        self._head = 0
        self._places: dict[Hashable, _Place] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return sum(place.stop - place.start for place in self._places.values())

    def write(self, key: Hashable, features: Tensor) -> None:
        """Keep a dense tensor that has its storage for itself, if there is room at all."""
        if key in self._places:
            return
        try:
            file = self._open()
            if features.nbytes > self._size:
                return
            start = self._head if self._head + features.nbytes <= self._size else 0
            stop = start + features.nbytes
            for other, place in list(self._places.items()):
                if place.start < stop and start < place.stop:
                    del self._places[other]
            file.seek(start)
            flat = features.as_strided((features.numel(),), (1,)).view(torch.uint8)
            file.write(flat.numpy().data)
            file.flush()
        except OSError:  # no folder, no room: memory has to do
            self.clear()
            self._size = self._max_bytes = 0
            return
        self._head = stop
        shape, strides = tuple(features.shape), features.stride()
        self._places[key] = _Place(start, stop, features.dtype, shape, strides)

    def read(self, key: Hashable) -> Tensor | None:
        """Return what `key` holds, or None; it stays on disk."""
        place = self._places.get(key)
        if place is None or self._file is None:
            return None
        n_bytes = place.stop - place.start
        flat = torch.empty(n_bytes // place.dtype.itemsize, dtype=place.dtype)
        try:
            self._file.seek(place.start)
            content = flat.view(torch.uint8).numpy()
            if self._file.readinto(content) < n_bytes:  # type: ignore[attr-defined]
                raise EOFError
        except (OSError, EOFError):
            self.drop(key)
            return None
        return flat.as_strided(place.shape, place.strides)

    def drop(self, key: Hashable) -> None:
        """Forget what `key` holds, if anything."""
        self._places.pop(key, None)

    def clear(self) -> None:
        """Forget everything, and give the disk back."""
        self._places.clear()
        self._head = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        """Make the file with its first entry, where a user's caches are: /tmp may be memory."""
        if self._file is None:
            folder = Path(platformdirs.user_cache_dir("napari-convlora", False))
            folder.mkdir(parents=True, exist_ok=True)
            self._size = min(self._max_bytes, int(_FREE_SHARE * shutil.disk_usage(folder).free))
            self._file = file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            weakref.finalize(self, file.close)
        return self._file
